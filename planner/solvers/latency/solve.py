"""The loop: a bound and prices from the relaxation, columns at those prices, a choice of columns, polish; again.

Decides how effort is spent and what is reported. Must not know how any of the parts works. With no limit of time the
result depends on the seed alone; it can be stopped at any time and then has its best placement and bound so far.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from planner.solvers.latency.columns import LayerPool, sweep
from planner.solvers.latency.dual import Dual
from planner.solvers.latency.holders import Repair, any_placement, holder_sets
from planner.solvers.latency.instance import Bools, Floats, InvalidInstance, LatencyInstance, waits
from planner.solvers.latency.patterns import layers_of
from planner.solvers.latency.polish import Polish
from planner.solvers.latency.rounding import rounded
from planner.solvers.latency.select import column_prices, select

StopReason = Literal["gap", "time", "interrupted", "finished", "infeasible"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop, and the seed of whatever is random."""

    time_s: float = 30.0
    gap: float = 1e-6
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How effort is spent where time does not cut it.

    Attributes
    ----------
    dual_steps, dual_gain
        Most steps of the relaxation at first; it ends earlier where 40 steps raise the bound by less than this share.
    more_dual_steps
        Steps before each further round.
    rounds
        Times that columns are made, chosen and polished.
    select_steps
        Pair moves of each choice.
    slack
        Columns are kept within this share of a layer's range of waits.
    anchors
        Places of a layer that start out holding all of it; the places that the relaxation fills most.
    guide_entries
        Questions x events x experts of a layer above which its columns are made on a sample of the events.
    """

    dual_steps: int = 140
    dual_gain: float = 2e-4
    more_dual_steps: int = 60
    rounds: int = 3
    select_steps: int = 10_000
    slack: float = 0.03
    anchors: int = 6
    guide_entries: int = 120_000


@dataclass(frozen=True, eq=False)
class Progress:
    """A better placement or a better bound; `placed` is bool ``[P, L, E]``."""

    placed: Bools | None
    objective: float | None
    bound: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was found.

    Attributes
    ----------
    placed
        The incumbent, bool ``[P, L, E]``; None where nothing feasible is known.
    objective, bound
        Seconds waited per second: of the incumbent; proven lower bound.
    slot_price
        What one more slot of each place would save at most, seconds per second, float64 ``[P]``.
    """

    placed: Bools | None
    objective: float | None
    bound: float
    slot_price: Floats
    stop_reason: StopReason
    seconds: float

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective; None where nothing was found."""
        return None if self.objective is None else _gap(self.objective, self.bound)


def _gap(objective: float, bound: float) -> float:
    return max(0.0, objective - bound) / max(abs(objective), 1e-12)


def _usable(pool: LayerPool, filled: Floats) -> list[int]:
    """Places that may hold anything of a layer, those first that the relaxation fills most."""
    return [int(place) for place in np.argsort(-filled, kind="stable") if pool.repair.allowed[:, place].any()]


def violations(instance: LatencyInstance, placed: Bools) -> list[str]:
    """Name every constraint that a placement ``[P, L, E]`` breaks; empty where it is feasible."""
    used = placed.sum(axis=(1, 2))
    over = np.flatnonzero(used > instance.capacity)
    faults = [f"place {place}: {used[place]} experts, room for {instance.capacity[place]}" for place in over]
    on_nodes = np.einsum("ple,pn->nle", placed.astype(np.int64), instance.on_node.astype(np.int64))
    if (on_nodes > 1).any():
        faults.append("a node holds an expert in two places")
    if (short := int(((on_nodes > 0).sum(axis=0) < instance.required).sum())) > 0:
        faults.append(f"{short} experts on fewer than {instance.required} nodes")
    if (placed & ~instance.allowed).any() or (instance.forced & ~placed).any():
        faults.append("a pin or ban is not kept")
    return faults


def solve_latency(
    instance: LatencyInstance,
    *,
    warm_start: Bools | None = None,
    limits: Limits | None = None,
    schedule: Schedule | None = None,
    report: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    acceptable: Callable[[Bools], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Minimise the wait for the slowest of each layer's experts.

    Parameters
    ----------
    warm_start
        A feasible placement ``[P, L, E]``; the result is never worse.
    report
        Hears of every better placement and bound.
    should_stop
        Asked often; the best so far is returned soon after it says so.
    acceptable
        Further limits (load, links): a placement that it refuses is never returned; the bound holds without them.

    Raises
    ------
    InvalidInstance
        Where the warm start is not feasible.
    """
    if warm_start is not None and (faults := violations(instance, warm_start)):
        raise InvalidInstance([f"warm start: {fault}" for fault in faults])
    run = _Run(
        instance,
        limits or Limits(),
        schedule or Schedule(),
        report or (lambda _: None),
        should_stop or (lambda: False),
        acceptable or (lambda _: True),
        clock,
    )
    return run.solve(warm_start)


@dataclass(eq=False)
class _Run:
    """State of one solve. Every method modifies it."""

    instance: LatencyInstance
    limits: Limits
    schedule: Schedule
    report: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    acceptable: Callable[[Bools], bool]
    clock: Callable[[], float]
    placed: Bools | None = None
    objective: float | None = None
    bound: float = 0.0
    cut: bool = False  # whether time cut any part short, so that the result is not decided by the seed alone
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.rng = np.random.default_rng(self.limits.seed)

    def solve(self, warm_start: Bools | None) -> Outcome:
        start = any_placement(self.instance) if warm_start is None else warm_start
        if start is None:
            return self._outcome("infeasible", np.zeros(self.instance.num_places))
        self._offer(start)
        self._prepare(start)
        self._relax(self.schedule.dual_steps, share=0.35)
        for index in range(self.schedule.rounds):
            if index:
                self._relax(self.schedule.more_dual_steps, share=0.9)
            else:
                self.price = self.dual.price
            self._round_off(first=index == 0)
            self._make_columns()
            self._choose()
            self._polish(self.hold)
            if index == 0 and warm_start is not None:
                self._polish(warm_start.transpose(1, 2, 0))
            if self._over(1.0) or self._closed():
                break
        return self._outcome(self._reason(), self.dual.price)

    def _prepare(self, start: Bools) -> None:
        self.layers = layers_of(self.instance)
        self.repairs = [Repair(self.instance, layer) for layer in range(len(self.layers))]
        self.dual = Dual(self.instance, self.layers, holder_sets(self.instance))
        guides = [layer.thinned(self.schedule.guide_entries, self.rng) for layer in self.layers]
        parts = zip(self.layers, guides, self.repairs, strict=True)
        self.pools = [LayerPool(*part, self.instance.capacity) for part in parts]
        self.hold = start.transpose(1, 2, 0)  # [L, E, P] feasible; the columns that the next choice starts from
        self.price = self.dual.price
        self._raise_bound()

    def _relax(self, steps: int, *, share: float) -> None:
        """Advance the relaxation, within a share of the time."""
        history = []
        for step in range(1, steps + 1):
            if self._over(share):
                break
            self.dual.step()
            if step % 10 == 0:
                self.dual.prove()
                self._raise_bound()
                history.append(self.dual.bound)
                if len(history) > 4 and history[-1] - history[-5] < self.schedule.dual_gain * abs(history[-1]):
                    break

    def _round_off(self, *, first: bool) -> None:
        """Search on from the rounded mixture at first, afterwards where that is better.

        A warm start is the incumbent, but no place to search from: it is the best of its neighbourhood already.
        """
        before, candidate = self.objective, rounded(self.instance, self.dual.mean_hold())
        self._offer(candidate)
        if first and not violations(self.instance, candidate):
            self.hold = candidate.transpose(1, 2, 0)
        elif self.placed is not None and self.objective != before:
            self.hold = self.placed.transpose(1, 2, 0)

    def _make_columns(self) -> None:
        """Sweep every layer at the current prices, from the incumbent and from one anchor after another."""
        filled = self.dual.mean_hold().sum(axis=1)  # [L, P]
        ranked = [_usable(pool, row) for pool, row in zip(self.pools, filled, strict=True)]
        for pool, hold in zip(self.pools, self.hold, strict=True):
            pool.add(hold)
        for number in range(1 + min(self.schedule.anchors, self.instance.num_places)):
            for layer in self.rng.permutation(len(self.pools)):
                if self._late_for_columns():
                    return
                self._sweep(int(layer), ranked[layer], number)

    def _late_for_columns(self) -> bool:
        return self._over(0.65)

    def _sweep(self, layer: int, ranked: list[int], number: int) -> None:
        """Sweep one layer from the incumbent (number 0) or from its anchor of that number."""
        pool, slack = self.pools[layer], self.schedule.slack * self.layers[layer].range()
        if number == 0:
            sweep(pool, self.hold[layer], self.price, ranked, slack, should_stop=self._late_for_columns)
        elif number <= len(ranked):
            anchor = ranked[number - 1]
            places = [*(place for place in ranked if place != anchor), anchor]
            sweep(
                pool,
                pool.repair.anchored(anchor, self.price),
                self.price,
                places,
                slack,
                should_stop=self._late_for_columns,
            )

    def _choose(self) -> None:
        """Choose a column for each layer; the prices that the columns support are those of the next round."""
        kept = [pool.trim(self.price, pool.add(hold)) for pool, hold in zip(self.pools, self.hold, strict=True)]
        slacks = [self.schedule.slack * layer.range() for layer in self.layers]
        fronts = [
            pool.front(self.price, slack, keep) for pool, slack, keep in zip(self.pools, slacks, kept, strict=True)
        ]
        start = [int(np.flatnonzero(front.index == keep)[0]) for front, keep in zip(fronts, kept, strict=True)]
        worth = self.price.mean() if self.price.any() else float(np.mean(slacks)) + 1e-12
        hot = 0.3 * float(np.mean(slacks)) + 1e-300
        choice = select(
            fronts,
            self.instance.capacity,
            start,
            penalty=3 * self.price + worth,
            temperature=(hot, hot / 150),
            steps=self.schedule.select_steps,
            rng=self.rng,
            should_stop=lambda: self._over(0.9),
        )
        chosen = [pool.hold(int(front.index[c])) for pool, front, c in zip(self.pools, fronts, choice, strict=True)]
        self.hold = np.stack(chosen)
        self._offer(self.hold.transpose(2, 0, 1))
        if not self._over(0.9) and (prices := column_prices(fronts, self.instance.capacity)) is not None:
            self.price = prices

    def _polish(self, hold: Bools) -> None:
        """Exchange experts, from a feasible placement ``[L, E, P]``; the search goes on from the best so far."""
        polish = Polish(self.instance, self.layers, self.repairs, hold)
        polish.run(lambda: self._over(1.0))
        before = self.objective
        self._offer(polish.hold.transpose(2, 0, 1))
        if self.placed is not None and (self.objective != before or hold is self.hold):
            self.hold = polish.hold

    def _offer(self, placed: Bools) -> None:
        """Make a placement the incumbent where it is better and acceptable."""
        objective = float(self.instance.tokens_per_s @ waits(self.instance, placed))
        better = self.objective is None or objective < self.objective
        if better and not violations(self.instance, placed) and self.acceptable(placed):
            self.placed, self.objective = np.ascontiguousarray(placed), objective
            self.report(Progress(self.placed, self.objective, self.bound))

    def _raise_bound(self) -> None:
        if self.dual.bound > self.bound:
            self.bound = self.dual.bound
            self.report(Progress(self.placed, self.objective, self.bound))

    def _closed(self) -> bool:
        return self.objective is not None and _gap(self.objective, self.bound) <= self.limits.gap

    def _over(self, share: float) -> bool:
        late = self.clock() - self.began > share * self.limits.time_s
        self.cut = self.cut or late
        return late or self.should_stop()

    def _reason(self) -> StopReason:
        if self._closed():
            return "gap"
        if self.should_stop():
            return "interrupted"
        return "time" if self.cut else "finished"

    def _outcome(self, reason: StopReason, price: Floats) -> Outcome:
        bound = self.bound if self.objective is None else min(self.bound, self.objective)
        return Outcome(self.placed, self.objective, bound, price, reason, self.clock() - self.began)
