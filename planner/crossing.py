"""From one trunk to another: the stages of a migration in which both trunks are in memory for a while.

Decides what gives way so that experts fit beside both trunks, and in which stage the new trunk takes over: as early as
that can be, since tokens are quicker from then on. Until that stage memory is as the old trunk leaves it, in it as
both leave it, after it as the new one does. Pure arrays, as in `migration`: must not know paths, plans or names.

Flow: stages that make room (if any is needed) ──► the stage that switches the trunk ──► the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.errors import UnsafePlan
from planner.migration import Ground, Stage, plan_stages, replicate_and_drop
from planner.problem import Bools, Ints


@dataclass(frozen=True, eq=False)
class Grounds:
    """The same places under the old trunk, under both together, and under the new one."""

    before: Ground
    both: Ground
    after: Ground


class Crowded(UnsafePlan):
    """Places that cannot give way to both trunks.

    Attributes
    ----------
    excess
        Experts too many at each place, none of which can go elsewhere, int64 ``[P]``.
    """

    def __init__(self, excess: Ints) -> None:
        self.excess = excess
        super().__init__([f"{int(excess.sum())} experts have no room beside both trunks"])


def plan_crossing(current: Bools, target: Bools, grounds: Grounds, *, keep: int = 1) -> tuple[list[Stage], int]:
    """Return the stages from one placement to another, bool ``[P, K]``, and the number of the one that switches.

    Parameters
    ----------
    keep
        As in `plan_stages`.

    Raises
    ------
    UnsafePlan
        Experts do not all fit beside both trunks, or there is no safe order of steps.
    """
    fitted = fit_beside(current, target, grounds.both, keep=keep)
    first = plan_stages(current, fitted, grounds.before, keep=keep)
    switch = replicate_and_drop(fitted, target, grounds.both, keep=keep)
    rest = plan_stages(switch.after(fitted), target, grounds.after, keep=keep)
    return [*first, switch, *rest], len(first) + 1


def fit_beside(held: Bools, target: Bools, ground: Ground, *, keep: int = 1) -> Bools:
    """Return a placement near `held` that fits and has every expert; what is spare goes first, then what can move.

    Raises
    ------
    Crowded
        Where it cannot be.
    """
    fitted = held.copy()
    for floor in range(keep, 0, -1):
        for place in np.flatnonzero(ground.free(fitted) < 0).tolist():
            _drop_spares(fitted, place, target, ground, floor)
    for place in np.flatnonzero(ground.free(fitted) < 0).tolist():
        for expert in _leaving_order(fitted, place, target):
            if ground.free(fitted)[place] >= 0:
                break
            _move_away(fitted, place, expert, target, ground)
    if (excess := -ground.free(fitted)).max(initial=0) > 0:
        raise Crowded(np.maximum(excess, 0))
    return fitted


def _drop_spares(held: Bools, place: int, target: Bools, ground: Ground, floor: int) -> None:
    """Drop what more than `floor` nodes hold, as far as a place is too full; what it will not keep first. Modifies."""
    count: Ints = ground.nodes(held).sum(axis=0)
    spare = np.flatnonzero(held[place] & (count > floor))
    order = spare[np.lexsort((-count[spare], target[place, spare]))]
    held[place, order[: -ground.free(held)[place]]] = False


def _leaving_order(held: Bools, place: int, target: Bools) -> list[int]:
    """Experts of a place, those first that it will not keep anyway, of these those that have another place to come."""
    here = np.flatnonzero(held[place])
    order = np.lexsort((~target[:, here].any(axis=0), target[place, here]))
    return [int(expert) for expert in here[order]]


def _move_away(held: Bools, place: int, expert: int, target: Bools, ground: Ground) -> None:
    """Keep a last replica elsewhere, in a slot that is free or that something spare leaves; if it can. Modifies."""
    for other in _refuges(held, place, expert, target, ground):
        if ground.free(held)[other] <= 0:
            spare = np.flatnonzero(held[other] & (ground.nodes(held).sum(axis=0) > 1))
            if not len(spare):
                continue
            held[other, spare[target[other, spare].argmin()]] = False
        held[other, expert], held[place, expert] = True, False
        return


def _refuges(held: Bools, place: int, expert: int, target: Bools, ground: Ground) -> Iterator[int]:
    """Yield places for an expert: free ones before full ones, where it shall be first, then where most is free."""
    node = ground.place_node
    free = ground.free(held)
    others = np.flatnonzero(ground.allowed[:, expert] & (ground.slots > 0) & (free >= 0))
    own = node[others] == node[place]
    order = np.lexsort((-free[others], ~own, ~target[others, expert], free[others] == 0))
    yield from (other for other in others[order].tolist() if other != place)
