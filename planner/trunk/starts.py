"""Trunks worth trying: at the ingress, and one path for all ingresses over every set of nodes, by estimate.

Decides which of them a search begins with. Must not know how experts are placed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.problem import Ints, Problem
from planner.trunk.rings import MOST_NODES, Ring, all_rings, grown_rings, turns
from planner.trunk.spans import Spans, find_spans, path_of, share_layers, share_layers_wrapped
from planner.trunk.trials import STAY

_SEEDS: Final = 12  # nodes that rings grow from where they are too many to look at all sets
_MOST_WRAPPED: Final = 5  # nodes of rings that may begin and end at one node


@dataclass(frozen=True, eq=False)
class Start:
    """A trunk to begin with, int64 ``[I, L]``, and the seconds a token is expected to take; None: not estimated."""

    name: str
    trunk_node: Ints
    estimate_s: float | None = None


def find_starts(problem: Problem, most: int) -> list[Start]:
    """Return trunks that fit, the trunk at the ingresses first where it does, then up to `most` by estimate."""
    shared = _by_estimate(problem, most)
    stay = [Start(STAY, problem.stay_node)] if problem.room.fits(problem.stay_node) else []
    return [*stay, *shared]


def _by_estimate(problem: Problem, most: int) -> list[Start]:
    """Best share of layers of each ring, cheapest first; half of those kept hold whole layers where that is possible.

    A ring is left out once it cannot be among the best, whatever its nodes hold.
    """
    spans, ingresses = (find_spans(problem), find_spans(problem, wrapped=True)), len(problem.ingress_node)
    fastest = problem.compute_s
    rings = sorted(_rings(problem), key=lambda ring: ring.hops_s + float(fastest[list(ring.nodes)].min(axis=0).sum()))
    found: dict[tuple[int, ...], Start] = {}
    kept: dict[str, list[float]] = {"whole": [], "mixed": []}
    for ring in rings:
        least = ring.hops_s + float(fastest[list(ring.nodes)].min(axis=0).sum())
        for kind, costs in kept.items():
            if len(costs) >= most and least >= sorted(costs)[most - 1]:
                continue
            for seconds, path in _shared(spans, ring, kind, problem.layers):
                name = f"{kind} layers over {', '.join(problem.node_ids[node] for node in ring.nodes)}"
                start = Start(name, np.tile(path, (ingresses, 1)), seconds + ring.hops_s)
                if _better(start, found.get(tuple(path.tolist()))):
                    found[tuple(path.tolist())] = start
                costs.append(seconds + ring.hops_s)
    ordered = sorted(found.values(), key=_estimate)
    whole = [start for start in ordered if start.name.startswith("whole")][: -(-most // 2)]
    return sorted([*whole, *[start for start in ordered if start not in whole][: most - len(whole)]], key=_estimate)


def _estimate(start: Start) -> float:
    return np.inf if start.estimate_s is None else start.estimate_s


def _better(start: Start, before: Start | None) -> bool:
    return before is None or _estimate(start) < _estimate(before)


def _rings(problem: Problem) -> list[Ring]:
    if problem.num_nodes <= MOST_NODES:
        return all_rings(problem.hop_s)
    most = min(problem.num_nodes, problem.layers)
    memory = problem.room.room_bytes.sum(axis=1)
    largest = np.argsort(-memory, kind="stable")[: _SEEDS // 2]
    quickest = np.argsort(problem.compute_s.sum(axis=1), kind="stable")[: _SEEDS // 2]
    return grown_rings(
        problem.hop_s, np.unique(np.concatenate([largest, quickest, problem.ingress_node[:_SEEDS]])), most
    )


def _shared(spans: tuple[Spans, Spans], ring: Ring, kind: str, layers: int) -> Iterator[tuple[float, Ints]]:
    """Yield the best turn of a ring with the seconds of its spans, and the best that begins and ends at one node."""
    if len(ring.nodes) > layers:
        return
    table, ends = (one.whole_s if kind == "whole" else one.mixed_s for one in spans)
    best: tuple[float, tuple[int, ...], tuple[int, ...]] = (np.inf, (), ())
    for nodes in turns(ring):
        seconds, behind = share_layers([table[node] for node in nodes])
        if seconds < best[0]:
            best = (seconds, nodes, behind)
    if np.isfinite(best[0]):
        yield best[0], path_of(best[1], best[2])
    if 1 < len(ring.nodes) <= _MOST_WRAPPED:
        ways = [
            (*share_layers_wrapped(ends[nodes[0]], [table[node] for node in nodes[1:]]), nodes) for nodes in turns(ring)
        ]
        seconds, changes, nodes = min(ways)
        if seconds < best[0]:
            yield seconds, path_of([*nodes, nodes[0]], [*changes, layers])
