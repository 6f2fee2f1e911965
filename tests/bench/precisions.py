"""What precisions bring when the planner decides on them: ``python -m tests.bench.precisions``.

The three uneven agents of `tests.bench.waits` (25, 30 and 45 % of 1.6 times the memory of all experts as the checkpoint
has them), the trunk at the ingress. Solved with every node in the checkpoint's precision, with one in int8, and with
precisions that the planner chooses within a budget of quality; each plan simulated on its links, applied to agents on
loopback, and text that nothing was calibrated or placed on scored token by token through them. Perplexity is of the same
pieces of text in every row; intervals are 95 %.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
import torch
import yaml

from runtime.calibrate import Rise
from runtime.store import prepare_store
from schemas.plan import Plan, load_plan
from schemas.precision import LOW_PRECISIONS
from tests.bench.emulated import load_average
from tests.bench.given import MODEL, TEXTS
from tests.bench.site import Scene, Site
from tests.bench.trunk import Loopback
from tests.bench.waits import DOMAINS, SHARES, Bench, Seen, eval_pieces, record, run_agent, write_scene
from tests.cluster import PLANNER, call, free_port

_LARGEST: Final = max(SHARES, key=SHARES.__getitem__)


@dataclass(frozen=True)
class Row:
    """One plan: what it says, what the simulator makes of it, what its agents met."""

    plan: Plan
    simulated_s: float
    seen: Seen


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=MODEL)
@click.option("--texts", type=click.Path(exists=True, path_type=Path), default=TEXTS)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), help="Else it is made.")
@click.option("--fill", default=1.6, show_default=True, help="Memory for experts over all experts.")
@click.option("--latency-ms", default=5.0, show_default=True, help="One way, of every link, to plan with.")
@click.option("--budget", default="1 %", show_default=True)
@click.option("--tokens", default=1536, show_default=True, help="To score at each node.")
@click.option("--time-limit", default=40.0, show_default=True, help="Of each solve.")
def main(
    model: Path,
    texts: Path,
    calibration: Path | None,
    fill: float,
    latency_ms: float,
    budget: str,
    tokens: int,
    time_limit: float,
) -> None:
    """Solve, simulate, apply, score."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        prepare_store(model, path / "store", precisions=LOW_PRECISIONS)
        record(path, model, texts)
        file = calibration or calibrated(path / "calibration.json", model, texts, budget)
        pieces = {node: list(eval_pieces(model, texts, DOMAINS[node], tokens)) for node in SHARES}
        bench = Bench(path, model, texts, 0, pieces, None)
        within = ("--time-limit", str(time_limit), "--calibration", str(file))
        arms = {
            "every node as the checkpoint": ({}, ()),
            f"{_LARGEST} in int8": ({_LARGEST: "int8"}, ()),
            f"chosen within {budget}": ({}, ("--precision", "auto", "--quality-budget", budget)),
        }
        base: Seen | None = None
        for number, (name, (held, options)) in enumerate(arms.items()):
            scene = write_scene(
                path / f"scene{number}", model, path, fill=fill, latency_ms=latency_ms, dtype="checkpoint"
            )
            follow_plans(scene, held)
            row = run(bench, scene, f"site{number}", (*within, *options))
            base = base or row.seen
            show(name, row, base)
        click.echo(load_average())


def calibrated(file: Path, model: Path, texts: Path, budget: str) -> Path:
    """Measure what precisions cost, on calibration text of every domain."""
    domains = [domain for each in DOMAINS.values() for domain in each]
    given = [option for d in domains for option in ("--text", str(texts / d / "calibration.jsonl"))]
    run_agent("calibrate", str(model), *given, "-o", str(file), "--budget", budget, "--tokens", "12288")
    return file


def follow_plans(scene: Scene, held: Mapping[str, str]) -> None:
    """Let agents hold experts as plans say, and the topology say it of some nodes."""
    topology = scene.path / "topology.yaml"
    document = yaml.safe_load(topology.read_text())
    for node in document["nodes"]:
        if node["id"] in held:
            node["precision"] = held[node["id"]]
        config = scene.path / f"{node['id']}.yaml"
        config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "precision": "plan"}))
    topology.write_text(yaml.safe_dump(document))


def run(bench: Bench, scene: Scene, name: str, options: tuple[str, ...]) -> Row:
    """Solve, simulate, start agents and score the text."""
    site = Site(Loopback(), scene, bench.path / name, bench.path / "store", free_port())
    site.solve(*options)
    done = call(*PLANNER, "simulate", str(site.plan), "--topology", str(site.topology), "--json", timeout_s=300)
    if done.returncode:
        raise SystemExit(done.stderr)
    mean = float(json.loads(done.stdout)["latency"]["mean_s"])
    try:
        site.start()
        return Row(load_plan(site.plan), mean, bench.score(site))
    finally:
        site.stop()


def show(name: str, row: Row, base: Seen) -> None:
    """Print a row."""
    plan, seen, told = row.plan, row.seen, row.plan.summary.precision
    held = {each.node: each.precision for each in plan.precisions or ()}
    moved = sum(step.bytes for step in plan.steps if step.action == "replicate") / 2**20
    nodes = ", ".join(f"{node} {held.get(node, 'checkpoint')}" for node in SHARES)
    planned_ms = 1e3 * (plan.summary.predicted_latency_s or 0.0)
    click.echo(f"{name}: {nodes}")
    click.echo(
        f"  {len(plan.placement)} replicas of {plan.model.layers * plan.model.experts} experts, {moved:.1f} MiB moved"
    )
    click.echo(f"  a token: planned {planned_ms:.2f} ms, simulated {1e3 * row.simulated_s:.2f} ms")
    click.echo(
        f"  agents: {seen.any_remote:.1%} of layers wait, {seen.calls:.2f} calls and {1e3 * seen.wait_s:.3f} ms of waits a token"
    )
    if seen is not base:
        pairs = [zip(seen.nll[node], base.nll[node], strict=True) for node in seen.nll]
        rise = Rise.of(np.array([a - b for pair in pairs for a, b in pair]))
        low, high = (math.expm1(rise.mean + sign * 1.96 * rise.error) for sign in (-1, 1))
        promised = "" if told is None or told.rise is None else f"; {told.rise:+.2%} at most was expected of any node's"
        click.echo(f"  perplexity {math.expm1(rise.mean):+.2%} ({low:+.2%} … {high:+.2%}){promised}")


if __name__ == "__main__":
    main()
