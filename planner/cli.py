"""The `planner` command: reads files, calls the core, prints; the one place where errors become exit codes.

Decides what each option means and what goes to stdout. Must not know how anything is solved.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from planner.child import Standing
from planner.compare import compare_strategies, held_out
from planner.control.cli import COMMANDS
from planner.control.cli import COMMANDS as CONTROL_COMMANDS
from planner.errors import InfeasibleProblem, PlannerError
from planner.inputs import load_inputs
from planner.objective import OBJECTIVES
from planner.solvers.choose import SOLVERS
from schemas.activation import ActivationCounts, TraceHeader
from schemas.base import FrozenModel
from schemas.checkpoint import InvalidCheckpoint
from schemas.files import InvalidFile
from schemas.model import ModelSpec
from schemas.outcome import ExitCode
from schemas.plan import Plan, load_plan, write_plan
from schemas.topology import Topology

SCHEMAS: Mapping[str, type[FrozenModel]] = {
    "topology": Topology,
    "plan": Plan,
    "model": ModelSpec,
    "trace": TraceHeader,
    "counters": ActivationCounts,
}

_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document; messages go to stderr.")


class _Objective(click.Choice[str]):
    """An objective by name; says of `latency` that it is yet to come."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "latency":
            self.fail(f"latency is not in this version; there are {', '.join(OBJECTIVES)}", param, ctx)
        return super().convert(value, param, ctx)


_objective_option = click.option(
    "--objective", type=_Objective(OBJECTIVES), default=OBJECTIVES[0], show_default=True, help="What to minimise."
)
_time_option = click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Seconds."
)
_gap_option = click.option(
    "--gap", type=click.FloatRange(0, 1), default=1e-7, show_default=True, help="Stop within this of the bound."
)
_seed_option = click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expertmesh")
def cli() -> None:
    """Decide which expert lives on which machine, and bring it there."""


@cli.command()
@click.argument("topology", type=_EXISTING)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Plan file (plan.json).")
@click.option("--solver", type=click.Choice(SOLVERS), default="auto", show_default=True)
@_objective_option
@_time_option
@_gap_option
@_seed_option
@click.option("--current", type=_EXISTING, help="The plan in force: only what differs from it is moved.")
@click.option("--counters", type=_EXISTING, help="What a running cluster counted, in place of traces.")
@_json_option
def solve(
    *,
    topology: Path,
    output: Path | None,
    solver: str,
    objective: Any,
    time_limit: float,
    gap: float,
    seed: int,
    current: Path | None,
    counters: Path | None,
    as_json: bool,
) -> None:
    """Find a placement and write it as a plan."""
    from planner.assemble import make_plan
    from planner.solve import solve as run
    from planner.solvers.base import SolveLimits

    target = output if output or as_json else Path("plan.json")
    if target and not target.absolute().parent.is_dir():
        raise click.UsageError(f"--output {target}: there is no directory {target.absolute().parent}")
    start = time.monotonic()
    try:
        inputs = load_inputs(topology, counters)
        before = load_plan(current) if current else None
        limits = SolveLimits(time_s=time_limit, gap=gap, seed=seed)
        with _ProgressLine() as line:
            solved = run(inputs.problem(), solver, objective=objective, limits=limits, watch=line)
        plan = make_plan(inputs, solved, before)
    except InfeasibleProblem as error:
        if as_json:
            _print_json(_infeasible_document(error, solver, time.monotonic() - start))
        raise
    if target:
        write_plan(target, plan)
    if as_json:
        _print_json(_solve_document(plan, solved.judgement.mean_bytes_per_token))
    else:
        _show(plan, verbose=0)
    if target:
        click.echo(f"wrote {target}", err=as_json)


def _solve_document(plan: Plan, bytes_per_token: float) -> dict[str, Any]:
    document = plan.model_dump(mode="json")
    return {**document["summary"], "bytes_per_token": bytes_per_token, "plan": document}


def _infeasible_document(error: InfeasibleProblem, solver: str, seconds: float) -> dict[str, Any]:
    return {
        "status": "infeasible",
        "solver": solver,
        **dict.fromkeys(("objective", "bound", "gap")),
        "seconds": seconds,
        "violations": [violation.as_dict() for violation in error.violations],
    }


class _ProgressLine:
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

    def __enter__(self) -> "_ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@cli.command()
@click.argument("topology", type=_EXISTING)
@click.option("--strategies", default="uniform,dancemoe,auto", show_default=True, help="Solvers, comma-separated.")
@click.option("--holdout", multiple=True, metavar="[WORKLOAD=]TRACE", help="Judge a workload on this trace.")
@_objective_option
@_time_option
@_gap_option
@_seed_option
@_json_option
def compare(
    *,
    topology: Path,
    strategies: str,
    holdout: tuple[str, ...],
    objective: Any,
    time_limit: float,
    gap: float,
    seed: int,
    as_json: bool,
) -> None:
    """Place by several strategies and judge them on events kept apart (the last 30 % of each trace by default)."""
    from planner.solvers.base import SolveLimits

    names = [name.strip() for name in strategies.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SOLVERS]:
        raise click.UsageError(f"--strategies: no {', '.join(unknown)}; there are {', '.join(SOLVERS)}")
    inputs = load_inputs(topology)
    split = held_out(inputs, holdout)
    limits = SolveLimits(time_s=time_limit, gap=gap, seed=seed)
    rows = list(compare_strategies(inputs, split, names, objective=objective, limits=limits))
    if as_json:
        _print_json({"objective": objective, "judged_on": split.judged_on, "strategies": rows})
        return
    from planner.report import comparison_table, console

    out = console(sys.stdout)
    out.print(f"judged on {split.judged_on}")
    out.print(comparison_table(rows))
    for row in rows:
        if row["note"]:
            click.echo(f"{row['strategy']}: {row['note']}")


@cli.command()
@click.argument("topology", type=_EXISTING)
@_json_option
def validate(topology: Path, *, as_json: bool) -> None:
    """Check a topology, its model and traces, and whether everything can fit."""
    from planner.feasibility import impossible

    inputs = load_inputs(topology)
    problem = inputs.problem()
    if found := impossible(problem):
        if as_json:
            _print_json({"status": "infeasible", "violations": [violation.as_dict() for violation in found]})
        raise InfeasibleProblem(found)
    if as_json:
        tokens = {name: trace.header.tokens for name, trace in inputs.traces.items()}
        _print_json({"status": "valid", "cluster": inputs.topology.cluster, "trace_tokens": tokens})
        return
    from planner.report import console, room_table

    model, recorded = inputs.model, sum(trace.header.tokens for trace in inputs.traces.values())
    click.echo(
        f"{topology}: valid; {problem.num_nodes} nodes, {len(problem.link_limit)} links, "
        f"{model.layers} layers × {model.experts} experts, {recorded} recorded tokens"
    )
    console(sys.stdout).print(room_table(problem))


@cli.command()
@click.argument("plan", type=_EXISTING)
@click.option("-v", "--verbose", count=True, help="Also why, and every expert; twice for every step.")
@_json_option
def show(plan: Path, verbose: int, *, as_json: bool) -> None:
    """Summarise a plan: what changes, and what it promises."""
    loaded = load_plan(plan)
    if as_json:
        _print_json(loaded.model_dump(mode="json"))
    else:
        _show(loaded, verbose)


def _show(plan: Plan, verbose: int) -> None:
    from planner.report import console, layer_table, node_table, plan_lines, reason_lines, step_lines

    out = console(sys.stdout)
    _print_lines(plan_lines(plan))
    out.print(node_table(plan))
    if verbose:
        _print_lines(reason_lines(plan))
        out.print(layer_table(plan))
    if verbose > 1:
        _print_lines(step_lines(plan))


@cli.command()
@click.argument("first", type=_EXISTING)
@click.argument("second", type=_EXISTING)
@click.option("-v", "--verbose", is_flag=True, help="List every replica.")
@_json_option
def diff(first: Path, second: Path, *, verbose: bool, as_json: bool) -> None:
    """Say in what the placements of two plans differ."""
    from planner.report import console, difference, difference_table

    before, after = load_plan(first), load_plan(second)
    change = difference(before, after)
    if as_json:
        _print_json(change)
        return
    added, dropped = change["added"], change["dropped"]
    if change["same_placement"]:
        click.echo("same placement" + ("" if change["same_routes"] else ", other routes"))
        return
    click.echo(f"{len(added)} replicas added, {len(dropped)} dropped, {change['kept']} kept")
    console(sys.stdout).print(difference_table(before, after))
    for sign, records in (("+", added), ("-", dropped)):
        for record in records if verbose else ():
            click.echo(
                f"{sign} layer {record['layer']} expert {record['expert']} on {record['node']} ({record['tier']})"
            )


@cli.command()
@click.argument("name", type=click.Choice(sorted(SCHEMAS)))
def schema(name: str) -> None:
    """Print the JSON Schema of a file format."""
    _print_json(SCHEMAS[name].model_json_schema())


for _command in COMMANDS:
    cli.add_command(_command)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


for _command in CONTROL_COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run the command line; every error ends here, as one message and an exit code."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        code = cli.main(standalone_mode=False) or ExitCode.DONE
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except (InvalidFile, InvalidCheckpoint) as error:
        click.echo(f"error: {error}", err=True)
        code = ExitCode.INVALID
    except PlannerError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = ExitCode.FAILED
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        code = ExitCode.FAILED
    sys.exit(int(code))


if __name__ == "__main__":
    main()
