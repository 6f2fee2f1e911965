"""Recorded events, merged and cut into yes-or-no questions.

Decides the form in which bound and search see the events. Must not know prices or placements beyond one layer.

A wait takes few values: the distinct costs of an ingress, its *levels*. With the levels c_0 < c_1 < ... of ingress i,
    max over e of c  =  c_0 + sum over j of (c_{j+1} - c_j) * [some chosen expert is beyond level j]
so each (level j, ingress i) is a *question* with two answers, and an event costs something in each question in which
at least one of its experts is *missing* (its nearest holder lies beyond level j). Identical events are merged.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.solvers.latency.instance import Bools, Events, Floats, Ints, LatencyInstance

Indices = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Levels:
    """The distinct costs of one layer.

    Attributes
    ----------
    rank
        Level of each place for each ingress, int64 ``[I, P]``.
    base
        Cost at level 0, seconds, float64 ``[I]``.
    step
        What it costs to be beyond level j, seconds, float64 ``[J, I]``; 0 where an ingress has fewer levels.
    """

    rank: Ints
    base: Floats
    step: Floats

    @property
    def num_questions(self) -> int:
        """J, levels beyond which an event may be."""
        return len(self.step)

    def missing(self, hold: Bools) -> Bools:
        """Whether the nearest holder is beyond each level, bool ``[J, I, E]``, from one layer's ``[E, P]``."""
        rank = np.where(hold[None], self.rank[:, None, :], self.num_questions + 1).min(axis=2)
        return np.asarray(rank[None] > np.arange(self.num_questions)[:, None, None])


def levels_of(cost_s: Floats, max_levels: int | None = None) -> Levels:
    """Sort the costs ``[I, P]`` of one layer into levels.

    With `max_levels` the nearest levels are merged, the upper one counted as the lower: no wait grows, so that a lower
    bound stays one.
    """
    per_ingress = [_merged(np.unique(row), max_levels) for row in cost_s]
    questions = max(len(values) for values in per_ingress) - 1
    step = np.zeros((questions, len(cost_s)))
    rank = np.zeros(cost_s.shape, dtype=np.int64)
    for ingress, values in enumerate(per_ingress):
        step[: len(values) - 1, ingress] = np.diff(values)
        rank[ingress] = np.searchsorted(values, cost_s[ingress], side="right") - 1
    return Levels(rank, np.array([values[0] for values in per_ingress]), step)


def _merged(values: Floats, max_levels: int | None) -> Floats:
    while max_levels is not None and len(values) > max_levels:
        values = np.delete(values, 1 + int(np.diff(values).argmin()))
    return values


@dataclass(frozen=True, eq=False)
class Layer:
    """The merged events of one layer.

    Attributes
    ----------
    experts
        Chosen experts of each pattern, by ingress, ``[K, M]``.
    weight
        Tokens per second that meet each pattern, by ingress, float64 ``[M]``.
    """

    experts: tuple[Indices, ...]
    weight: tuple[Floats, ...]
    levels: Levels
    num_experts: int

    def wait(self, hold: Bools) -> float:
        """Seconds waited per second in this layer when experts are held as bool ``[E, P]``."""
        rank = self.levels.missing(hold).sum(axis=0)  # [I, E]
        cost = self.levels.base + np.vstack([np.zeros(len(rank)), np.cumsum(self.levels.step, axis=0)])
        total = 0.0
        for ingress, (experts, weight) in enumerate(zip(self.experts, self.weight, strict=True)):
            worst = rank[ingress].take(experts).max(axis=0)
            total += float(cost[worst, ingress] @ weight)
        return total

    def thinned(self, entries: int, rng: np.random.Generator) -> "Layer":
        """Return this layer with about so many questions x events x experts, drawn by weight; itself if small."""
        size = sum(int((self.levels.step[:, i] > 0).sum()) * part.size for i, part in enumerate(self.experts))
        if size <= entries:
            return self
        experts, weight = [], []
        for part, rates in zip(self.experts, self.weight, strict=True):
            draws = max(1, part.shape[1] * entries // size)
            total = float(rates.sum())
            picked = rng.choice(len(rates), draws, p=rates / total) if total else np.arange(1)
            experts.append(part[:, picked])
            weight.append(np.full(len(picked), total / len(picked)))
        return Layer(tuple(experts), tuple(weight), self.levels, self.num_experts)

    def least(self) -> float:
        """Seconds waited per second if every expert were as near as can be."""
        return float(sum(base * weight.sum() for base, weight in zip(self.levels.base, self.weight, strict=True)))

    def range(self) -> float:
        """Seconds per second between the best and the worst that can happen in this layer."""
        totals = np.array([weight.sum() for weight in self.weight])
        return float((self.levels.step.sum(axis=0) * totals).sum())


def layers_of(instance: LatencyInstance) -> list[Layer]:
    """Merge the events of every layer."""
    layers = []
    for layer in range(instance.num_layers):
        rates = instance.tokens_per_s
        merged = [_merge(ev[:, layer], rate) for ev, rate in zip(instance.events, rates, strict=True)]
        experts, weight = (tuple(part) for part in zip(*merged, strict=True))
        layers.append(Layer(experts, weight, levels_of(instance.cost_s[:, layer]), instance.num_experts))
    return layers


def _merge(chosen: Events, rate: float) -> tuple[Indices, Floats]:
    patterns, count = np.unique(np.sort(chosen, axis=1), axis=0, return_counts=True)
    weight = count.astype(np.float64) * (rate / len(chosen))
    return np.ascontiguousarray(patterns.T, dtype=np.intp), weight


class Merging:
    """Which pattern each recorded event is, so that layers under other weights of the tokens are made quickly."""

    def __init__(self, instance: LatencyInstance) -> None:
        self.num_experts = instance.num_experts
        self.levels = [levels_of(instance.cost_s[:, layer]) for layer in range(instance.num_layers)]
        self.merged = [
            [np.unique(np.sort(chosen[:, layer], axis=1), axis=0, return_inverse=True) for chosen in instance.events]
            for layer in range(instance.num_layers)
        ]

    def layers(self, weight: list[Floats]) -> list[Layer]:
        """Layers in which every token counts by its weight, tokens per second, float64 ``[T]`` by ingress."""
        layers = []
        for levels, merged in zip(self.levels, self.merged, strict=True):
            experts = tuple(np.ascontiguousarray(patterns.T, dtype=np.intp) for patterns, _ in merged)
            counted = tuple(
                np.bincount(inverse.ravel(), rates, minlength=len(patterns)).astype(np.float64)
                for (patterns, inverse), rates in zip(merged, weight, strict=True)
            )
            layers.append(Layer(experts, counted, levels, self.num_experts))
        return layers
