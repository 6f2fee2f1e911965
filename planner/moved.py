"""What must be brought where to get from one arrangement to another, and how long that takes.

Decides which replicas and which parts of the trunk are new at a node. Where the trunk of a layer begins to run at a
node that did not run it for anyone, its weights come from one that did. Must not know whether moving pays.
"""

from typing import NamedTuple

import numpy as np

from planner.problem import Bools, Floats, Ints, Problem


class Arranged(NamedTuple):
    """A placement ``[P, L, E]``, and where the trunk runs, int64 ``[I, L]``; None: as in the problem."""

    placed: Bools
    trunk: Ints | None = None


def new_copies(problem: Problem, held: Bools, wanted: Bools) -> list[tuple[int, int]]:
    """List the (expert, place) that a placement ``[P, L, E]`` needs and whose node has no copy in another."""
    fresh = wanted & ~problem.held(held)[problem.place_node]
    return [(int(expert), int(place)) for place, expert in np.argwhere(fresh.reshape(problem.num_places, -1))]


def new_trunk_bytes(problem: Problem, before: Ints, after: Ints) -> Floats:
    """Bytes of trunk that each node needs and does not have, by the node that has them, float64 ``[from, to]``.

    Embedding and head go with the first and the last layer; where weights are tied they come once.
    """
    room, size, layers = problem.room, problem.num_nodes, problem.layers
    ran, runs = (
        (trunk[None] == np.arange(size)[:, None, None]).any(axis=1) for trunk in (before, after)
    )  # [N, L] each
    found = np.zeros((size, size))
    for node, layer in np.argwhere(runs & ~ran).tolist():
        sources = np.flatnonzero(ran[:, layer])
        source = int(sources[problem.transfer_s[sources, node].argmin()])
        ends = (layer == 0) * room.input_bytes + (layer == layers - 1) * room.head_bytes
        found[source, node] += int(room.layer_bytes[layer]) + ends
    for node in np.flatnonzero((runs & ~ran)[:, 0] & (runs & ~ran)[:, -1]).tolist():
        twice = room.input_bytes + room.head_bytes - room.both_bytes
        found[found[:, node].argmax(), node] -= twice
    return found


def moved_bytes(problem: Problem, now: Arranged, then: Arranged) -> int:
    """Bytes that come to nodes: new replicas, new trunk."""
    copies = sum(int(problem.place_bytes[place]) for _, place in new_copies(problem, now.placed, then.placed))
    return copies + int(_new_trunk(problem, now, then).sum())


def migration_seconds(problem: Problem, now: Arranged, then: Arranged) -> float:
    """Seconds of bringing what is new, each over the best link from a present holder; 0 where nobody has it.

    From one in the same precision; where there is none, a store sends it, which is taken to be as near as a holder.
    Trunk takes as long as as many experts of its bytes.
    """
    holders = problem.held(now.placed).reshape(problem.num_nodes, -1)
    total, seconds = 0.0, [problem.seconds_to(place) for place in range(problem.num_places)]
    for expert, place in new_copies(problem, now.placed, then.placed):
        sources = np.flatnonzero(holders[:, expert])
        alike = sources[problem.sends(sources, int(problem.place_node[place]))]
        total += float(seconds[place][alike if len(alike) else sources].min(initial=np.inf)) if len(sources) else 0.0
    return total + float((_new_trunk(problem, now, then) / problem.expert_bytes * problem.transfer_s).sum())


def _new_trunk(problem: Problem, now: Arranged, then: Arranged) -> Floats:
    before, after = (problem.trunk_node if one.trunk is None else one.trunk for one in (now, then))
    return new_trunk_bytes(problem, before, after)
