"""The commands `replan` and `explain`.

Decides their options and what they print. Must not know how figures come about.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from planner.advice.explain import Explanation
from planner.advice.replay import Look
from planner.assemble import Solved
from planner.inputs import Inputs, load_inputs
from planner.objective import ObjectiveName
from planner.options import (
    EXISTING,
    Quantity,
    gap_option,
    json_option,
    limits_of,
    objective_option,
    print_json,
    seed_option,
    time_option,
    topology_of_plan,
    warn_short_traces,
)
from planner.problem import Problem
from planner.solvers.base import SolveLimits
from planner.solvers.choose import SOLVERS
from schemas.plan import Plan, load_plan, write_plan
from schemas.units import format_bytes, format_seconds, format_share

_solver_option = click.option("--solver", type=click.Choice(SOLVERS), default="auto", show_default=True)


@click.command()
@click.argument("topology", type=EXISTING)
@click.option("--current", type=EXISTING, required=True, help="The plan in force.")
@click.option(
    "--trace", "traces", multiple=True, required=True, metavar="[WORKLOAD=]FILE", help="What was routed since."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Plan file, where it moves.")
@click.option("--horizon", type=Quantity("duration"), default="1 h", show_default=True, help="How long it should pay.")
@click.option("--max-move", type=Quantity("bytes"), help="Bring at most this much to nodes (64 MiB).")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens between looks.")
@_solver_option
@objective_option
@time_option
@seed_option
@json_option
def replan(
    *,
    topology: Path,
    current: Path,
    traces: tuple[str, ...],
    output: Path | None,
    horizon: float,
    max_move: float | None,
    batch: int,
    solver: str,
    objective: Any,
    time_limit: float,
    seed: int,
    as_json: bool,
) -> None:
    """Say whether what was routed lately is worth a new placement, and write its plan if so.

    The trace passes by as live traffic would: a change is told from noise, a candidate is placed on one half of the
    tokens since the change and judged on the other, and moves only where what it saves for sure exceeds what it costs.
    """
    from planner.advice.judge import Replanned, replan_on
    from planner.replan import MovingRules

    before = load_plan(current)
    inputs = load_inputs(topology).as_planned(before)
    newer = _newer(inputs, traces)
    rules = MovingRules(horizon_s=horizon, max_bytes=None if max_move is None else int(max_move))
    solve = _solve_with(solver, objective, limits_of(objective, time_limit, None, seed))
    found: Replanned = replan_on(newer, before, solve, rules=rules, batch=batch)
    target = (output or (None if as_json else Path("plan.json"))) if found.plan is not None else None
    if target is not None and found.plan is not None:
        write_plan(target, found.plan)
    if as_json:
        print_json(_replan_document(found.looks, found.plan))
        return
    for look in found.looks:
        verb = "move" if look.decision.move else "stay"
        click.echo(f"after {look.tokens} tokens of each ingress: {verb}; {look.decision.reason}")
    moved = found.looks[-1].decision.moved_bytes if found.looks and found.plan else 0
    click.echo(f"moves {format_bytes(moved)}; wrote {target}" if found.plan else f"stays at epoch {before.epoch}")


def _replan_document(looks: Sequence[Look], plan: Plan | None) -> dict[str, Any]:
    return {
        "move": plan is not None,
        "looks": [{"tokens": look.tokens, **asdict(look.decision)} for look in looks],
        "plan": None if plan is None else plan.model_dump(mode="json"),
    }


def _newer(inputs: Inputs, traces: Sequence[str]) -> Inputs:
    """Return the inputs with newer traces in place of those of the topology."""
    from planner.compare import named_trace

    newer: Mapping[str, Any] = dict(named_trace(inputs, text) for text in traces)
    return replace(inputs, traces={**inputs.traces, **newer})


def _solve_with(solver: str, objective: ObjectiveName, limits: SolveLimits, *, in_process: bool = False) -> Any:
    from planner.solve import solve

    def run(problem: Problem) -> Solved:
        return solve(problem, solver, objective=objective, limits=limits, in_process=in_process)

    return run


@click.command()
@click.argument("file", type=EXISTING, metavar="TOPOLOGY|PLAN")
@click.option("--topology", type=EXISTING, help="Of a plan (topology.yaml beside PLAN).")
@objective_option
@time_option
@gap_option
@seed_option
@json_option
def explain(
    *, file: Path, topology: Path | None, objective: Any, time_limit: float, gap: float | None, seed: int, as_json: bool
) -> None:
    """Say what binds, what a token's path costs and why, and what more memory or faster links would bring.

    Solves a topology once, or takes a plan (.json) as it is, and solves again for every what-if; the time limit is for
    each. What-ifs of a plan count what solving again brings, too.
    """
    from planner.advice.explain import as_planned
    from planner.advice.explain import explain as find

    is_plan = file.suffix == ".json"
    if topology is not None and not is_plan:
        raise click.UsageError(f"--topology goes with a plan (.json), {file} is a topology itself")
    inputs = load_inputs(topology_of_plan(file, topology) if is_plan else file)
    warn_short_traces(inputs)
    solve = _solve_with("decomposition", objective, limits_of(objective, time_limit, gap, seed), in_process=True)
    plan = load_plan(file) if is_plan else None
    inputs = inputs if plan is None else inputs.as_planned(plan)
    solved = solve(inputs.problem()) if plan is None else as_planned(inputs, plan, objective)
    found = find(inputs, solved, solve)
    if as_json:
        paths = [path.model_dump(mode="json") for path in found.paths]
        print_json({**asdict(replace(found, paths=())), "paths": paths})
    else:
        _show(found)


def _show(found: Explanation) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from planner.journey_report import leg_table, path_lines
    from planner.report import console

    out = console(sys.stdout)
    nodes = Table("node", "binds", "experts of room", "compute", "memory is worth", box=SIMPLE_HEAD, pad_edge=False)
    for node in found.nodes:
        price = "-" if node.price_ms_per_mib is None else f"{node.price_ms_per_mib:.4g} ms per MiB"
        room = f"{format_bytes(node.used_bytes)} of {format_bytes(node.room_bytes)}"
        nodes.add_row(node.id, ", ".join(node.binds) or "nothing", room, format_share(node.utilisation), price)
    out.print(nodes)
    links = Table("link", "binds", "use", box=SIMPLE_HEAD, pad_edge=False)
    for link in found.links:
        links.add_row(" - ".join(link.between), "yes" if link.binds else "no", format_share(link.utilisation))
    out.print(links)
    for line in path_lines(found.paths, why=True):
        click.echo(line)
    out.print(leg_table(found.paths))
    changes = Table("what if", "estimate per token", "solved again", box=SIMPLE_HEAD, pad_edge=False)
    for item in found.what_ifs:
        estimate = "-" if item.estimate_s is None else f"{format_seconds(item.estimate_s)} less"
        changes.add_row(item.change, estimate, f"{format_seconds(item.checked_s)} less")
    out.print(changes)


COMMANDS = (replan, explain)
