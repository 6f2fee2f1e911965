"""Which node holds experts in which precision: the least wait that a budget of quality allows, with the least loss.

Decides by asking for the objective and the rise of perplexity of whole assignments of precisions: of all of them where
they are few, else one node at a time, from the best in which all nodes are alike. A node is lowered only where that is
worth it; of assignments that are about as good that with the least loss is taken. Pure: must not know how an assignment
is solved, nor a clock.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf, prod
from typing import Final

from planner.precision import is_within
from schemas.precision import Precision

Assignment = tuple[Precision, ...]
"""Of each node."""

WORTH: Final = 0.005
"""Share of the objective that is no reason to lose quality."""
_FEW: Final = 9  # assignments that are all tried


@dataclass(frozen=True)
class Rated:
    """What an assignment comes to: the objective of its best placement (infinite where there is none), and its loss.

    `rise` is the rise of perplexity of the ingress that loses most.
    """

    objective: float
    rise: float


@dataclass
class _Search:
    ladders: Sequence[Sequence[Precision]]
    rate: Callable[[Assignment], Rated]
    budget: float
    should_stop: Callable[[], bool]
    known: dict[Assignment, Rated] = field(default_factory=dict)

    def look(self, assignment: Assignment) -> bool:
        """Rate an assignment, once; False where there is no time."""
        if assignment not in self.known:
            if self.known and self.should_stop():
                return False
            self.known[assignment] = self.rate(assignment)
        return True

    def objective(self, assignment: Assignment) -> float:
        """Objective of an assignment that was looked at; infinite where it is above the budget."""
        found = self.known.get(assignment)
        return found.objective if found is not None and is_within(found.rise, self.budget) else inf

    def best(self) -> Assignment:
        """Of those about as good as the best, that which loses least; the first rated where none has a placement."""
        least = min(map(self.objective, self.known))
        if least == inf:
            return next(iter(self.known))
        good = [each for each in self.known if self.objective(each) <= least * (1 + WORTH)]
        return min(good, key=lambda each: (self.known[each].rise, self.objective(each), self.steps(each)))

    def steps(self, assignment: Assignment) -> int:
        """Count the steps down all ladders together."""
        return sum(ladder.index(each) for ladder, each in zip(self.ladders, assignment, strict=True))

    def neighbours(self, assignment: Assignment) -> Iterator[Assignment]:
        """Yield assignments in which one node is a step lower, then those in which one is a step higher."""
        for step in (1, -1):
            for node, ladder in enumerate(self.ladders):
                rung = ladder.index(assignment[node]) + step
                if 0 <= rung < len(ladder):
                    yield (*assignment[:node], ladder[rung], *assignment[node + 1 :])


def choose_precisions(
    ladders: Sequence[Sequence[Precision]],
    rate: Callable[[Assignment], Rated],
    *,
    budget: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Assignment, dict[Assignment, Rated]]:
    """Return the precision of each node, and all assignments that were rated, that with the most bits first.

    Parameters
    ----------
    ladders
        Precisions that each node may hold experts in, the most bits first.
    rate
        Asked once for each assignment.
    should_stop
        Asked before each assignment but the first.
    """
    search = _Search(ladders, rate, budget, should_stop)
    search.look(tuple(ladder[0] for ladder in ladders))
    if prod(map(len, ladders)) <= _FEW:
        for assignment in product(*ladders):
            search.look(assignment)
        return search.best(), search.known
    for rung in range(1, max(map(len, ladders))):
        search.look(tuple(ladder[min(rung, len(ladder) - 1)] for ladder in ladders))
    at, is_moving = search.best(), True
    while is_moving:
        if not all(search.look(each) for each in search.neighbours(at)):
            break
        better = search.best()
        is_moving, at = better != at, better
    return search.best(), search.known
