"""Placements side by side, judged on events that none of them has seen.

Decides which tokens place and which judge, and who may move the trunk: published strategies have it where they were
published with it, ours where it is asked for. Flow: traces → split → each strategy's `Solved` → judged on the rest.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from planner.demand import Trace, read_trace
from planner.errors import PlannerError
from planner.inputs import Inputs
from planner.objective import ObjectiveName, Routing, judge
from planner.problem import Problem
from planner.simulate import Arrivals, build_network, simulate
from planner.solve import solve
from planner.solvers.base import SolveLimits
from planner.solvers.choose import STRATEGIES
from planner.solvers.strategies.ignores import IGNORES
from schemas.files import Fault, InvalidFile

TrunkMode = Literal["stay", "move"]
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
    """How every strategy is run.

    Attributes
    ----------
    simulated
        Replay the held-out events too, which takes seconds each.
    trunk
        Where solvers that are no published strategies may run it: one row for each.
    """

    objective: ObjectiveName
    limits: SolveLimits
    simulated: bool = False
    trunk: tuple[TrunkMode, ...] = ("stay",)


FIGURES: Final = (
    "remote_call_share", "any_remote_share", "predicted_latency_s", "wait_s", "hops_per_token", "bytes_per_token",
)  # fmt: skip
SIMULATED: Final = ("simulated_mean_s", "simulated_p95_s")


def compare_strategies(inputs: Inputs, split: Split, names: Sequence[str], trial: Trial) -> Iterator[dict[str, Any]]:
    """Yield one row per strategy; a strategy that found nothing valid has a note instead of figures.

    `ignores` says what a strategy leaves out; `gap` is that on the events which placed, where one is proven.
    """
    for name in names:
        modes = ("move",) if name in STRATEGIES else trial.trunk  # the published say themselves where it runs
        for mode in modes:
            row = _row(inputs.with_trunk_mode(mode), split, name, trial)
            yield {**row, "strategy": name if len(modes) == 1 else f"{name} --trunk {mode}"}


def _row(inputs: Inputs, split: Split, name: str, trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {"strategy": name, **dict.fromkeys(FIGURES), "gap": None}
    row.update(dict.fromkeys(SIMULATED) if trial.simulated else {})
    row["ignores"] = IGNORES.get(name, "")
    start = time.monotonic()
    try:
        solved = solve(inputs.problem(split.placing), name, objective=trial.objective, limits=trial.limits)
    except PlannerError as error:
        return {**row, "seconds": time.monotonic() - start, "note": str(error)}
    judged = solved.problem.judged_on(inputs.events(split.judging))
    row.update(zip(FIGURES, _figures(judged, solved.routing), strict=True))
    if trial.simulated:
        arrivals = Arrivals(seed=trial.limits.seed)
        found = simulate(judged, solved.routing, build_network(inputs.topology), arrivals)
        row.update(zip(SIMULATED, (found.total.mean_s, found.total.p95_s), strict=True))
    return {**row, "gap": solved.result.gap, "seconds": solved.result.seconds, "note": ""}


def _figures(problem: Problem, routing: Routing) -> tuple[float, ...]:
    seen, weights = judge(problem, routing), problem.tokens_per_s / problem.tokens_per_s.sum()
    hops = (problem.trunk_node != np.roll(problem.trunk_node, -1, axis=1)).sum(axis=1)
    return (
        seen.remote_call_share,
        seen.any_remote_share,
        seen.predicted_latency_s,
        float(weights @ seen.wait_s),
        float(weights @ hops),
        seen.mean_bytes_per_token,
    )
