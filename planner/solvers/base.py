"""What every solver takes and returns: one Protocol, one Result.

Decides what a status, a bound and a gap mean. Must not know any solver library.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Protocol

from planner.objective import ObjectiveName, nearest, placement_cost
from planner.problem import Bools, Floats, Ints, Problem

DEFAULT_GAP: Final = 1e-7
LATENCY_GAP: Final = 1e-5  # of the latency objective, which is proven by search and seldom closed further


def default_gap(objective: ObjectiveName) -> float:
    """Return the gap at which a solver stops where none was asked for."""
    return LATENCY_GAP if objective == "latency" else DEFAULT_GAP


class SolveStatus(Enum):
    """What is known about the incumbent."""

    OPTIMAL = "optimal"  # within the gap that was asked for
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"  # proven
    UNKNOWN = "unknown"


class StopReason(Enum):
    """Why a solver ended."""

    GAP = "gap"
    TIME = "time"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"  # a heuristic that ran to its end, or a proof that nothing is feasible
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveLimits:
    """When to stop, the seed of whatever is random, and where to begin.

    Attributes
    ----------
    start
        A placement to begin from, bool ``[P, L, E]``; a solver that cannot use it leaves it aside.
    tail
        With the latency objective, `auto` and `decomposition`: after its optimum, shorten the wait of this share of
        tokens, the slowest, for at most 2 % of the mean. 0 leaves the optimum as it is.
    """

    time_s: float = 60.0
    gap: float = DEFAULT_GAP
    seed: int = 0
    start: Bools | None = None
    tail: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What a solver found.

    Attributes
    ----------
    placed
        The incumbent placement, bool ``[P, L, E]``; None where none was found.
    objective, bound
        Value of the incumbent; proven lower bound of the objective. None where not known.
    slot_price
        What one more slot of each place saves at most, in the objective's unit, float64 ``[P]``; None where not known.
    trunk_node
        Where a solver that decides it runs the trunk, int64 ``[I, L]``; None: where the problem has it.
    """

    solver: str
    status: SolveStatus
    stop_reason: StopReason
    seconds: float
    placed: Bools | None = None
    objective: float | None = None
    bound: float | None = None
    detail: str = ""
    slot_price: Floats | None = None
    trunk_node: Ints | None = None

    @property
    def gap(self) -> float | None:
        """|objective - bound| / |objective|; None where either is not known."""
        return relative_gap(self.objective, self.bound)


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """Return the relative distance of an incumbent from its bound.

    >>> relative_gap(2.0, 1.5)
    0.25
    """
    if objective is None or bound is None:
        return None
    return abs(objective - bound) / max(abs(objective), 1e-12)


@dataclass(frozen=True, eq=False)
class Incumbent:
    """A better placement was found; `value` is its real objective."""

    placed: Bools
    value: float


@dataclass(frozen=True)
class Bound:
    """A better lower bound was proven."""

    value: float


Progress = Incumbent | Bound
Report = Callable[[Progress], None]


class Solver(Protocol):
    """Finds a placement that minimises an objective."""

    def __call__(self, problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
        """Solve; `report` hears of every better incumbent and bound on the way. Does not modify the problem."""
        ...


def ignore(_: Progress) -> None:
    """Report to nobody."""


def with_status(result: Result, gap: float) -> Result:
    """Return the result with the status that its own figures support, and its bound between 0 and its objective.

    No cost is negative: a bound below 0 is a solver's rounding.
    """
    if result.placed is None or result.objective is None:
        return result
    bound = None if result.bound is None else min(max(result.bound, 0.0), result.objective)
    result = replace(result, bound=bound)
    reached = result.gap is not None and result.gap <= gap
    status = SolveStatus.OPTIMAL if reached else SolveStatus.FEASIBLE
    return replace(result, status=status, stop_reason=StopReason.GAP if reached else result.stop_reason)


def nearest_cost(problem: Problem, placed: Bools, objective: ObjectiveName) -> float:
    """Objective of a placement where every call goes to the cheapest replica."""
    return placement_cost(problem, nearest(problem, placed, objective), objective)
