"""Placements side by side, judged on events that none of them has seen.

Decides which tokens place and which judge. Flow: traces → split → each strategy's `Solved` → judged on the rest.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from planner.demand import Trace, read_trace
from planner.errors import PlannerError
from planner.inputs import Inputs
from planner.objective import ObjectiveName, judge
from planner.problem import Events, Problem
from planner.simulate import Arrivals, build_network, simulate
from planner.solve import solve
from planner.solvers.base import SolveLimits
from planner.solvers.strategies.ignores import IGNORES
from schemas.files import Fault, InvalidFile

_PLACING_SHARE: Final = 0.7


@dataclass(frozen=True, eq=False)
class Split:
    """Traces to place by and traces to judge by, each by workload."""

    placing: Mapping[str, Trace]
    judging: Mapping[str, Trace]
    judged_on: str


def held_out(inputs: Inputs, holdouts: Sequence[str]) -> Split:
    """Keep events apart: the traces given as ``[WORKLOAD=]TRACE``, and the end of every other workload's trace.

    Raises
    ------
    InvalidFile
        A holdout that cannot be read, or of a workload that enters nowhere; a trace too short to be split.
    """
    judging: dict[str, Trace] = {}
    for text in holdouts:
        workload, trace = named_trace(inputs, text)
        judging[workload] = trace
    placing = dict(inputs.traces)
    for workload, trace in inputs.traces.items():
        if workload not in judging:
            if trace.header.tokens < 2:
                fault = Fault("expert_ids", f"workload {workload} has one token: too short to keep any apart")
                raise InvalidFile(Path(inputs.topology.workloads[workload]), [fault])
            placing[workload], judging[workload] = trace.split(_PLACING_SHARE)
    tokens = sum(trace.header.tokens for trace in judging.values())
    how = "held-out traces" if holdouts else "the last 30 % of each trace"
    return Split(placing, judging, f"{how} ({tokens} tokens)")


def named_trace(inputs: Inputs, text: str) -> tuple[str, Trace]:
    """Read ``[WORKLOAD=]TRACE``; the workload is that of the trace where none is named."""
    named, _, rest = text.partition("=")
    path = Path(rest if rest and not Path(text).exists() else text)
    trace = read_trace(path, inputs.model)
    workload = named if path != Path(text) else trace.header.workload
    if workload not in inputs.traces:
        known = ", ".join(sorted(inputs.traces))
        fault = Fault("workload", f"{workload!r} enters at no node; workloads are {known}: write WORKLOAD={path}")
        raise InvalidFile(path, [fault])
    return workload, trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """How every strategy is run; `simulated` replays the held-out events too, which takes seconds each."""

    objective: ObjectiveName
    limits: SolveLimits
    simulated: bool = False


FIGURES: Final = ("remote_call_share", "any_remote_share", "predicted_latency_s", "bytes_per_token")
SIMULATED: Final = ("simulated_mean_s", "simulated_p95_s")


def compare_strategies(inputs: Inputs, split: Split, names: Sequence[str], trial: Trial) -> Iterator[dict[str, Any]]:
    """Yield one row per strategy; a strategy that found nothing valid has a note instead of figures.

    `ignores` says what a strategy leaves out; `gap` is that on the events which placed, where one is proven.
    """
    problem = inputs.problem(split.placing)
    for name in names:
        yield _row(inputs, problem, inputs.events(split.judging), name, trial)


def _row(inputs: Inputs, problem: Problem, judging: Sequence[Events], name: str, trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {"strategy": name, **dict.fromkeys(FIGURES), "gap": None}
    row.update(dict.fromkeys(SIMULATED) if trial.simulated else {})
    row["ignores"] = IGNORES.get(name, "")
    start = time.monotonic()
    try:
        solved = solve(problem, name, objective=trial.objective, limits=trial.limits)
    except PlannerError as error:
        return {**row, "seconds": time.monotonic() - start, "note": str(error)}
    judged = solved.problem.judged_on(judging)
    seen = judge(judged, solved.routing)
    values = (seen.remote_call_share, seen.any_remote_share, seen.predicted_latency_s, seen.mean_bytes_per_token)
    row.update(zip(FIGURES, values, strict=True))
    if trial.simulated:
        arrivals = Arrivals(seed=trial.limits.seed)
        found = simulate(judged, solved.routing, build_network(inputs.topology), arrivals)
        row.update(zip(SIMULATED, (found.total.mean_s, found.total.p95_s), strict=True))
    return {**row, "gap": solved.result.gap, "seconds": solved.result.seconds, "note": ""}
