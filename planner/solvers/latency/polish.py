"""Exchanges of single experts, scored on tables of what every event still misses.

Decides descent moves. Must not know prices: memory is a limit here. Tables of one layer say what it would gain to add,
and cost to drop, each expert at each place; changes in different layers add up exactly, a pair in one layer is
evaluated before it is accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.solvers.latency.holders import Repair
from planner.solvers.latency.instance import Bools, Floats, Ints, LatencyInstance
from planner.solvers.latency.patterns import Layer

_TRIES = 6  # candidates of a kind that are evaluated exactly before the kind is given up


class LayerTable:
    """How many experts each event misses, and what a change of one expert would do. `change` modifies it."""

    def __init__(self, layer: Layer, hold: Bools) -> None:
        self.layer, self.hold = layer, hold.copy()
        self.missing = layer.levels.missing(hold)
        self.counts = [
            [flags[experts].sum(axis=0) for flags, experts in zip(row, layer.experts, strict=True)]
            for row in self.missing
        ]
        self.wait = layer.wait(hold)
        self._stale = True
        self._gain = self._loss = np.zeros(hold.shape)

    def change(self, expert: int, holders: Bools) -> None:
        """Give one expert other holders, bool ``[P]``."""
        self.hold[expert] = holders
        missing = self.layer.levels.missing(self.hold[[expert]])[:, :, 0]
        for question, ingress in np.argwhere(missing != self.missing[:, :, expert]):
            hit = (self.layer.experts[ingress] == expert).any(axis=0)
            sign = 1 if missing[question, ingress] else -1
            counts = self.counts[question][ingress]
            before = counts[hit] > 0
            counts[hit] += sign
            moved = self.layer.weight[ingress][hit] @ ((counts[hit] > 0).astype(np.float64) - before)
            self.wait += float(self.layer.levels.step[question, ingress] * moved)
        self.missing[:, :, expert] = missing
        self._stale = True

    def scores(self) -> tuple[Floats, Floats]:
        """Seconds per second that adding an expert at a place saves, and dropping it costs, float64 ``[E, P]`` each."""
        if self._stale:
            self._gain, self._loss = self._scored()
            self._stale = False
        return self._gain, self._loss

    def _scored(self) -> tuple[Floats, Floats]:
        levels = self.layer.levels
        gain, loss = np.zeros(self.hold.shape), np.zeros(self.hold.shape)
        second = self._rank_without()  # [P, I, E]
        for question, ingress in np.argwhere(levels.step > 0):
            experts, weight = self.layer.experts[ingress], self.layer.weight[ingress]
            counts, missing = self.counts[question][ingress], self.missing[question, ingress]
            alone = self._carried(experts, weight, counts == 1) * missing
            whole = self._carried(experts, weight, counts == 0) * ~missing
            step = levels.step[question, ingress]
            gain += step * np.outer(alone, levels.rank[ingress] <= question)
            loss += step * whole[:, None] * (second[:, ingress] > question).T
        gain[self.hold] = 0.0
        loss[~self.hold] = 0.0
        return gain, loss

    def _rank_without(self) -> Ints:
        """Level of the nearest holder if a place dropped its replica, int64 ``[P, I, E]``."""
        levels, places = self.layer.levels, self.hold.shape[1]
        beyond = levels.num_questions + 1
        rank = np.where(self.hold[None], levels.rank[:, None, :], beyond)  # [I, E, P]
        others = np.repeat(rank[None], places, axis=0)
        others[np.arange(places), :, :, np.arange(places)] = beyond
        return np.asarray(others.min(axis=3))

    def _carried(self, experts: np.ndarray, weight: Floats, chosen: Bools) -> Floats:
        part = experts[:, chosen]
        counted = np.bincount(part.ravel(), np.tile(weight[chosen], len(part)), minlength=self.layer.num_experts)
        return counted.astype(np.float64)


@dataclass(frozen=True)
class Move:
    """New holders of some experts: (layer, expert, place, held)."""

    changes: tuple[tuple[int, int, int, bool], ...]
    estimate: float


class Polish:
    """Descends from a feasible placement by adds, swaps within a place and exchanges between two. Modifies itself."""

    def __init__(self, instance: LatencyInstance, layers: list[Layer], repairs: list[Repair], hold: Bools) -> None:
        self.instance, self.repairs = instance, repairs
        self.tables = [LayerTable(layer, held) for layer, held in zip(layers, hold, strict=True)]
        self.allowed = np.stack([repair.allowed for repair in repairs])
        self.fixed = np.stack([repair.forced for repair in repairs])
        self.free = instance.capacity - hold.sum(axis=(0, 1))
        self.least = 1e-9 * (sum(layer.range() for layer in layers) or 1.0)

    @property
    def hold(self) -> Bools:
        """Placement, bool ``[L, E, P]``."""
        return np.stack([table.hold for table in self.tables])

    @property
    def wait(self) -> float:
        """Seconds waited per second."""
        return sum(table.wait for table in self.tables)

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Apply improving moves until none is left."""
        while not should_stop() and self.improve():
            pass

    def improve(self) -> bool:
        """Apply one improving move; False where none was found."""
        moves = sorted(self._moves(), key=lambda move: move.estimate)
        return any(self._try(move) for move in moves)

    def _moves(self) -> list[Move]:
        hold = self.hold
        gain, loss = (np.stack(part) for part in zip(*(table.scores() for table in self.tables), strict=True))
        siblings = self.repairs[0].siblings
        node_free = ~(hold @ siblings)
        addable = self.allowed & node_free & (gain > self.least)
        droppable = hold & ~self.fixed & (hold.sum(axis=2, keepdims=True) > self.instance.required)
        moves = []
        for place in range(hold.shape[2]):
            adds = _lowest(np.where(addable[:, :, place], -gain[:, :, place], np.inf))
            drops = _lowest(np.where(droppable[:, :, place], loss[:, :, place], np.inf))
            if self.free[place] > 0:
                moves += [Move(((*key, place, True),), value) for key, value in adds[:_TRIES]]
            else:
                moves += _pairs(adds, drops, place)
            for other in range(hold.shape[2]):
                if other != place:
                    moves += self._exchanges(hold, gain, loss, place, other)
        return [move for move in moves if move.estimate < -self.least]

    def _exchanges(self, hold: Bools, gain: Floats, loss: Floats, place: int, other: int) -> list[Move]:
        """One expert goes from `other` to `place`, and one back where `place` is full."""
        forth = _lowest(np.where(self._may_go(hold, other, place), loss[:, :, other] - gain[:, :, place], np.inf))
        there = [(_relocation(key, other, place), value) for key, value in forth[:_TRIES]]
        if self.free[place] > 0:
            return [Move(changes, value) for changes, value in there]
        back = _lowest(np.where(self._may_go(hold, place, other), loss[:, :, place] - gain[:, :, other], np.inf))
        if place > other:
            return []
        pairs = [(one, two) for one in there for two in [(_relocation(k, place, other), v) for k, v in back[:_TRIES]]]
        moves = [Move(one[0] + two[0], one[1] + two[1]) for one, two in pairs if one[0][0][:2] != two[0][0][:2]]
        return sorted(moves, key=lambda move: move.estimate)[:_TRIES]

    def _may_go(self, hold: Bools, source: int, target: int) -> Bools:
        """Whether an expert may leave one place for another, bool ``[L, E]``."""
        siblings = self.repairs[0].siblings
        others = hold[:, :, siblings[target] & (np.arange(hold.shape[2]) != source)].any(axis=2)
        return np.asarray(hold[:, :, source] & ~self.fixed[:, :, source] & self.allowed[:, :, target] & ~others)

    def _try(self, move: Move) -> bool:
        """Apply a move; take it back where it does not improve."""
        before = self.wait
        undo = self._apply(move.changes)
        if self.wait < before - self.least:
            for _, _, place, held in move.changes:
                self.free[place] += -1 if held else 1
            return True
        for layer, expert, holders in reversed(undo):
            self.tables[layer].change(expert, holders)
        return False

    def _apply(self, changes: tuple[tuple[int, int, int, bool], ...]) -> list[tuple[int, int, Bools]]:
        undo = []
        for layer, expert, place, held in changes:
            table = self.tables[layer]
            undo.append((layer, expert, table.hold[expert].copy()))
            holders = table.hold[expert].copy()
            holders[place] = held
            table.change(expert, holders)
        return undo


def _relocation(key: tuple[int, int], source: int, target: int) -> tuple[tuple[int, int, int, bool], ...]:
    return ((*key, target, True), (*key, source, False))


def _lowest(values: Floats) -> list[tuple[tuple[int, int], float]]:
    """Return the few lowest finite entries of ``[L, E]`` with their keys."""
    flat = values.ravel()
    few = np.argpartition(flat, min(_TRIES, flat.size - 1))[: _TRIES + 1]
    few = few[np.argsort(flat[few], kind="stable")]
    keys = [(int(index) // values.shape[1], int(index) % values.shape[1]) for index in few]
    return [(key, float(flat[index])) for key, index in zip(keys, few, strict=True) if np.isfinite(flat[index])]


def _pairs(
    adds: list[tuple[tuple[int, int], float]], drops: list[tuple[tuple[int, int], float]], place: int
) -> list[Move]:
    moves = [
        Move(((*add, place, True), (*drop, place, False)), gained + lost)
        for add, gained in adds
        for drop, lost in drops
        if add != drop
    ]
    return sorted(moves, key=lambda move: move.estimate)[:_TRIES]
