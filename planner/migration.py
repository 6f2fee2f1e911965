"""From the placement that is to the one that shall be, in stages that are safe at every moment.

Decides what is replicated and dropped in which stage. Within a stage all new replicas are made before any old one
goes, so old and new together must fit each place; an expert is never left with fewer than `keep` nodes. Where nodes
are too full for that, a last replica goes to a free place for a while, or a duplicate gives way and comes back.
Pure arrays: must not know plans, files or networks. K counts experts (l, e) flat.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.errors import UnsafePlan
from planner.problem import Bools, Ints


@dataclass(frozen=True, eq=False)
class Ground:
    """Where replicas may be.

    Attributes
    ----------
    place_node
        Node of each place, int64 ``[P]``.
    slots
        Experts that fit into each place, int64 ``[P]``.
    allowed
        Whether an expert may be kept at a place for a while, bool ``[P, K]``.
    """

    place_node: Ints
    slots: Ints
    allowed: Bools

    def nodes(self, held: Bools) -> Bools:
        """Whether each node holds each expert, bool ``[N, K]``."""
        nodes = np.zeros((int(self.place_node.max(initial=-1)) + 1, held.shape[1]), dtype=bool)
        for place, node in enumerate(self.place_node):
            nodes[node] |= held[place]
        return nodes

    def free(self, held: Bools) -> Ints:
        """Slots left at each place, int64 ``[P]``; negative where a place holds more than it may."""
        return np.asarray(self.slots - held.sum(axis=1))


@dataclass(frozen=True, eq=False)
class Stage:
    """Replicas made and then dropped together, bool ``[P, K]`` each."""

    replicate: Bools
    drop: Bools

    def after(self, held: Bools) -> Bools:
        """Return the placement at the end of the stage."""
        after: Bools = (held | self.replicate) & ~self.drop
        return after


def plan_stages(current: Bools, target: Bools, ground: Ground, *, keep: int = 1) -> list[Stage]:
    """Return the stages from one placement to another, both bool ``[P, K]``; empty where they are equal.

    Parameters
    ----------
    keep
        Nodes that shall hold each expert throughout; where that cannot be, fewer, but never none.

    Raises
    ------
    UnsafePlan
        No free slot and no duplicate anywhere, so that some last replica would have to be dropped.
    """
    for floor in range(keep, 1, -1):
        try:
            return list(_stages(current, target, ground, floor))
        except UnsafePlan:
            continue
    return list(_stages(current, target, ground, 1))


def _stages(current: Bools, target: Bools, ground: Ground, keep: int) -> Iterator[Stage]:
    held, parked = current.copy(), np.zeros_like(current)
    while (held != target).any():
        for stage in _next(held, target, ground, keep, parked):
            yield stage
            held = stage.after(held)


def _next(held: Bools, target: Bools, ground: Ground, keep: int, parked: Bools) -> list[Stage]:
    """Return what to do now: everything, else what fits, else what makes room. Marks what it parks."""
    stage = replicate_and_drop(held, target, ground, keep=keep)
    return [stage] if stage.replicate.any() or stage.drop.any() else _make_room(held, target, ground, keep, parked)


def replicate_and_drop(held: Bools, target: Bools, ground: Ground, *, keep: int = 1) -> Stage:
    """Return the stage that does everything, else what fits; an empty one where nothing can be done."""
    wanted = target & ~held
    free = ground.free(held)
    if (wanted.sum(axis=1) <= np.maximum(free, 0)).all():
        return Stage(wanted, held & ~target)
    short = wanted.sum(axis=1) > free
    replicate = _that_fit(wanted, free, _stuck(held, target, short))
    return Stage(replicate, _droppable(held | replicate, target, ground, keep, short))


def _stuck(held: Bools, target: Bools, short: Bools) -> Bools:
    """Return experts whose obsolete replica stands in the way of others, bool ``[K]``."""
    return np.asarray((held & ~target)[short].any(axis=0))


def _that_fit(wanted: Bools, free: Ints, first: Bools) -> Bools:
    """Pick as many wanted replicas as fit each place, those of experts `first` before others."""
    picked = np.zeros_like(wanted)
    for place in np.flatnonzero((free > 0) & wanted.any(axis=1)):
        experts = np.flatnonzero(wanted[place])
        order = experts[np.argsort(~first[experts], kind="stable")]
        picked[place, order[: free[place]]] = True
    return picked


def _droppable(held: Bools, target: Bools, ground: Ground, keep: int, short: Bools) -> Bools:
    """Return obsolete replicas that nobody needs, bool ``[P, K]``, preferring to clear places that are short."""
    obsolete = held & ~target
    arrived = ground.nodes(held & target)
    drop = obsolete & arrived[ground.place_node]  # the node keeps it, in another tier
    nodes_left: Ints = arrived.sum(axis=0)
    for place in np.argsort(short, kind="stable"):  # places that are not short keep theirs first
        needed = np.asarray(obsolete[place] & ~drop[place] & (nodes_left < keep))
        nodes_left += needed
        drop[place] |= obsolete[place] & ~needed
    return drop


def _make_room(held: Bools, target: Bools, ground: Ground, keep: int, parked: Bools) -> list[Stage]:
    """Park a last replica elsewhere, at a free slot or at one that a duplicate leaves for it."""
    short = (target & ~held).sum(axis=1) > ground.free(held)
    nodes = ground.nodes(held)
    blocking = [(p, k) for p, k in np.argwhere(held & ~target & ~parked).tolist() if short[p]]
    free = ground.free(held) > 0
    for place, expert in blocking:
        for other in np.flatnonzero(free & ground.allowed[:, expert]).tolist():
            if _may_park(ground, nodes, place, other, expert):
                return [_parking(held, place, other, expert, parked)]
    spare = held & (nodes.sum(axis=0) > max(keep, 1))
    full = spare.any(axis=1) & (ground.free(held) == 0)
    for place, expert in blocking:
        for other in np.flatnonzero(full & ground.allowed[:, expert]).tolist():
            if _may_park(ground, nodes, place, other, expert):
                leaving = np.zeros_like(held)
                leaving[other, np.flatnonzero(spare[other])[0]] = True
                return [Stage(np.zeros_like(held), leaving), _parking(held, place, other, expert, parked)]
    raise UnsafePlan(_reasons(held, target, ground))


def _may_park(ground: Ground, nodes: Bools, place: int, other: int, expert: int) -> bool:
    here, there = ground.place_node[place], ground.place_node[other]
    return place != other and bool(here == there or not nodes[there, expert])


def _parking(held: Bools, place: int, other: int, expert: int, parked: Bools) -> Stage:
    replicate, drop = np.zeros_like(held), np.zeros_like(held)
    replicate[other, expert] = drop[place, expert] = parked[other, expert] = True
    return Stage(replicate, drop)


def _reasons(held: Bools, target: Bools, ground: Ground) -> list[str]:
    missing = int((target & ~held).sum())
    return [
        f"no safe order of steps: {missing} replicas still to be made find no free slot, {int(held.sum())} of "
        f"{int(ground.slots.sum())} slots hold replicas that are each the last of their expert or may not be kept "
        "elsewhere; give any node room for one more expert and solve again"
    ]
