"""A newer trace against the plan in force: the watcher runs over it as over live traffic.

Decides how a trace becomes batches. Flow: events by ingress → batches → `replan.watch`, `replan.look` → decisions.
Must not know files nor how a candidate is found.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from planner.assemble import Solved
from planner.problem import Events, Problem
from planner.replan import Arrangement, Decision, MovingRules, look, watch

LOOK_TOKENS = 1024  # of each ingress, before the first look; half of what there is where that is less
_LEAST_BATCHES = 8  # four to place by and four to judge on


@dataclass(frozen=True, eq=False)
class Look:
    """One look: after so many tokens of each ingress, what was decided, and the placement looked at."""

    tokens: int
    decision: Decision
    candidate: Solved


def batches(events: Sequence[Events], size: int) -> Iterator[tuple[Events, ...]]:
    """Cut events ``[T, L, K]`` of each ingress into batches side by side, as long as every ingress has tokens left."""
    total = min(len(part) for part in events)
    for first in range(0, total - size + 1, size):
        yield tuple(part[first : first + size] for part in events)


def batch_size(events: Sequence[Events], wanted: int) -> int:
    """Return the tokens of a batch: as wanted, or fewer so that there are enough batches to judge on."""
    return max(1, min(wanted, min(len(part) for part in events) // _LEAST_BATCHES))


def replay(
    problem: Problem,
    now: Arrangement,
    events: Sequence[Events],
    solve: Callable[[Problem], Solved],
    *,
    rules: MovingRules,
    size: int,
) -> Iterator[Look]:
    """Yield every look that the watcher takes while the events pass by; a move is in force for the rest."""
    stream = batches(events, size)
    first = next(stream)
    look_tokens = min(LOOK_TOKENS, size * _LEAST_BATCHES)
    watcher = watch(first, problem.experts, look_tokens=look_tokens)
    found: list[Solved] = []

    def candidate(seen: Problem) -> Arrangement:
        found.append(solve(seen))
        return Arrangement(found[-1].placed, found[-1].routing, found[-1].problem.trunk_node)

    for number, batch in enumerate(stream, start=2):
        watcher = watcher.after(batch)
        if watcher.ready:
            decision, now, watcher = look(watcher, problem, now, candidate, rules)
            yield Look(number * size, decision, found[-1])
