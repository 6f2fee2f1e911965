"""Trunks worth trying: at the ingress, and one path for all ingresses over every set of nodes, by estimate.

Decides which of them a search begins with. Must not know how experts are placed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.problem import Floats, Ints, Problem
from planner.trunk.bound import Parts
from planner.trunk.rings import MOST_NODES, Ring, all_rings, grown_rings, turns
from planner.trunk.spans import find_spans, path_of, share_layers, share_layers_wrapped
from planner.trunk.trials import STAY

_SEEDS: Final = 12  # nodes that rings grow from where they are too many to look at all sets
_MOST_WRAPPED: Final = 5  # nodes of rings that may begin and end at one node


@dataclass(frozen=True, eq=False)
class Start:
    """A trunk to begin with, int64 ``[I, L]``, and the seconds a token is expected to take; None: not estimated."""

    name: str
    trunk_node: Ints
    estimate_s: float | None = None


def find_starts(problem: Problem, most: int, blame: Floats, late: Callable[[], bool] = lambda: False) -> list[Start]:
    """Return trunks that fit, the trunk at the ingresses first where it does, then up to `most` by estimate.

    Parameters
    ----------
    blame
        Of experts for waits (see `bound`), ``[I, L, E]``.
    late
        Whether to leave it at what was found.
    """
    stay = [Start(STAY, problem.stay_node)] if problem.room.fits(problem.stay_node) else []
    ordered = sorted(_by_estimate(problem, most, blame, late), key=_estimate)
    whole = [start for start in ordered if start.name.startswith("whole")][: -(-most // 2)]
    mixed = [start for start in ordered if start not in whole]
    return [*stay, *sorted([*whole, *mixed[: most - len(whole)]], key=_estimate)]


def _by_estimate(problem: Problem, most: int, blame: Floats, late: Callable[[], bool]) -> Iterable[Start]:
    """Share layers best over each ring, those first that are bounded lowest, as long as any may be among the best.

    Of the best rings those that begin and end at one node are looked at, too.
    """
    spans, wrapped = find_spans(problem), find_spans(problem, wrapped=True)
    found: dict[bytes, Start] = {}
    for kind in ("whole", "mixed"):
        plain, ends = (one.whole_s if kind == "whole" else one.mixed_s for one in (spans, wrapped))
        tried: list[tuple[float, float, Ring]] = []
        for floor, ring in _by_floor(problem, blame, whole=kind == "whole"):
            if len(tried) >= most and (late() or floor >= sorted(tried)[most - 1][0]):
                break
            way = _shared(plain, ring)
            tried.append((way.seconds, floor, ring))
            _keep(found, problem, kind, way)
        for _, _, ring in sorted(tried)[:most]:
            if 1 < len(ring.nodes) <= _MOST_WRAPPED and not late():
                _keep(found, problem, kind, _wrapped(plain, ends, ring))
    return found.values()


@dataclass(frozen=True)
class _Way:
    """A way to share layers over a ring; `path` is None where none fits."""

    ring: Ring
    seconds: float
    path: Ints | None


def _keep(found: dict[bytes, Start], problem: Problem, kind: str, way: _Way) -> None:
    """Enter a way under its path. Modifies `found`."""
    if way.path is None:
        return
    name = f"{kind} layers over {', '.join(problem.node_ids[node] for node in way.ring.nodes)}"
    start = Start(name, np.tile(way.path, (len(problem.ingress_node), 1)), way.seconds)
    known = found.get(way.path.tobytes())
    if known is None or _estimate(start) < _estimate(known):
        found[way.path.tobytes()] = start


def _by_floor(problem: Problem, blame: Floats, *, whole: bool) -> list[tuple[float, Ring]]:
    """Rings with what they cost at least, cheapest first; with `whole`, those that all experts fit into."""
    parts, weights = Parts(problem, blame), problem.tokens_per_s / problem.tokens_per_s.sum()
    least = problem.layers * problem.experts if whole else 0
    floors = []
    for ring in _rings(problem):
        nodes = np.array(ring.nodes)
        if parts.can_run(nodes) and parts.slots(nodes) >= least:
            floors.append((ring.hops_s + float(weights @ parts.within(nodes)), ring))
    return sorted(floors, key=lambda pair: pair[0])


def _estimate(start: Start) -> float:
    return np.inf if start.estimate_s is None else start.estimate_s


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


def _shared(table: Floats, ring: Ring) -> _Way:
    """Return the best turn of a ring, from seconds of spans ``[N, L + 1, L + 1]``."""
    best = _Way(ring, np.inf, None)
    for nodes in turns(ring):
        seconds, ends = share_layers([table[node] for node in nodes])
        if seconds + ring.hops_s < best.seconds:
            best = _Way(ring, seconds + ring.hops_s, path_of(nodes, ends))
    return best


def _wrapped(table: Floats, ends: Floats, ring: Ring) -> _Way:
    """Return the best turn of a ring that begins and ends at one node."""
    best = _Way(ring, np.inf, None)
    for nodes in turns(ring):
        seconds, changes = share_layers_wrapped(ends[nodes[0]], [table[node] for node in nodes[1:]])
        if seconds + ring.hops_s < best.seconds:
            path = path_of([*nodes, nodes[0]], [*changes, table.shape[1] - 1])
            best = _Way(ring, seconds + ring.hops_s, path)
    return best
