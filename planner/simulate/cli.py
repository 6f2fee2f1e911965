"""The `simulate` command: what tokens would meet under a plan, before it is applied.

Decides its options and how figures are shown. Must not know how they come about.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from planner.options import topology_of_plan

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("plan", type=_FILE)
@click.option("--topology", type=_FILE, help="Links, compute and rates (topology.yaml beside PLAN).")
@click.option("--trace", "traces", multiple=True, metavar="WORKLOAD=FILE", help="Replay this trace for a workload.")
@click.option("--tokens", type=click.IntRange(1, 10**8), default=20_000, show_default=True)
@click.option("--rate-scale", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              help="Times the topology's tokens_per_s.")  # fmt: skip
@click.option(
    "--arrivals",
    type=click.Choice(["requests", "tokens", "closed"]),
    default="requests",
    show_default=True,
    help="Requests that decode token by token; every token on its own; sessions that are always busy.",
)
@click.option(
    "--request-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens of a request."
)
@click.option(
    "--sessions", type=click.IntRange(min=1), default=1, show_default=True, help="Of each ingress, if closed."
)
@click.option("--fixed", is_flag=True, help="Equal gaps between arrivals in place of random (Poisson) ones.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; messages go to stderr.")
def simulate(
    plan: Path,
    topology: Path | None,
    traces: tuple[str, ...],
    *,
    tokens: int,
    rate_scale: float,
    arrivals: Any,
    request_tokens: int,
    sessions: int,
    fixed: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Replay recorded routing against PLAN with its links, queues and compute: latencies and utilisation."""
    from planner.simulate.arrivals import Arrivals
    from planner.simulate.report import document, show
    from planner.simulate.run import simulate_plan

    settings = Arrivals(
        tokens=tokens,
        pattern=arrivals,
        spacing="fixed" if fixed else "poisson",
        rate_scale=rate_scale,
        request_tokens=request_tokens,
        sessions=sessions,
        seed=seed,
    )
    found = simulate_plan(plan, topology_of_plan(plan, topology), _by_workload(traces), settings)
    if as_json:
        click.echo(json.dumps({**document(found), "settings": asdict(settings)}, indent=1, ensure_ascii=False))
    else:
        show(found)


def _by_workload(traces: tuple[str, ...]) -> Mapping[str, Path]:
    found = {}
    for text in traces:
        workload, separator, path = text.partition("=")
        if not separator or not Path(path).is_file():
            raise click.UsageError(f"--trace {text}: write WORKLOAD=FILE, with a trace file that exists")
        found[workload] = Path(path)
    return found


COMMANDS = (simulate,)
