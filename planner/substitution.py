"""Placement that knows that agents may give up a little router mass: exchanges of experts, scored under substitution.

Decides which of the placements that a solver or a strategy found is the best to go on from, and exchanges experts
within nodes while that leaves fewer (token, layer) events waiting. An event is local if all of its experts are, or if
residents behind the top K can stand in for *all* that are missing within a share of the router's mass (RUNTIME.md, "all
or none": the rule that agents follow, `runtime.policy.routing.MassBudget`, with one share for all layers). Exact
waits want whole layers in one place, where nothing can stand in for anything; this wants some of every layer. Must not
know solvers. What it counts are waits, not their lengths.

Axes: T tokens, L layers, E experts, K top-k, C candidates (C > K, else nothing can stand in), N nodes, P places, V
variants of a layer that are looked at together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.demand import Trace
from planner.problem import Bools, Floats, Problem
from schemas.topology import TIERS

SHARE_OF_BUDGET: Final = 2.0
"""Share of the top-K mass that a rise of perplexity buys, per unit of it: what calibrations of small models found."""
_MOST_TOKENS: Final = 4096  # of each ingress: a table takes as long as there are tokens, and is made hundreds of times
_DISK: Final = TIERS.index("disk")
_TRIES: Final = 4  # pairs of one node and layer that are looked at exactly

Scores = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Ranked:
    """The recorded events of one ingress in one layer.

    Attributes
    ----------
    ids
        Candidates, best first, int16 ``[T, C]``.
    mass
        Their scores as shares of the top K's sum, float32 ``[T, C]``.
    """

    ids: NDArray[np.int16]
    mass: Scores
    top_k: int

    def waiting(self, resident: Bools, share: float) -> Floats:
        """Share of events that wait where a layer has these residents, float64 ``[V]``, from bool ``[V, E]``."""
        here = resident[:, self.ids]  # [V, T, C]
        missing = ~here[..., : self.top_k]
        behind, mass = here[..., self.top_k :], self.mass[:, self.top_k :]
        place = behind.cumsum(axis=-1)
        spare = np.full((*here.shape[:2], self.top_k + 1), -np.inf, dtype=np.float32)  # [..., j]: of the j-th best
        for j in range(min(self.top_k, mass.shape[1])):
            found = behind & (place == j + 1)
            spare[..., j] = np.where(found.any(axis=-1), (found * mass).sum(axis=-1), -np.inf)
        turn = missing[..., ::-1].cumsum(axis=-1)[..., ::-1] - 1  # the lowest score chooses first
        stand_in = np.take_along_axis(spare, turn, axis=-1)  # where nothing is missing yet: the last column
        own = self.mass[:, : self.top_k]
        cost = np.where(missing, np.maximum(own - stand_in, 0) * own, 0.0).sum(axis=-1)
        return np.asarray((cost > share).mean(axis=1), dtype=np.float64)


class Sparing:
    """Waits of a placement under substitution, and exchanges that leave fewer. Modifies itself.

    Parameters
    ----------
    ranked
        By ingress and layer.
    share
        Of the top-K mass, that may be given up in a layer.
    placed
        To begin with, bool ``[P, L, E]``.
    """

    def __init__(self, problem: Problem, ranked: Sequence[Sequence[Ranked]], share: float, placed: Bools) -> None:
        self.placed = placed.copy()
        self._problem, self._ranked, self._share = problem, ranked, share
        self._at_hand = problem.place_tier != _DISK  # [P]
        self._price = _wait_seconds(problem)
        self._tables: dict[tuple[int, int], tuple[float, Floats, Floats]] = {}

    @property
    def cost(self) -> float:
        """Seconds per second that tokens wait."""
        return float(sum(self._table(n, layer)[0] for n in self._nodes for layer in range(self._problem.layers)))

    @property
    def share_waiting(self) -> float:
        """Share of events that wait, mean over ingresses."""
        problem = self._problem
        shares = [
            self._ranked[i][layer].waiting(self._resident(int(problem.trunk_node[i, layer]), layer)[None], self._share)[
                0
            ]
            for i in range(len(problem.ingress_node))
            for layer in range(problem.layers)
        ]
        return float(np.mean(shares))

    @property
    def _nodes(self) -> list[int]:
        return [int(node) for node in np.unique(self._problem.trunk_node)]

    def descend(self, should_stop: Callable[[], bool]) -> None:
        """Exchange experts while that helps and there is time. Modifies."""
        least = 1e-9 * max(self.cost, 1e-12)
        places = [p for p in np.flatnonzero(self._at_hand).tolist() if self._problem.place_node[p] in self._nodes]
        is_moving = True
        while is_moving:
            is_moving = False
            for place in places:
                while not should_stop() and self._exchange(place, least):
                    is_moving = True

    def _exchange(self, place: int, least: float) -> bool:
        """Make the best exchange at a place; False where none helps."""
        gain, loss = self._scores(place)
        adds, drops = _best(gain, _TRIES), _best(-loss, _TRIES)
        pairs = [(gain[add] - loss[drop], add, drop) for add in adds for drop in drops]
        for value, add, drop in sorted(pairs, key=lambda pair: -pair[0]):
            if not value > least:
                return False
            before = self.cost
            self._set(place, add, held=True)
            self._set(place, drop, held=False)
            if add[0] != drop[0] or before - self.cost > least:
                return True
            self._set(place, add, held=False)
            self._set(place, drop, held=True)
        return False

    def _scores(self, place: int) -> tuple[Floats, Floats]:
        """Seconds per second that adding an expert at a place saves, and dropping it costs, float64 ``[L, E]`` each.

        Minus infinity, and infinity, where that may not be.
        """
        problem, node = self._problem, int(self._problem.place_node[place])
        tables = [self._table(node, layer) for layer in range(problem.layers)]
        gain = np.stack([table[1] for table in tables])
        loss = np.stack([table[2] for table in tables])
        on_node = self.placed[problem.place_node == node].any(axis=0)
        gain[on_node | problem.banned[node]] = -np.inf
        held = np.stack([self.placed[problem.place_node == n].any(axis=0) for n in range(problem.num_nodes)])
        others = np.delete(held, node, axis=0), np.delete(problem.domain, node)
        domains = np.stack([others[0][others[1] == d].any(axis=0) for d in np.unique(others[1])]).sum(axis=0)
        loss[~self.placed[place] | problem.pinned[node] | (domains < problem.required)] = np.inf
        return gain, loss

    def _set(self, place: int, key: tuple[int, int], *, held: bool) -> None:
        self.placed[place, key[0], key[1]] = held
        self._tables.pop((int(self._problem.place_node[place]), key[0]), None)

    def _resident(self, node: int, layer: int) -> Bools:
        """Whether each expert of a layer is at hand on a node, bool ``[E]``."""
        return np.asarray(self.placed[(self._problem.place_node == node) & self._at_hand, layer].any(axis=0))

    def _table(self, node: int, layer: int) -> tuple[float, Floats, Floats]:
        """Seconds per second that tokens wait at a node in a layer, what each expert would save, and would cost."""
        found = self._tables.get((node, layer))
        if found is None:
            problem, resident = self._problem, self._resident(node, layer)
            flipped = np.concatenate([resident[None], resident ^ np.eye(problem.experts, dtype=bool)])  # [1 + E, E]
            cost = np.zeros(len(flipped))
            for ingress in np.flatnonzero(problem.trunk_node[:, layer] == node).tolist():
                waiting = self._ranked[ingress][layer].waiting(flipped, self._share)
                cost += problem.tokens_per_s[ingress] * self._price[node] * waiting
            found = self._tables[node, layer] = (float(cost[0]), cost[0] - cost[1:], cost[1:] - cost[0])
        return found


def ranked_events(problem: Problem, traces: Sequence[Trace]) -> list[list[Ranked]]:
    """Return the candidates of each ingress's events by layer, spread evenly over the trace where it is long."""
    found = []
    for trace in traces:
        rows = np.linspace(0, len(trace.sequence) - 1, min(len(trace.sequence), _MOST_TOKENS)).astype(np.int64)
        ids, scores = trace.expert_ids[rows], trace.scores[rows].astype(np.float32)
        mass = scores / np.maximum(scores[:, :, : problem.top_k].sum(axis=2, keepdims=True), 1e-6)
        found.append([Ranked(ids[:, layer], mass[:, layer], problem.top_k) for layer in range(problem.layers)])
    return found


def _wait_seconds(problem: Problem) -> Floats:
    """Seconds of a call of each node to another's fastest tier, on average, float64 ``[N]``."""
    away = problem.place_node[None, :] != np.arange(problem.num_nodes)[:, None]
    fast = away & (problem.place_tier != _DISK)[None, :]
    return np.asarray((problem.cost_s * fast).sum(axis=1) / np.maximum(fast.sum(axis=1), 1))


def _best(values: Floats, count: int) -> list[tuple[int, int]]:
    """Return the (layer, expert) of the highest finite values."""
    order = np.argsort(-values, axis=None, kind="stable")[:count]
    return [
        (int(layer), int(expert))
        for layer, expert in zip(*np.unravel_index(order, values.shape), strict=True)
        if np.isfinite(values[layer, expert])
    ]
