"""Solve a placement problem by decomposition: prices, rounding, restricted models, proof.

Decides the order of the steps and when to stop. Must not know what happens inside a step.
Flow: current placement → prices and bound (`dual`) → repair, fill, swap (`search`) → restricted models of growing size
(`columns`, `core`) → where the gap is small enough, a model of every column that could still matter, which proves it.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from threadpoolctl import threadpool_limits

from planner.solvers.decomposition.arrays import (
    Bools,
    Floats,
    Incumbent,
    Outcome,
    PlacementArrays,
    Progress,
    Settings,
    Stop,
    gap_of,
)
from planner.solvers.decomposition.columns import Columns, collect, most_undecided
from planner.solvers.decomposition.core import CoreLimits, choose_columns
from planner.solvers.decomposition.dual import Dual
from planner.solvers.decomposition.evaluate import as_incumbent, nearest_places
from planner.solvers.decomposition.holder_sets import enumerate_sets
from planner.solvers.decomposition.oracle import Oracle
from planner.solvers.decomposition.prices import Coupling
from planner.solvers.decomposition.search import Scorer, fill, repair, swap

CORE_SIZES = (300, 1200, 5000)  # experts with a choice in each restricted model
PROOF_COLUMNS = 60_000
DUAL_SHARE = 0.6  # of the time limit
SWAP_ROUNDS = 40


class Run:
    """Best placement and bound so far, and the clock. `offer` and `prove` modify it."""

    def __init__(self, arrays: PlacementArrays, settings: Settings) -> None:
        self.arrays, self.settings = arrays, settings
        self.incumbent: Incumbent | None = None
        self.bound = 0.0 # every cost is non-negative
        self.history: list[Progress] = []
        self.is_interrupted = False
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit; 0 once interrupted."""
        return 0.0 if self.is_interrupted else max(0.0, self.settings.time_limit_s - self.seconds)

    @property
    def is_closed(self) -> bool:
        """Whether the gap that was asked for is reached."""
        return self.incumbent is not None and gap_of(self.incumbent.objective, self.bound) <= self.settings.gap

    def offer(self, incumbent: Incumbent | None, phase: str) -> None:
        """Take a placement where it is the best so far."""
        if incumbent is not None and (self.incumbent is None or incumbent.objective < self.incumbent.objective):
            self.incumbent = incumbent
        self.note(phase)

    def prove(self, bound: float, phase: str) -> None:
        """Take a bound where it is the best so far; a bound cannot pass the best placement but by rounding."""
        if self.incumbent is not None:
            bound = min(bound, self.incumbent.objective)
        self.bound = max(self.bound, bound)
        self.note(phase)

    def note(self, phase: str) -> None:
        """Record and report the state."""
        objective = None if self.incumbent is None else self.incumbent.objective
        self.history.append(Progress(self.seconds, phase, objective, self.bound))
        report = self.settings.on_progress
        if report is not None and not report(self.history[-1]):
            self.is_interrupted = True

    def outcome(self, stop: Stop, memory_price: Floats) -> Outcome:
        """Freeze the state."""
        return Outcome(self.incumbent, self.bound, stop, tuple(self.history), memory_price)


def solve_arrays(arrays: PlacementArrays, settings: Settings | None = None, start: Bools | None = None) -> Outcome:
    """Place experts; `start` `[K, P]` is a placement to begin from, ignored where it keeps not every constraint.

    Does not modify its arguments. The outcome is deterministic for a seed unless the time limit cuts in.
    """
    settings = settings or Settings()
    run = Run(arrays, settings)
    if start is not None:
        run.offer(as_incumbent(arrays, start, nearest_places(arrays, start, arrays.cost[None])), "current placement")
    with _workers(settings.threads) as pool:
        return _solve(arrays, run, pool)


def _solve(arrays: PlacementArrays, run: Run, pool: ThreadPoolExecutor | None) -> Outcome:
    coupling = Coupling(arrays)
    sets = enumerate_sets(arrays)
    oracle = Oracle(arrays, sets, pool)
    dual = Dual(oracle)
    _find_prices(run, dual)
    price = dual.best_theta[coupling.memory] / arrays.expert_bytes
    if not np.isfinite(dual.bound):
        return run.outcome(Stop.INFEASIBLE, price)
    _round(run, dual)
    for size in CORE_SIZES:
        if run.is_closed or run.seconds_left == 0:
            break
        _restricted(run, dual, size)
        if _prove(run, dual):
            return run.outcome(Stop.OPTIMAL, price)
    return run.outcome(_stop_reason(run), price)


def _stop_reason(run: Run) -> Stop:
    if run.is_closed:
        return Stop.GAP
    if run.is_interrupted:
        return Stop.INTERRUPTED
    return Stop.TIME if run.seconds_left == 0 else Stop.EXHAUSTED


def _find_prices(run: Run, dual: Dual) -> None:
    deadline = run.seconds + DUAL_SHARE * run.seconds_left

    def keep_going() -> bool:
        if np.isfinite(dual.bound):
            run.prove(dual.bound, "prices")
        return run.seconds < deadline and not run.is_interrupted and dual.bound < np.inf

    dual.solve(0.05 * run.settings.gap, keep_going=keep_going)


def _round(run: Run, dual: Dual) -> None:
    """Offer the best answer's holders, repaired, filled and improved by swaps."""
    arrays, answer = run.arrays, dual.best_answer
    if answer is None:
        return
    costs = dual.coupling.layer_costs(dual.best_theta)
    new = arrays.new_copies
    scorer = Scorer(arrays, costs, None if new is None else new.price)
    holders = fill(scorer, repair(scorer, dual.oracle.sets.member[answer.chosen]))
    run.offer(as_incumbent(arrays, holders, nearest_places(arrays, holders, costs)), "rounding")
    if run.seconds_left > 0 and not run.is_closed:
        holders = swap(scorer, holders, SWAP_ROUNDS)
        run.offer(as_incumbent(arrays, holders, nearest_places(arrays, holders, costs)), "swaps")


def _restricted(run: Run, dual: Dual, size: int) -> None:
    """Offer the best choice among the columns of the `size` most undecided experts."""
    theta, answer = dual.best_theta, dual.best_answer
    assert answer is not None
    unit = float(dual.coupling.scale[dual.coupling.memory].max())
    slack = 1e-3 * unit
    columns = None
    for _ in range(8):
        ties = dual.oracle.near_ties(theta, answer, slack, dual.index)
        past = () if run.arrays.is_separable else tuple(dual.recent)
        columns = collect(dual.coupling, dual.oracle.sets, theta, answer.lower, ties, (answer, *past))
        if (np.bincount(columns.expert) > 1).sum() >= size or len(columns) > 40 * size:
            break
        slack *= 3
    columns = most_undecided(columns, num_experts=size, per_expert=8)
    _offer_choice(run, dual, columns, f"{size} undecided")


def _offer_choice(run: Run, dual: Dual, columns: Columns, phase: str) -> float | None:
    """Solve the model of these columns, offer its placement, and return its bound if it was solved."""
    settings, arrays = run.settings, run.arrays
    good = run.bound * (1 + 0.5 * settings.gap)
    limits = CoreLimits(run.seconds_left, 0.1 * settings.gap, good, settings.threads, settings.seed)
    result = choose_columns(dual.coupling, columns, limits)
    if result.picked is not None:
        holders, place = columns.held[result.picked], columns.place[:, result.picked]
        run.offer(as_incumbent(arrays, holders, place), phase)
        costs = dual.coupling.layer_costs(dual.best_theta)
        filled = fill(Scorer(arrays, costs, None if arrays.new_copies is None else arrays.new_copies.price), holders)
        run.offer(as_incumbent(arrays, filled, nearest_places(arrays, filled, costs)), phase + ", filled")
    return result.bound if result.is_solved else None


def _prove(run: Run, dual: Dual) -> bool:
    """Close the gap with a model of every column that a better placement could use; return whether that was done.

    A column whose reduced cost exceeds incumbent − bound belongs to no better placement.
    """
    if run.incumbent is None or not run.arrays.is_separable or run.seconds_left == 0:
        return False
    answer = dual.best_answer
    slack = run.incumbent.objective - dual.bound + dual.oracle.rounding * float(answer.lower.max())
    ties = dual.oracle.near_ties(dual.best_theta, answer, slack, dual.index)
    if len(ties.expert) > PROOF_COLUMNS:
        return False
    if not dual.is_whole:
        ties = dual.oracle.near_ties(dual.best_theta, answer, slack)
    columns = collect(dual.coupling, dual.oracle.sets, dual.best_theta, answer.lower, ties, (answer,))
    bound = _offer_choice(run, dual, columns, "all that could matter")
    if bound is None:
        return False
    run.prove(min(bound, run.incumbent.objective), "proof")
    return run.is_closed


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Yield a pool of `threads` (0: one per processor); BLAS keeps to one thread, as the tiles are shared out already."""
    count = threads or os.cpu_count() or 1
    with threadpool_limits(limits=1, user_api="blas"):
        if count == 1:
            yield None
            return
        with ThreadPoolExecutor(count) as pool:
            yield pool
