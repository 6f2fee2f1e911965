"""What the heuristics share: placements by node, mending what a heuristic does not know, tiers, and the Result.

A heuristic decides which nodes hold which expert, bool ``[N, K]``. Pins, bans and required replicas are none of its
business as published, so they are put right afterwards with as little change as possible.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.objective import ObjectiveName
from planner.problem import Bools, Floats, Ints, Problem
from planner.solvers.base import Result, SolveStatus, StopReason, nearest_cost


def node_demand(problem: Problem) -> Floats:
    """Return calls per second that each node's trunk asks for, float64 ``[N, K]``; of all tokens where none enter."""
    demand = problem.caller_demand.reshape(problem.num_nodes, -1)
    everywhere = demand.sum(axis=0)
    quiet = demand.sum(axis=1) == 0
    return np.where(quiet[:, None], everywhere[None, :], demand)


def run_strategy(
    name: str, choose: Callable[[Problem], Bools], problem: Problem, *, objective: ObjectiveName
) -> Result:
    """Run a heuristic, mend its choice, fill tiers, and report it as a Result without bound."""
    start = time.monotonic()
    held = mend(problem, choose(problem))
    placed = None if held is None else fill_tiers(problem, held)
    return Result(
        solver=name,
        status=SolveStatus.UNKNOWN if placed is None else SolveStatus.FEASIBLE,
        stop_reason=StopReason.FINISHED,
        seconds=time.monotonic() - start,
        placed=placed,
        objective=None if placed is None else nearest_cost(problem, placed, objective),
        detail="" if placed is not None else "its placement cannot be mended to keep pins, bans and replicas",
    )


def fill_tiers(problem: Problem, held: Bools) -> Bools:
    """Put each node's experts into its tiers, those its tokens ask for most into the fastest; bool ``[P, L, E]``."""
    demand = node_demand(problem)
    placed = np.zeros((problem.num_places, held.shape[1]), dtype=bool)
    for node in range(problem.num_nodes):
        experts = np.flatnonzero(held[node])
        order = experts[np.argsort(-demand[node, experts], kind="stable")]
        for place in np.flatnonzero(problem.place_node == node):
            here, order = order[: problem.slots[place]], order[problem.slots[place] :]
            placed[place, here] = True
    return placed.reshape(problem.num_places, problem.layers, problem.experts)


@dataclass(frozen=True, eq=False)
class _Rules:
    """What a choice must keep, arrays ``[N]`` and ``[N, K]``, and what each replica is worth to its node."""

    slots: Ints
    banned: Bools
    pinned: Bools
    demand: Floats
    required: int


def mend(problem: Problem, chosen: Bools) -> Bools | None:
    """Return the choice ``[N, K]`` with pins, bans, memory and required replicas kept; None where that fails."""
    banned, pinned = (array.reshape(problem.num_nodes, -1) for array in (problem.banned, problem.pinned))
    rules = _Rules(problem.node_slots, banned, pinned, node_demand(problem), problem.required)
    held = (chosen & ~banned) | pinned
    for node in range(problem.num_nodes):
        _shed(held, node, rules)
    while (short := np.flatnonzero(held.sum(axis=0) < problem.required)).size:
        if not _place(held, int(short[0]), rules):
            return None
    return held


def _shed(held: Bools, node: int, rules: _Rules) -> None:
    """Drop what does not fit a node, duplicates first, then what its tokens ask for least; modifies `held`."""
    spare = np.flatnonzero(held[node] & ~rules.pinned[node])
    surplus = max(int(held[node].sum() - rules.slots[node]), 0)
    copies = held[:, spare].sum(axis=0)
    order = np.lexsort((rules.demand[node, spare], copies <= rules.required))
    held[node, spare[order[:surplus]]] = False


def _place(held: Bools, expert: int, rules: _Rules) -> bool:
    """Bring one more replica of `expert` somewhere, pushing others along if need be; modifies `held`.

    Breadth first over chains "expert takes the place of another, which takes the place of a third …" that end at a
    free slot or at a duplicate, so that as few replicas as possible are touched.
    """
    seen = np.zeros(len(rules.slots), dtype=bool)
    queue: deque[tuple[int, tuple[tuple[int, int], ...]]] = deque([(expert, ())])
    while queue:
        homeless, chain = queue.popleft()
        open_to = np.flatnonzero(~held[:, homeless] & ~rules.banned[:, homeless] & ~seen)
        room = open_to[held[open_to].sum(axis=1) < rules.slots[open_to]]
        if room.size:
            best = int(room[rules.demand[room, homeless].argmax()])
            _push(held, (*chain, (best, homeless)))
            return True
        swap = _cheapest_duplicate(held, homeless, open_to, rules)
        if swap is not None:
            node, leaving = swap
            _push(held, (*chain, (node, homeless)))
            held[node, leaving] = False
            return True
        for node in open_to.tolist():
            seen[node] = True
            movable = np.flatnonzero(held[node] & ~rules.pinned[node])
            queue.extend((int(k), (*chain, (node, homeless))) for k in movable)
    return False


def _push(held: Bools, chain: tuple[tuple[int, int], ...]) -> None:
    """Give each (node, expert) of a chain its replica; who stood there follows in the chain. Modifies `held`."""
    for (node, entering), following in zip(chain, (*chain[1:], None), strict=True):
        held[node, entering] = True
        if following is not None:
            held[node, following[1]] = False


def _cheapest_duplicate(held: Bools, entering: int, open_to: Ints, rules: _Rules) -> tuple[int, int] | None:
    """Return the (node, expert) whose replica is missed least when `entering` takes its slot."""
    droppable = held[open_to] & ~rules.pinned[open_to] & (held.sum(axis=0) > rules.required)
    if not droppable.any():
        return None
    loss = np.where(droppable, rules.demand[open_to] - rules.demand[open_to, entering][:, None], np.inf)
    row, leaving = np.unravel_index(int(loss.argmin()), loss.shape)
    return int(open_to[row]), int(leaving)
