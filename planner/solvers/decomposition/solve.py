"""Solve a placement problem by decomposition: prices, rounding, restricted models, proof.

Decides the order of the steps and when to stop. Must not know what happens inside a step.
Flow: current placement → prices and bound (`dual`) → repair, fill, swap (`search`) → restricted models of growing size
(`columns`, `core`) → where the gap is small enough, a model of every column that could still matter, which proves it.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from planner.solvers.decomposition.answers import NearTies, Oracle
from planner.solvers.decomposition.arrays import (
    Bools,
    Outcome,
    PlacementArrays,
    Settings,
    Stop,
)
from planner.solvers.decomposition.ascent import AscentOracle
from planner.solvers.decomposition.columns import Columns, collect, most_undecided
from planner.solvers.decomposition.core import ModelLimits, ModelResult, choose_columns
from planner.solvers.decomposition.dual import Dual
from planner.solvers.decomposition.evaluate import (
    as_incumbent,
    holders_are_feasible,
    serve_whole,
    served_by_nearest,
    worst_cost,
)
from planner.solvers.decomposition.holder_sets import ENUMERABLE_SETS, count_sets, enumerate_sets, num_domains
from planner.solvers.decomposition.oracle import EnumeratingOracle
from planner.solvers.decomposition.prices import Coupling
from planner.solvers.decomposition.run import Run, workers
from planner.solvers.decomposition.search import Scorer, fill, repair, swap
from planner.solvers.decomposition.shares import SetOptions, choose_sets_and_shares, count_shares

CORE_SIZES = (300, 1200, 5000)  # experts with a choice in each restricted model
PROOF_COLUMNS = 60_000
PROOF_SHARES = 40_000
QUICK_SHARES = 2_000  # shares up to which the exact model is tried before others
COLUMNS_PER_EXPERT = 8
MODEL_SHARE = 0.5  # of the time left, for one restricted model
EXCESS = 3.0  # price of exceeding a row, in its prices, while shares are not split
DUAL_SHARE = 0.6  # of the time limit
SWAP_ROUNDS = 40


def solve_arrays(arrays: PlacementArrays, settings: Settings | None = None, start: Bools | None = None) -> Outcome:
    """Place experts; `start` `[K, P]` is a placement to begin from, ignored where it keeps not every constraint.

    Does not modify its arguments. The outcome is deterministic for a seed unless the time limit cuts in.
    """
    settings = settings or Settings()
    run = Run(arrays, settings)
    if start is not None:
        run.offer(served_by_nearest(arrays, start, arrays.cost[None]), "current placement")
    with workers(settings.threads) as pool:
        return _solve(arrays, run, pool)


def _solve(arrays: PlacementArrays, run: Run, pool: ThreadPoolExecutor | None) -> Outcome:
    coupling = Coupling(arrays)
    if num_domains(arrays, (arrays.slots > 0)[None])[0] < max(arrays.required, 1):
        run.prove(np.inf, "too few failure domains have room")
        return run.outcome(Stop.INFEASIBLE, np.zeros(arrays.num_places))
    dual = Dual(_oracle(arrays, pool))
    _find_prices(run, dual)
    if dual.bound > worst_cost(arrays):
        run.prove(np.inf, "no placement keeps the shared limits")
    else:
        _find_placement(run, dual)
    price = dual.best_theta[coupling.memory] / arrays.expert_bytes
    return run.outcome(run.stop, price)


def _oracle(arrays: PlacementArrays, pool: ThreadPoolExecutor | None) -> Oracle:
    if count_sets(arrays) <= ENUMERABLE_SETS:
        return EnumeratingOracle(arrays, enumerate_sets(arrays), pool)
    return AscentOracle(arrays, pool)


def _find_placement(run: Run, dual: Dual) -> None:
    holders = _round(run, dual)
    _prove(run, dual)
    for size in CORE_SIZES:
        if run.is_over:
            break
        _restricted(run, dual, holders if run.incumbent is None else run.incumbent.holders, size)
        _prove(run, dual)
    _prove(run, dual, most_shares=PROOF_SHARES)


def _find_prices(run: Run, dual: Dual) -> None:
    deadline = run.seconds + DUAL_SHARE * run.seconds_left
    hopeless = worst_cost(run.arrays)

    def keep_going() -> bool:
        if np.isfinite(dual.bound):
            run.prove(dual.bound, "prices")
        return run.seconds < deadline and not run.is_interrupted and dual.bound <= hopeless

    dual.solve(0.05 * run.settings.gap, keep_going=keep_going)


def _scorer(dual: Dual) -> Scorer:
    new = dual.coupling.arrays.new_copies
    return Scorer(dual.coupling.arrays, dual.coupling.layer_costs(dual.best_theta), None if new is None else new.price)


def _round(run: Run, dual: Dual) -> Bools:
    """Offer the best answer's holders, repaired, filled and improved by swaps; return them."""
    scorer = _scorer(dual)
    holders = fill(scorer, repair(scorer, dual.best_answer.held))
    _offer_holders(run, dual, holders, "rounding")
    if not run.is_over:
        holders = swap(scorer, holders, SWAP_ROUNDS, keep_going=lambda: run.seconds_left > 0)
        _offer_holders(run, dual, holders, "swaps")
    return holders


def _offer_holders(run: Run, dual: Dual, holders: Bools, phase: str) -> None:
    """Offer holders, each ingress asking its cheapest at prices; where calls share rows, with the best shares too."""
    arrays = run.arrays
    run.offer(served_by_nearest(arrays, holders, dual.coupling.layer_costs(dual.best_theta)), phase)
    if not arrays.is_separable and not run.is_over and holders_are_feasible(arrays, holders):
        _offer_shares(run, dual, SetOptions(np.arange(arrays.num_experts), holders), phase)


def _restricted(run: Run, dual: Dual, known: Bools, size: int) -> None:
    """Offer the best choice among the columns of the `size` most undecided experts."""
    slack = 1e-3 * dual.coupling.unit
    columns = _near_columns(dual, known, slack)
    while columns is None or (np.bincount(columns.expert) > 1).sum() < size:
        wider = _near_columns(dual, known, 3 * slack)
        if wider is None or (columns is not None and len(wider) == len(columns)):
            break
        slack, columns = 3 * slack, wider
    if columns is not None:
        columns = most_undecided(columns, known, num_experts=size, per_expert=COLUMNS_PER_EXPERT)
        _offer_columns(run, dual, columns, f"{size} undecided")


def _near_columns(dual: Dual, known: Bools, slack: float) -> Columns | None:
    """Columns of the near ties, of what was best of late (where shares matter), and of the placement `known`."""
    ties = dual.oracle.near_ties(dual.best_theta, dual.best_answer, slack, most=PROOF_COLUMNS)
    if ties is None:
        return None
    experts = np.arange(len(known))
    ties = NearTies(np.concatenate([ties.expert, experts]), np.concatenate([ties.held, known]))
    is_enough = dual.coupling.arrays.is_separable and dual.oracle.lists_ties
    answers = (dual.best_answer, *(() if is_enough else dual.recent))
    return collect(dual.coupling, dual.best_theta, dual.best_answer.lower, ties, answers)


def _limits(run: Run, share: float = 1.0) -> ModelLimits:
    gap, seconds = run.settings.gap, share * run.seconds_left
    return ModelLimits(seconds, 0.1 * gap, run.bound * (1 + 0.5 * gap), run.settings.seed)


def _offer_columns(run: Run, dual: Dual, columns: Columns, phase: str) -> ModelResult:
    """Solve the model of these columns and offer its placement, with free memory filled."""
    coupling = dual.coupling
    excess_price = EXCESS * (dual.best_theta + 0.1 * coupling.scale)[coupling.rows]
    picked, result = choose_columns(coupling, columns, excess_price, _limits(run, MODEL_SHARE))
    if picked is not None:
        holders = columns.held[picked]
        run.offer(as_incumbent(run.arrays, holders, serve_whole(columns.place[:, picked])), phase)
        _offer_holders(run, dual, fill(_scorer(dual), holders), phase)
    return result


def _offer_shares(run: Run, dual: Dual, options: SetOptions, phase: str) -> ModelResult:
    """Solve the exact model of these sets and offer its placement."""
    found, result = choose_sets_and_shares(dual.coupling, options, _limits(run))
    if found is not None:
        run.offer(as_incumbent(run.arrays, *found), phase)
    return result


def _prove(run: Run, dual: Dual, most_shares: int = QUICK_SHARES) -> None:
    """Close the gap with a model of every set that a better placement could use, where there are few enough.

    A set whose reduced cost exceeds incumbent − bound belongs to no better placement; without an incumbent, a set
    whose reduced cost exceeds the cost of the worst placement − bound belongs to none at all.
    """
    if run.is_over:
        return
    ceiling = worst_cost(run.arrays) if run.incumbent is None else run.incumbent.objective
    slack = ceiling - dual.bound + dual.oracle.rounding * float(dual.best_answer.lower.max()) + 1e-9 * abs(ceiling)
    few = dual.oracle.near_ties(dual.best_theta, dual.best_answer, slack, most=PROOF_COLUMNS)
    if few is None:
        return
    ties = dual.oracle.near_ties(dual.best_theta, dual.best_answer, slack, most=PROOF_COLUMNS, over_all=True)
    if ties is None:
        return
    phase = "all that could matter"
    if run.arrays.is_separable:
        columns = collect(dual.coupling, dual.best_theta, dual.best_answer.lower, ties, ())
        result = _offer_columns(run, dual, columns, phase)
    else:
        options = SetOptions(ties.expert, ties.held)
        if count_shares(run.arrays, options) > most_shares:
            return
        result = _offer_shares(run, dual, options, phase)
    run.prove(result.bound, "proof")
