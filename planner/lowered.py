"""Precisions as a decision of `planner solve --precision auto`: what is tried, how long, and what is told of it.

Decides which precisions each node may get, and how the time is divided between them and the last solve. Must not know
solvers: whoever calls says how a problem is solved.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Final

from planner.assemble import Solved, rise_of
from planner.errors import InfeasibleProblem, PlannerError, Violation
from planner.inputs import Inputs
from planner.lowering import WORTH, Assignment, Rated, choose_precisions
from planner.precision import expected_rise, is_within, over_budget, rise_text
from planner.problem import Bools, Problem
from planner.solve import import_solvers
from planner.solvers.base import SolveLimits
from schemas.outcome import ExitCode
from schemas.plan import Plan, PrecisionSummary
from schemas.precision import PRECISIONS, Precision
from schemas.units import format_seconds, format_share

_SEARCH_SHARE: Final = 0.6  # of the time, for assignments; the rest is for the placement of the one that is chosen
_LEAST_SHARE: Final = 1 / 24  # of the time, for one of them

SolveOne = Callable[[Problem, SolveLimits], Solved]


class CannotChoose(PlannerError):
    """Precisions shall be chosen, but what they cost, or may cost, is not known."""

    exit_code = ExitCode.INVALID


@dataclass(frozen=True, eq=False)
class Lowered:
    """Precisions that were chosen.

    Attributes
    ----------
    inputs, limits
        With these precisions; with the time that is left, and the placement that was found for them to begin from.
    solved
        That placement; None where nothing was tried, or nothing fits.
    rated, latency_s
        What was tried; seconds of a token where something fits.
    unfit
        What was tried, and has no room for all experts or breaks another constraint.
    ways
        How many there are.
    """

    inputs: Inputs
    limits: SolveLimits
    solved: Solved | None
    rated: Mapping[Assignment, Rated]
    latency_s: Mapping[Assignment, float]
    unfit: Collection[Assignment]
    ways: int

    @property
    def exact_latency_s(self) -> float | None:
        """What a token takes with every node in the checkpoint's precision; None where that was not found."""
        return next((s for each, s in self.latency_s.items() if set(each) == {"checkpoint"}), None)

    def better(self, solved: Solved) -> Solved:
        """Return a placement that was solved for last, or the first where that is worse or loses too much."""
        first, budget = self.solved, self.inputs.topology.quality.budget
        if first is None:
            return solved
        rise = rise_of(self.inputs, solved)
        keeps = rise is not None and is_within(rise, budget)
        return solved if keeps and _objective(solved) <= _objective(first) else first

    def explained(self, plan: Plan) -> Plan:
        """Return the plan with why its nodes hold experts as they do."""
        told, takes = plan.summary.precision, plan.summary.predicted_latency_s
        if told is None or told.rise is None or takes is None:
            return plan
        summary = PrecisionSummary(
            rise=told.rise,
            budget=told.budget,
            exact_latency_s=self.exact_latency_s,
            considered=len(self.rated),
            why=self._why(takes, told.rise, told.budget) + self._beyond(takes, told.budget),
        )
        return plan.model_copy(update={"summary": plan.summary.model_copy(update={"precision": summary})})

    def _why(self, takes_s: float, rise: float, budget: float) -> str:
        exact_s, instead = self.exact_latency_s, ""
        if exact_s is not None:
            instead = f" {format_seconds(exact_s)} in the checkpoint's precision,"
        elif any(set(each) == {"checkpoint"} for each in self.unfit):
            instead = " which does not fit in the checkpoint's precision,"
        if len(self.rated) == 1 < self.ways:
            return "every node keeps as many bits as it may: the time was over before another way was tried; give more"
        if rise == 0 and exact_s is not None:
            return "every node keeps the checkpoint's precision: within the budget fewer bits make no token quicker"
        return (
            f"a token takes {format_seconds(takes_s)},{instead} for {rise_text(rise)} of perplexity at most, of a "
            f"budget of {format_share(budget)}"
        )

    def _beyond(self, takes_s: float, budget: float) -> str:
        """Tell of the quickest assignment that the budget does not allow; nothing where that is no quicker."""
        over = [(self.latency_s[each], rated.rise) for each, rated in self.rated.items() if each in self.latency_s]
        quickest = min((one for one in over if not is_within(one[1], budget)), default=None)
        if quickest is None or quickest[0] >= takes_s * (1 - WORTH):
            return ""
        return f" ({format_seconds(quickest[0])} would cost {rise_text(quickest[1])})"


def lower_precisions(inputs: Inputs, limits: SolveLimits, before: Plan | None, solve: SolveOne) -> Lowered:
    """Choose the precision of every node of which the topology does not say it.

    Nodes that hold experts under a plan in force keep theirs: agents change it only while they hold none.

    Raises
    ------
    CannotChoose
        There is no budget, or no calibration that measured a precision.
    InfeasibleProblem
        What fits costs more than the budget.
    """
    ladders, budget = _ladders(inputs, before), inputs.topology.quality.budget
    each_s = max(_SEARCH_SHARE / _expected(ladders), _LEAST_SHARE) * limits.time_s
    import_solvers()
    begun = time.monotonic()
    nodes = [node.id for node in inputs.topology.nodes]
    found: dict[Assignment, Solved] = {}
    unfit: set[Assignment] = set()

    def with_precisions(assignment: Assignment) -> Inputs:
        return inputs.with_precisions(dict(zip(nodes, assignment, strict=True)))

    def rate(assignment: Assignment) -> Rated:
        there = with_precisions(assignment)
        try:
            start = None if there.topology.trunk.mode == "move" else _start(found, assignment)
            solved = solve(there.problem(), replace(limits, time_s=each_s, tail=0.0, start=start))
        except InfeasibleProblem:
            unfit.add(assignment)
            return Rated(inf, 0.0)
        except PlannerError:
            return Rated(inf, 0.0)
        found[assignment] = solved
        rise = rise_of(there, solved)
        return Rated(_objective(solved), inf if rise is None else rise)

    def is_late() -> bool:
        return time.monotonic() - begun > _SEARCH_SHARE * limits.time_s

    chosen, rated = choose_precisions(ladders, rate, budget=budget, should_stop=is_late)
    if chosen in unfit and found:
        raise InfeasibleProblem([_beyond_budget(min(rated[each].rise for each in found), budget)])
    solved = found.get(chosen)
    left = max(limits.time_s - (time.monotonic() - begun), _LEAST_SHARE * limits.time_s)
    stays = solved is not None and not solved.problem.moves and solved.result.trunk_node is None
    start = solved.placed if solved is not None and stays else None
    return Lowered(
        inputs=with_precisions(chosen),
        limits=replace(limits, time_s=left, start=start),
        solved=solved,
        rated=rated,
        latency_s={each: one.judgement.predicted_latency_s for each, one in found.items()},
        unfit=unfit,
        ways=prod(map(len, ladders)),
    )


def _beyond_budget(least: float, budget: float) -> Violation:
    """Say that precisions in which experts have room cost more than the budget."""
    message = (
        f"all experts have room in precisions that raise perplexity by {format_share(least)} or more, above the budget "
        f"of {format_share(budget)}, and in none of those tried that keep it; raise the budget, or give nodes more "
        "memory"
    )
    return Violation("quality", "all nodes", least, budget, "perplexity", message)


def _expected(ladders: Sequence[Sequence[Precision]]) -> int:
    """Return about how many assignments are tried: all alike, then each node a step up and down."""
    return max(map(len, ladders)) + sum(2 for ladder in ladders if len(ladder) > 1)


def _start(found: Mapping[Assignment, Solved], assignment: Assignment) -> Bools | None:
    """Return the best placement that was found with no fewer bits at any node: it fits here, too."""
    wider = [
        solved
        for other, solved in found.items()
        if all(PRECISIONS.index(a) <= PRECISIONS.index(b) for a, b in zip(other, assignment, strict=True))
    ]
    return min(wider, key=_objective).placed if wider else None


def _ladders(inputs: Inputs, before: Plan | None) -> list[tuple[Precision, ...]]:
    """Return the precisions that each node may hold experts in, the most bits first."""
    costs, sizes, budget = inputs.costs, inputs.sizes or {}, inputs.topology.quality.budget
    if not budget:
        raise CannotChoose(
            "--precision auto: there is no budget of quality to keep; give --quality-budget '1 %', or quality: "
            "{budget: 1 %} in the topology"
        )
    if costs is None or len(costs.nll_per_row) < len(PRECISIONS[:2]):
        raise CannotChoose(
            "--precision auto: what int8 and int4 cost is not known; give --calibration FILE, or quality: "
            "{calibration: FILE} in the topology, of agent calibrate MODEL --text FILE …"
        )
    measured = tuple(each for each in PRECISIONS if each in costs.nll_per_row and each in sizes)
    kept = {} if before is None else {r.node: "checkpoint" for r in before.placement}
    in_force = kept | {each.node: each.precision for each in (before.precisions or () if before else ())}
    ladders: list[tuple[Precision, ...]] = []
    for node in inputs.topology.nodes:
        fixed = node.precision or in_force.get(node.id)
        ladders.append(tuple(each for each in PRECISIONS if each == fixed) if fixed else measured)
    return ladders


def require_quality(inputs: Inputs, solved: Solved) -> None:
    """Raise `InfeasibleProblem` where nodes' precisions cost tokens more than the topology's budget, if it has one."""
    budget = inputs.topology.quality.budget
    if not budget or inputs.costs is None:
        return
    rise = expected_rise(solved.problem, solved.routing, inputs.precisions, inputs.costs)
    if rise is not None and (found := list(over_budget(solved.problem, rise, budget))):
        raise InfeasibleProblem(found)


def _objective(solved: Solved) -> float:
    if solved.result.objective is None:
        raise AssertionError("only placements with an objective are compared")
    return solved.result.objective
