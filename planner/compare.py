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
from planner.solve import solve
from planner.solvers.base import SolveLimits
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
        workload, trace = _holdout(inputs, text)
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


def _holdout(inputs: Inputs, text: str) -> tuple[str, Trace]:
    named, _, rest = text.partition("=")
    path = Path(rest if rest and not Path(text).exists() else text)
    trace = read_trace(path, inputs.model)
    workload = named if path != Path(text) else trace.header.workload
    if workload not in inputs.traces:
        known = ", ".join(sorted(inputs.traces))
        fault = Fault("workload", f"{workload!r} enters at no node; workloads are {known}: write WORKLOAD={path}")
        raise InvalidFile(path, [fault])
    return workload, trace


def compare_strategies(
    inputs: Inputs, split: Split, names: Sequence[str], *, objective: ObjectiveName, limits: SolveLimits
) -> Iterator[dict[str, Any]]:
    """Yield one row per strategy; a strategy that found nothing valid has a note instead of figures."""
    problem = inputs.problem(split.placing)
    judged = problem.judged_on(inputs.events(split.judging))
    keys = ("remote_call_share", "any_remote_share", "predicted_latency_s", "bytes_per_token")
    for name in names:
        start = time.monotonic()
        try:
            solved = solve(problem, name, objective=objective, limits=limits)
        except PlannerError as error:
            yield {"strategy": name, **dict.fromkeys(keys), "seconds": time.monotonic() - start, "note": str(error)}
            continue
        seen = judge(judged, solved.routing)
        values = (seen.remote_call_share, seen.any_remote_share, seen.predicted_latency_s, seen.mean_bytes_per_token)
        figures = dict(zip(keys, values, strict=True))
        yield {"strategy": name, **figures, "seconds": solved.result.seconds, "note": ""}
