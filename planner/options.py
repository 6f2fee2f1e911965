"""Options that several commands share, and how they print JSON.

Decides how they are spelled. Must not know commands.
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, Literal

import click

from planner.child import Standing
from planner.demand import short_traces
from planner.inputs import Inputs
from planner.objective import OBJECTIVES, ObjectiveName
from planner.solvers.base import SolveLimits, default_gap
from schemas.precision import PRECISIONS
from schemas.units import parse_bytes, parse_duration, parse_share

EXISTING: Final = click.Path(exists=True, dir_okay=False, path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document; messages go to stderr.")
objective_option = click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default=OBJECTIVES[0],
    show_default=True,
    help="What to minimise: waits of recorded events, each layer for its slowest call; waits added up; remote calls.",
)
time_option = click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Seconds."
)
gap_option = click.option(
    "--gap",
    type=click.FloatRange(0, 1),
    help="Stop within this of the bound (1e-5 for latency, else 1e-7); given and not reached, the exit code is 1.",
)
tail_option = click.option(
    "--tail",
    type=click.FloatRange(0, 0.5),
    default=0.0,
    metavar="SHARE",
    help="Then shorten the wait of this share of tokens, the slowest (0.05), for at most 2 % of the mean.",
)
trunk_option = click.option(
    "--trunk",
    type=click.Choice(["stay", "move"]),
    help="Run attention and KV cache at the ingress, or decide where; as the topology's trunk.mode says by default.",
)
seed_option = click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)


_PARSE: Final = {"bytes": parse_bytes, "duration": parse_duration, "share": parse_share}


class Quantity(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """A number with a unit, as topology files write it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds, bytes or a share."""
        if isinstance(value, float):
            return value
        try:
            return float(_PARSE[self.name](value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", *PRECISIONS]),
    help="In which nodes hold experts of which the topology does not say; auto: chosen, within the budget of quality.",
)
quality_budget_option = click.option(
    "--quality-budget",
    type=Quantity("share"),
    help="Rise of perplexity that low precisions and substitution may spend ('1 %'), for the topology's.",
)
calibration_option = click.option(
    "--calibration", type=EXISTING, help="What precisions cost, of agent calibrate, for the topology's."
)


def asked_inputs(
    inputs: Inputs, *, trunk: Literal["stay", "move"] | None, quality_budget: float | None, precision: str | None
) -> Inputs:
    """Return the inputs with what options say in place of the topology; ``auto`` is decided later."""
    inputs = inputs.with_trunk_mode(trunk) if trunk else inputs
    inputs = inputs if quality_budget is None else inputs.with_quality_budget(quality_budget)
    said = next((each for each in PRECISIONS if each == precision), None)
    return inputs if said is None else inputs.with_unsaid(said)


def refuse(*contradictions: tuple[object, str]) -> None:
    """Raise the first usage error whose condition holds."""
    for holds, told in contradictions:
        if holds:
            raise click.UsageError(told)


def require_directory(output: Path | None) -> None:
    """Raise a usage error where the directory of a file to write is not there."""
    if output and not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output {output}: there is no directory {output.absolute().parent}")


def limits_of(
    objective: ObjectiveName, time_limit: float, gap: float | None, seed: int, tail: float = 0.0
) -> SolveLimits:
    """Return the limits that options ask for."""
    return SolveLimits(time_s=time_limit, gap=default_gap(objective) if gap is None else gap, seed=seed, tail=tail)


def usable_objective(inputs: Inputs, objective: ObjectiveName) -> ObjectiveName:
    """Return the objective, or the one that counters allow: they count activations, not which came together."""
    if inputs.counters is not None and objective == "latency":
        click.echo("counters say nothing of which experts a token chose together: additive-latency is used", err=True)
        return "additive-latency"
    return objective


def warn_short_traces(inputs: Inputs) -> None:
    """Say on stderr which traces are too short to know how often experts are chosen, and how long they should be."""
    for line in short_traces(inputs.traces):
        click.echo(f"warning: {line}", err=True)


def warn_unknown_costs(inputs: Inputs) -> None:
    """Say on stderr where nodes hold experts in precisions of which nobody measured what they cost."""
    known: Collection[str] = ("checkpoint",) if inputs.costs is None else inputs.costs.nll_per_row
    if unknown := sorted(set(inputs.precisions) - set(known)):
        click.echo(
            f"warning: what experts in {' and '.join(unknown)} cost in quality is not known: name a file of agent "
            "calibrate as quality: {calibration: FILE}",
            err=True,
        )


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))


class ProgressLine:
    """One line on stderr, rewritten in place while a solver runs; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, standing: Standing) -> None:
        """Show how far the solver has come. Modifies the terminal."""
        if self.shown:
            values = (("incumbent", standing.incumbent), ("bound", standing.bound), ("gap", standing.gap))
            told = "  ".join(f"{name} {'-' if value is None else f'{value:.6g}'}" for name, value in values)
            sys.stderr.write(f"\r\x1b[K{standing.seconds:6.1f} s  {told}")
            sys.stderr.flush()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def topology_of_plan(plan: Path, topology: Path | None) -> Path:
    """Return the topology that was given with a plan, else the one beside it; raises `UsageError` without any."""
    beside = plan.parent / "topology.yaml"
    if topology is None and not beside.is_file():
        raise click.UsageError(f"a plan has no links; there is no {beside}: give --topology")
    return topology or beside
