"""Shorter waits for the slowest tokens, for a little of the mean.

Decides which placement near the best mean keeps fewest tokens waiting long. Must not know bounds or how the mean was
minimised. A percentile is no sum over layers, so it takes two steps::

    reweigh   the slowest tokens count more, those of all steps so far averaged; descend on the weighted events
    search    exchange replicas at a place, scored on every token's whole wait: W summed up with a smooth step where
              the tail begins, annealed; the mean may exceed its best by `mean_given_up` and no more

The first finds the right layers for each place (the search, which changes one expert at a time, would not), the second
gives back of the mean what the tail did not need.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from planner.solvers.latency.holders import Repair
from planner.solvers.latency.instance import Bools, Floats, Ints, LatencyInstance, token_waits
from planner.solvers.latency.patterns import Merging
from planner.solvers.latency.polish import LayerTable, Polish

MEAN_GIVEN_UP: Final = 0.02
MAX_EVENTS: Final = 20_000_000  # tokens x layers x experts that are looked at; of longer traces, every so many tokens
_TAILS: Final = 3  # reweigh so many times the share that is asked for
_TAIL_WEIGHT: Final = 0.9
_REWEIGHED: Final = 10
_MOST_MOVES: Final = 400
_BATCH: Final = 300
_CANDIDATES: Final = 60  # of each kind and place
_WIDTH: Final = 0.02  # of the step, in waits of the tail
_WORTH: Final = 8.0  # of keeping all tokens below the step, in mean waits
_HOT: Final = 7e-4  # first temperature, in mean waits; the last is a hundredth of it
_OVER: Final = 2.0  # charged at first per second by which the mean is above what it may be; at last ten times that

Replica = tuple[int, int]  # layer, expert


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What is asked: shorten the wait of the slowest `share` of all tokens, for so much of the mean (a share too)."""

    share: float
    mean_given_up: float = MEAN_GIVEN_UP


def percentile_wait(instance: LatencyInstance, placed: Bools, share: float) -> float:
    """Seconds that the slowest `share` of tokens wait at least, tokens of an ingress counting by its rate."""
    return _at_share(token_waits(instance, placed), _rates(instance), share)


def shorten_tail(
    instance: LatencyInstance,
    placed: Bools,
    tail: Tail,
    *,
    time_s: float,
    seed: int = 0,
    batches: int = 200,
    acceptable: Callable[[Bools], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Bools:
    """Find a placement with shorter waits of the slowest tokens; the one given where there is none.

    Where time does not cut it short the result depends on the seed alone.

    Parameters
    ----------
    placed
        A feasible placement ``[P, L, E]``, best by its mean as far as known.
    batches
        Of the search, each of 300 exchanges among candidates of its own.
    acceptable
        Further limits: a placement that it refuses is never returned.
    """
    began = clock()
    thinned = _thinned(instance)
    aim = _aim(thinned, placed, tail)
    if aim is None or time_s <= 0:
        return placed
    search = _Search(thinned, placed, aim, np.random.default_rng(seed))
    search.reweigh(_TAILS * tail.share, lambda: clock() - began > 0.4 * time_s)
    keep = _Keeper(instance, placed, tail, acceptable or (lambda _: True))
    for batch in range(batches):
        late = (clock() - began) / time_s
        if late >= 1:
            break
        search.anneal(max(batch / batches, late))
        keep.offer(search.held)
    return keep.placed


@dataclass(frozen=True, kw_only=True)
class _Aim:
    """The step that the search sums up, and the mean that it may not exceed. Seconds; `worth` in seconds per share."""

    middle: float
    width: float
    worth: float
    most: float

    def beyond(self, waited: Floats) -> Floats:
        """Smoothly, whether tokens wait longer than the middle of the step."""
        return np.asarray(1 / (1 + np.exp(np.clip((self.middle - waited) / self.width, -50, 50))))

    def slope(self, waited: Floats) -> Floats:
        """Say what a second less is worth to each token."""
        beyond = self.beyond(waited)
        return np.asarray(1 + self.worth / self.width * beyond * (1 - beyond))


def _aim(instance: LatencyInstance, placed: Bools, tail: Tail) -> _Aim | None:
    """Begin the step midway between the percentile asked for and the one at twice its share."""
    waited, rates = token_waits(instance, placed), _rates(instance)
    mean = _mean(waited, rates)
    long = _at_share(waited, rates, tail.share)
    if long <= 0 or not 0 < tail.share < 1:
        return None
    middle = (long + _at_share(waited, rates, min(1.0, 2 * tail.share))) / 2
    most = mean * (1 + tail.mean_given_up)
    return _Aim(middle=middle, width=_WIDTH * long, worth=_WORTH * mean, most=most)


def _rates(instance: LatencyInstance) -> list[Floats]:
    """Share of all tokens that each recorded token stands for, float64 ``[T]`` by ingress."""
    total = instance.tokens_per_s.sum()
    pairs = zip(instance.events, instance.tokens_per_s, strict=True)
    return [np.full(len(chosen), rate / total / len(chosen)) for chosen, rate in pairs]


def _mean(waited: list[Floats], rates: list[Floats]) -> float:
    return float(sum(rate @ wait for rate, wait in zip(rates, waited, strict=True)))


def _at_share(waited: list[Floats], rates: list[Floats], share: float) -> float:
    """Wait that `share` of all tokens reach or exceed."""
    wait, rate = np.concatenate(waited), np.concatenate(rates)
    order = np.argsort(-wait, kind="stable")
    reached = np.cumsum(rate[order])
    return float(wait[order[min(int(np.searchsorted(reached, share * (1 - 1e-9))), len(order) - 1)]])


def _slowest(waited: list[Floats], rates: list[Floats], share: float) -> list[Floats]:
    """1 for tokens of the slowest `share`, 0 for others, between for those at its edge; ``[T]`` by ingress."""
    edge = _at_share(waited, rates, share)
    near = 1e-9 * edge
    above = sum(float(rate[wait > edge + near].sum()) for rate, wait in zip(rates, waited, strict=True))
    upto = sum(float(rate[wait >= edge - near].sum()) for rate, wait in zip(rates, waited, strict=True))
    part = min(1.0, max(0.0, share - above) / max(upto - above, 1e-300))
    return [np.where(wait > edge + near, 1.0, np.where(wait >= edge - near, part, 0.0)) for wait in waited]


def _thinned(instance: LatencyInstance) -> LatencyInstance:
    """Leave out tokens, evenly, where there are too many to hold their waits by layer."""
    every = -(-sum(chosen.size for chosen in instance.events) // MAX_EVENTS)
    return instance if every <= 1 else replace(instance, events=tuple(chosen[::every] for chosen in instance.events))


class _Keeper:
    """Keeps the placement with fewest slow tokens among those whose mean is near the best. `offer` modifies it."""

    def __init__(
        self, instance: LatencyInstance, placed: Bools, tail: Tail, acceptable: Callable[[Bools], bool]
    ) -> None:
        self.instance, self.tail, self.acceptable = instance, tail, acceptable
        self.rates = _rates(instance)
        self.aim = _aim(instance, placed, tail)
        self.placed, self.longest, self.slow = placed, *self._measure(token_waits(instance, placed))

    def offer(self, held: Bools) -> None:
        waited = token_waits(self.instance, held)
        longest, slow = self._measure(waited)
        within = self.aim is not None and _mean(waited, self.rates) <= self.aim.most
        if within and longest <= self.longest and slow < self.slow and self.acceptable(held):
            self.placed, self.longest, self.slow = held.copy(), longest, slow

    def _measure(self, waited: list[Floats]) -> tuple[float, float]:
        """Wait of the slowest share, and how many tokens are beyond the step."""
        if self.aim is None:
            return 0.0, 0.0
        beyond = [self.aim.beyond(wait) for wait in waited]
        return _at_share(waited, self.rates, self.tail.share), _mean(beyond, self.rates)


@dataclass(frozen=True, eq=False)
class _Undo:
    """A change of one replica's expert, to be taken back."""

    replica: Replica
    holders: Bools
    ingresses: list[tuple[int, float, Ints, Floats, Floats]]  # ingress, cost, tokens, waits in the layer, whole waits


class _Search:
    """A placement and what every token waits under it. All methods modify it."""

    def __init__(self, instance: LatencyInstance, placed: Bools, aim: _Aim, rng: np.random.Generator) -> None:
        self.instance, self.aim, self.rng = instance, aim, rng
        self.merging = Merging(instance)
        self.repairs = [Repair(instance, layer) for layer in range(instance.num_layers)]
        self.rates = _rates(instance)
        self.events = [np.ascontiguousarray(chosen.transpose(1, 0, 2)) for chosen in instance.events]  # [L, T, K]
        self.choosers = [[_choosers(layer, instance.num_experts) for layer in chosen] for chosen in self.events]
        self.fixed = instance.forced
        self.siblings = instance.on_node @ instance.on_node.T
        self.over = _OVER
        self.take(placed)

    def take(self, placed: Bools) -> None:
        """Start from a placement ``[P, L, E]``."""
        self.held = placed.copy()
        self.free = self.instance.capacity - self.held.sum(axis=(1, 2))
        layers = np.arange(self.instance.num_layers)[:, None, None]
        costs = self.instance.cost_s
        self.near = [np.where(self.held, cost.T[:, :, None], np.inf).min(axis=0) for cost in costs]  # [L, E]
        self.by_layer = [
            near[layers, chosen].max(axis=2) for near, chosen in zip(self.near, self.events, strict=True)
        ]  # [L, T]
        self.waited = [waits.sum(axis=0) for waits in self.by_layer]
        self.mean = _mean(self.waited, self.rates)

    def reweigh(self, share: float, is_late: Callable[[], bool]) -> None:
        """Descend on events that count more for the slowest tokens, again with the slowest of where that ended."""
        share, placed = min(share, 1.0), self.held
        waited, counted = self.waited, [np.zeros(len(wait)) for wait in self.waited]
        for step in range(1, _REWEIGHED + 1):
            slowest = _slowest(waited, self.rates, share)
            counted = [mean + (now - mean) / step for mean, now in zip(counted, slowest, strict=True)]
            weight = [
                rate * (1 - _TAIL_WEIGHT + _TAIL_WEIGHT / share * part)
                for rate, part in zip(self.rates, counted, strict=True)
            ]
            layers = self.merging.layers(weight)
            polish = Polish(self.instance, layers, self.repairs, placed.transpose(1, 2, 0))
            for _ in range(_MOST_MOVES):
                if is_late() or not polish.improve():
                    break
            placed = polish.hold.transpose(2, 0, 1)
            waited = token_waits(self.instance, placed)
            if is_late():
                break
        self.take(placed)

    def anneal(self, progress: float) -> None:
        """Try a batch of exchanges, at the temperature of this share of the whole search."""
        adds, drops = self._candidates()
        self.over = _OVER * (1 + 9 * progress)
        temperature = _HOT * self.aim.most * 0.01**progress
        places = [place for place in range(len(self.held)) if adds[place] and (drops[place] or self.free[place] > 0)]
        if not places:
            return
        draws = self.rng.random((_BATCH, 4))
        for which, first, second, luck in draws:
            place = places[int(which * len(places))]
            add = adds[place][int(first**2 * len(adds[place]))]
            drop = drops[place][int(second**2 * len(drops[place]))] if drops[place] else None
            self._exchange(place, add, drop, -temperature * np.log(luck + 1e-300))

    def _candidates(self) -> tuple[list[list[Replica]], list[list[Replica]]]:
        """Replicas of each place whose addition gains most, whose loss costs least, by the slope of the step."""
        weight = [rate * self.aim.slope(wait) for rate, wait in zip(self.rates, self.waited, strict=True)]
        layers = self.merging.layers(weight)
        tables = [LayerTable(layer, self.held[:, index].T) for index, layer in enumerate(layers)]
        gain, loss = (np.stack(part).transpose(2, 0, 1) for part in zip(*(t.scores() for t in tables), strict=True))
        addable = self.instance.allowed & ~np.einsum("pq,qle->ple", self.siblings, self.held)
        spare = self.held.sum(axis=0) > self.instance.required
        droppable = self.held & ~self.fixed & spare
        return _best(np.where(addable & (gain > 0), -gain, np.inf)), _best(np.where(droppable, loss, np.inf))

    def _exchange(self, place: int, add: Replica, drop: Replica | None, most: float) -> None:
        """Add one replica, and drop another where the place is full, unless that costs more than `most`."""
        if add == drop or self.held[(self.siblings[place], *add)].any():
            return
        change, undo = self._set(place, add, held=True)
        undone = [undo]
        if self.free[place] <= 0:
            column = None if drop is None else self.held[(slice(None), *drop)]
            if drop is None or column is None or not column[place] or column.sum() <= self.instance.required:
                self._undo(undone)
                return
            more, undo = self._set(place, drop, held=False)
            change, undone = change + more, [*undone, undo]
        if change > most:
            self._undo(undone)
        elif len(undone) == 1:
            self.free[place] -= 1

    def _set(self, place: int, replica: Replica, *, held: bool) -> tuple[float, _Undo]:
        """Hold an expert at a place or not; return by how much the sum of step and mean grows."""
        layer, expert = replica
        undo = _Undo(replica, self.held[:, layer, expert].copy(), [])
        self.held[place, layer, expert] = held
        holders, before = self.held[:, layer, expert], self.mean
        beyond = 0.0
        for ingress, cost in enumerate(self.instance.cost_s[:, layer]):
            old, new = self.near[ingress][layer, expert], cost[holders].min()
            if new == old:
                continue
            tokens = self.choosers[ingress][layer][expert]
            self.near[ingress][layer, expert] = new
            was = self.by_layer[ingress][layer, tokens]
            now = self.near[ingress][layer][self.events[ingress][layer, tokens]].max(axis=1)
            moved = np.flatnonzero(now != was)
            tokens, was, now = tokens[moved], was[moved], now[moved]
            whole = self.waited[ingress][tokens]
            undo.ingresses.append((ingress, old, tokens, was, whole))
            later = whole + (now - was)
            self.by_layer[ingress][layer, tokens], self.waited[ingress][tokens] = now, later
            rate = float(self.rates[ingress][0])
            self.mean += rate * float((now - was).sum())
            beyond += rate * float((self.aim.beyond(later) - self.aim.beyond(whole)).sum())
        return self.aim.worth * beyond + self._charged(self.mean) - self._charged(before), undo

    def _charged(self, mean: float) -> float:
        return mean + self.over * max(0.0, mean - self.aim.most)

    def _undo(self, undone: list[_Undo]) -> None:
        for undo in reversed(undone):
            layer, expert = undo.replica
            self.held[:, layer, expert] = undo.holders
            for ingress, cost, tokens, waits, whole in undo.ingresses:
                self.mean -= float(self.rates[ingress][0] * (self.waited[ingress][tokens] - whole).sum())
                self.near[ingress][layer, expert] = cost
                self.by_layer[ingress][layer, tokens] = waits
                self.waited[ingress][tokens] = whole


def _choosers(chosen: np.ndarray, num_experts: int) -> list[Ints]:
    """Tokens that chose each expert, from ``[T, K]``."""
    order = np.argsort(chosen, axis=None, kind="stable")
    ends = np.searchsorted(chosen.ravel()[order], np.arange(1, num_experts))
    return [np.unique(part) for part in np.split(order // chosen.shape[1], ends)]


def _best(values: Floats) -> list[list[Replica]]:
    """Return the lowest finite entries of ``[P, L, E]`` for each place, best first."""
    found = []
    for table in values:
        flat = table.ravel()
        few = np.argsort(flat, kind="stable")[:_CANDIDATES]
        found.append([(int(i) // table.shape[1], int(i) % table.shape[1]) for i in few if np.isfinite(flat[i])])
    return found
