"""The linear relaxation, by a first-order method that proves a bound at every step.

Decides splits of event costs and memory prices. Must not know incumbents. Primal-dual hybrid gradient (Chambolle and
Pock 2011, diagonal steps of Pock and Chambolle 2011) on the saddle point that `pricing` describes::

    min over mixtures q of holder sets, max over splits a and prices mu >= 0 of
        sum over questions and events of w * sum_k a_k missing_k(q)  +  sum_p mu_p (used_p(q) - M_p)

Every iteration is one gather, one projection and one scatter over the merged events. Memory: one float32 per question,
event and expert; where that is too much, levels are merged downwards.
"""

from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.solvers.latency.holders import HolderSets
from planner.solvers.latency.instance import Floats, LatencyInstance
from planner.solvers.latency.patterns import Indices, Layer, Levels, levels_of
from planner.solvers.latency.pricing import SetCosts, least_cost, set_costs

_PRIMAL_WEIGHT: Final = 0.1  # of 0.03, 0.1, 0.3 and 1 the fastest on recorded routing; the bound is valid with any
_ROUNDING: Final = 1e-12  # float64 sums of a million terms; float32 splits are normalised in float64
MAX_ENTRIES: Final = 60_000_000  # splits, float32: 240 MB

Singles = NDArray[np.float32]
Array = TypeVar("Array", NDArray[np.float32], NDArray[np.float64])


class LayerDual:
    """Splits and mixture of one layer. `step` modifies them."""

    def __init__(self, layer: Layer, levels: Levels, costs: SetCosts, *, scale: float, slot_scale: float) -> None:
        self.levels, self.costs, self.num_experts = levels, costs, layer.num_experts
        ingresses = len(layer.experts)
        width = max(len(experts) for experts in layer.experts)
        offsets = [experts + ingress * layer.num_experts for ingress, experts in enumerate(layer.experts)]
        self.index: Indices = np.concatenate([_padded(part, width) for part in offsets], axis=1)  # [K, M]
        origin = np.repeat(np.arange(ingresses), [len(weight) for weight in layer.weight])
        weight = np.concatenate(layer.weight)
        self.weight: Floats = levels.step[:, origin] * weight / scale  # [J, M]
        self.split: Singles = np.full((levels.num_questions, *self.index.shape), 1 / width, dtype=np.float32)
        self.base = float((levels.base[origin] * weight).sum())
        self.size = ingresses * layer.num_experts
        self.sums = self._scatter()  # [J * I, E]
        touched = np.zeros(layer.num_experts)
        for question in range(levels.num_questions):
            counts = np.bincount(self.index.ravel(), np.tile(self.weight[question], width), minlength=self.size)
            touched += counts.reshape(ingresses, -1).sum(axis=0)
        spread = max(1.0, len(costs.holds) / 64)  # many sets move one place together
        self.tau = 1.0 / ((touched + slot_scale * costs.holds.shape[1]) * spread)[:, None]
        self.mixture = np.full((layer.num_experts, len(costs.holds)), 1 / len(costs.holds))

    def step(self, price: Floats) -> Floats:
        """Move mixture, then splits; return the slots of each place that the extrapolated mixture uses, ``[P]``."""
        gradient = self.costs.of(self.sums, price)
        target = np.where(np.isfinite(gradient), self.mixture - self.tau / _PRIMAL_WEIGHT * gradient, -1e30)
        moved = _onto_simplex(target.T, rounds=8).T
        ahead = 2 * moved - self.mixture
        self.mixture = moved
        missing = (ahead @ self.costs.misses).T.astype(np.float32).reshape(self.levels.num_questions, self.size)
        for question in range(self.levels.num_questions):
            self.split[question] += np.float32(_PRIMAL_WEIGHT) * missing[question].take(self.index)
            self.split[question] = _onto_simplex(self.split[question], rounds=2)
        self.sums = self._scatter()
        return np.asarray(ahead.sum(axis=0) @ self.costs.holds)

    def least(self, price: Floats, *, complete: bool) -> float:
        """Proven least cost of this layer at given prices, in units of the scale."""
        if complete:
            return float(self.costs.of(self.sums, price).min(axis=1).sum())
        return float(least_cost(self.sums, price, self.levels).sum())

    def _scatter(self) -> Floats:
        """Cost that each expert carries in each question: weight times split, with splits that sum to at most 1."""
        sums = np.empty((self.levels.num_questions, self.size))
        for question, split in enumerate(self.split):
            total = split.sum(axis=0, dtype=np.float64)
            carried = split * (self.weight[question] / np.maximum(total, 1.0))
            sums[question] = np.bincount(self.index.ravel(), carried.ravel(), minlength=self.size)
        return sums.reshape(-1, self.num_experts)


def _padded(experts: Indices, width: int) -> Indices:
    """Repeat an expert where an ingress chooses fewer than others: the maximum stays what it is."""
    return np.concatenate([experts, np.repeat(experts[:1], width - len(experts), axis=0)])


def _onto_simplex(columns: Array, rounds: int) -> Array:
    """Project each column onto the unit simplex (Michelot 1986). Exact with as many rounds as rows.

    Splits change little between steps: two rounds keep them close, and `_scatter` never counts more than the whole.
    """
    shift = (columns.sum(axis=0) - 1) / len(columns)
    above = np.empty_like(columns)
    for _ in range(rounds):
        np.maximum(np.subtract(columns, shift, out=above), 0, out=above)
        active = (above > 0).view(np.int8).sum(axis=0, dtype=np.int8 if len(columns) < 128 else np.int32)
        shift += (above.sum(axis=0) - 1) / np.maximum(active, 1)
    np.maximum(np.subtract(columns, shift, out=above), 0, out=above)
    return above


class Dual:
    """Bound and prices of the whole problem. `step` modifies it.

    Attributes
    ----------
    bound
        Best proven lower bound of the objective.
    price
        Price of a slot of each place, seconds per second, float64 ``[P]``.
    """

    def __init__(self, instance: LatencyInstance, layers: list[Layer], sets: HolderSets) -> None:
        self.capacity = instance.capacity.astype(np.float64)
        self.complete = sets.complete
        self.scale = sum(layer.range() for layer in layers) or 1.0
        experts = instance.num_experts * len(layers)
        self.slot_scale = instance.events[0].shape[2] / (experts * instance.num_ingresses)
        max_levels = _affordable_levels(layers)
        self.layers = []
        for index, layer in enumerate(layers):
            levels = levels_of(instance.cost_s[:, index], max_levels)
            costs = set_costs(instance, index, levels, sets)
            self.layers.append(LayerDual(layer, levels, costs, scale=self.scale, slot_scale=self.slot_scale))
        self.price_step = _PRIMAL_WEIGHT * self.slot_scale / (0.6 * experts)
        self._price = np.full(instance.num_places, self.slot_scale / 2)
        self._price[self.capacity >= experts] = 0.0
        self.base = sum(layer.base for layer in self.layers)
        self.bound = self.base
        self.price = self._price * self.scale
        self.prove()

    def step(self) -> None:
        """One iteration over all layers."""
        used = np.sum([layer.step(self._price) for layer in self.layers], axis=0)
        self._price = np.maximum(0.0, self._price + self.price_step * (used - self.capacity))

    def prove(self) -> float:
        """Evaluate the bound at the current splits and prices; keep the prices of the best."""
        least = sum(layer.least(self._price, complete=self.complete) for layer in self.layers)
        value = least - float(self._price @ self.capacity)
        bound = self.base + self.scale * (value - _ROUNDING)
        if bound > self.bound:
            self.bound, self.price = bound, self._price * self.scale
        return bound

    def mean_hold(self) -> Floats:
        """Share of each expert at each place in the current mixture, float64 ``[L, E, P]``."""
        return np.stack([layer.mixture @ layer.costs.holds for layer in self.layers])


def _affordable_levels(layers: list[Layer]) -> int:
    per_question = sum(experts.size for layer in layers for experts in layer.experts)
    return 1 + max(1, MAX_ENTRIES // max(per_question, 1))
