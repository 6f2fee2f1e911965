"""The `planner` command: reads files, calls the core, prints; the one place where errors become exit codes.

Decides what each option means and what goes to stdout. Must not know how anything is solved.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from planner.advice.cli import COMMANDS as ADVICE_COMMANDS
from planner.compare import Trial, compare_strategies, held_out
from planner.control.cli import COMMANDS as CONTROL_COMMANDS
from planner.errors import GapNotReached, InfeasibleProblem, PlannerError
from planner.inputs import load_inputs
from planner.options import (
    EXISTING,
    ProgressLine,
    Quantity,
    asked_inputs,
    calibration_option,
    gap_option,
    json_option,
    limits_of,
    objective_option,
    precision_option,
    print_json,
    quality_budget_option,
    refuse,
    require_directory,
    seed_option,
    tail_option,
    time_option,
    trunk_option,
    usable_objective,
    warn_short_traces,
    warn_unknown_costs,
)
from planner.showing import COMMANDS as SHOW_COMMANDS
from planner.showing import show_plan
from planner.simulate.cli import COMMANDS as SIMULATE_COMMANDS
from planner.solvers.choose import PIPELINES, SOLVERS
from schemas.checkpoint import InvalidCheckpoint
from schemas.files import InvalidFile, write_atomic
from schemas.outcome import ExitCode
from schemas.plan import Plan, load_plan, write_plan


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expertmesh")
def cli() -> None:
    """Decide which expert lives on which machine, and bring it there."""


@cli.command()
@click.argument("topology", type=EXISTING)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Plan file (plan.json).")
@click.option("--solver", type=click.Choice(SOLVERS), default="auto", show_default=True)
@trunk_option
@objective_option
@time_option
@gap_option
@seed_option
@tail_option
@click.option("--current", type=EXISTING, help="The plan in force: only what differs from it is moved.")
@click.option(
    "--horizon", type=Quantity("duration"), help="With --current: move only where it pays within this time (1 h)."
)
@click.option("--max-move", type=Quantity("bytes"), help="With --current: bring at most this much to nodes (64 MiB).")
@click.option(
    "--balance",
    type=click.FloatRange(min=0),
    default=0.0,
    help="With additive-latency: seconds charged per second of compute of each layer's heaviest node.",
)
@precision_option
@quality_budget_option
@calibration_option
@click.option("--queueing", is_flag=True, help="Count queues at busy holders (M/M/1), and solve again with them.")
@click.option("--counters", type=EXISTING, help="What a running cluster counted, in place of traces.")
@json_option
def solve(
    *,
    topology: Path,
    output: Path | None,
    solver: str,
    trunk: Any,
    objective: Any,
    time_limit: float,
    gap: float | None,
    seed: int,
    tail: float,
    current: Path | None,
    horizon: float | None,
    max_move: float | None,
    balance: float,
    precision: Any,
    quality_budget: float | None,
    calibration: Path | None,
    queueing: bool,
    counters: Path | None,
    as_json: bool,
) -> None:
    """Find a placement and write it as a plan."""
    from planner.propose import Request, propose
    from planner.worth import MovingTerms

    refuse(
        (
            current is None and (horizon is not None or max_move is not None),
            "--horizon and --max-move are about moving from a plan: give --current PLAN too",
        ),
        (
            balance and objective != "additive-latency",
            "--balance adds to waits that add up: give --objective additive-latency too",
        ),
        (
            trunk == "stay" and solver in PIPELINES,
            f"--trunk stay: {solver} runs the trunk where it keeps the layers; leave one of them out",
        ),
        (
            tail and solver not in {"auto", "decomposition"},
            f"--tail: {solver} places on its own; use --solver auto or decomposition",
        ),
        (
            tail and (objective != "latency" or counters is not None),
            "--tail is about the waits of recorded tokens: use --objective latency and no --counters",
        ),
    )
    target = output if output or as_json else Path("plan.json")
    require_directory(target)
    start = time.monotonic()
    try:
        inputs = load_inputs(topology, counters, calibration)
        inputs = asked_inputs(inputs, trunk=trunk, quality_budget=quality_budget, precision=precision)
        warn_short_traces(inputs)
        warn_unknown_costs(inputs)
        objective = usable_objective(inputs, objective)
        request = Request(
            solver=solver,
            objective=objective,
            limits=limits_of(objective, time_limit, gap, seed, tail),
            before=load_plan(current) if current else None,
            queueing=queueing,
            balance=balance,
            lowers=precision == "auto",
            moving=MovingTerms(horizon_s=horizon, max_bytes=None if max_move is None else int(max_move)),
        )
        with ProgressLine() as line:
            found = propose(inputs, request, line)
    except InfeasibleProblem as error:
        if as_json:
            print_json(_infeasible_document(error, solver, time.monotonic() - start))
        raise
    plan = found.plan
    if target:
        write_plan(target, plan)
    if as_json:
        print_json(_solve_document(plan, found.chosen.judgement.mean_bytes_per_token))
    else:
        show_plan(plan, verbose=0)
    if target:
        click.echo(f"wrote {target}", err=as_json)
    reached = found.solved.result.gap
    if gap is not None and (reached is None or reached > gap):
        raise GapNotReached(gap, reached, found.solved.result.seconds)


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


@cli.command()
@click.argument("topology", type=EXISTING)
@click.option(
    "--strategies",
    default="uniform,popularity,eplb,dancemoe,moetuner,ordermoe,pipeline,pipeline-speed,auto",
    show_default=True,
    help="Solvers, comma-separated.",
)
@click.option("--holdout", multiple=True, metavar="[WORKLOAD=]TRACE", help="Judge a workload on this trace.")
@click.option(
    "--simulate", "simulated", is_flag=True, help="Also replay the held-out events: mean and 95th percentile."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the comparison (FILE.svg).")
@click.option(
    "--trunk",
    type=click.Choice(["stay", "move", "both"]),
    help="Where solvers that are no published strategies may run it (as the topology says); both: a row for each.",
)
@objective_option
@time_option
@gap_option
@seed_option
@json_option
def compare(
    *,
    topology: Path,
    strategies: str,
    holdout: tuple[str, ...],
    simulated: bool,
    plot: Path | None,
    trunk: Any,
    objective: Any,
    time_limit: float,
    gap: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Place by several strategies and judge them on events kept apart (the last 30 % of each trace by default)."""
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SOLVERS]:
        raise click.UsageError(f"--strategies: no {', '.join(unknown)}; there are {', '.join(SOLVERS)}")
    if plot and (plot.suffix != ".svg" or not plot.absolute().parent.is_dir()):
        raise click.UsageError(f"--plot {plot}: write a file that ends in .svg, in a directory that exists")
    inputs = load_inputs(topology)
    warn_short_traces(inputs)
    split = held_out(inputs, holdout)
    trial = Trial(
        objective=objective,
        limits=limits_of(objective, time_limit, gap, seed),
        simulated=simulated,
        trunk=("stay", "move") if trunk == "both" else (trunk or inputs.topology.trunk.mode,),
    )
    rows = list(compare_strategies(inputs, split, names, trial))
    if plot:
        from planner.chart import comparison_svg

        title = f"{inputs.topology.cluster}: {inputs.model.id}, judged on {split.judged_on}"
        notes = {str(row["strategy"]): str(row["ignores"]) for row in rows}
        write_atomic(plot, comparison_svg(rows, title=title, notes=notes))
    if as_json:
        print_json({"objective": objective, "judged_on": split.judged_on, "strategies": rows})
        return
    from planner.report import comparison_table, console

    out = console(sys.stdout)
    out.print(f"judged on {split.judged_on}")
    out.print(comparison_table(rows))
    for row in rows:
        for told in filter(None, (row["note"], row["ignores"])):
            click.echo(f"{row['strategy']}: {told}")
    if plot:
        click.echo(f"wrote {plot}")


@cli.command()
@click.argument("topology", type=EXISTING)
@json_option
def validate(topology: Path, *, as_json: bool) -> None:
    """Check a topology, its model and traces, and whether everything can fit."""
    from planner.feasibility import impossible

    inputs = load_inputs(topology)
    warn_short_traces(inputs)
    problem = inputs.problem()
    if found := impossible(problem):
        if as_json:
            print_json({"status": "infeasible", "violations": [violation.as_dict() for violation in found]})
        raise InfeasibleProblem(found)
    if as_json:
        tokens = {name: trace.header.tokens for name, trace in inputs.traces.items()}
        print_json({"status": "valid", "cluster": inputs.topology.cluster, "trace_tokens": tokens})
        return
    from planner.report import console, room_table

    model, recorded = inputs.model, sum(trace.header.tokens for trace in inputs.traces.values())
    click.echo(
        f"{topology}: valid; {problem.num_nodes} nodes, {len(problem.link_limit)} links, "
        f"{model.layers} layers × {model.experts} experts, {recorded} recorded tokens"
    )
    console(sys.stdout).print(room_table(problem))


for _command in (*SHOW_COMMANDS, *ADVICE_COMMANDS, *SIMULATE_COMMANDS, *CONTROL_COMMANDS):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line; every error ends here, as one message and an exit code."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        code = cli.main(standalone_mode=False) or ExitCode.DONE
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = ExitCode.INTERRUPTED
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
