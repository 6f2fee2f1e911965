"""Bounds by dual ascent hold, and their holders may be held, whatever the prices and constraints."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.solvers.decomposition import solve
from planner.solvers.decomposition.arrays import Settings
from planner.solvers.decomposition.ascent import AscentOracle
from planner.solvers.decomposition.evaluate import admissible
from planner.solvers.decomposition.holder_sets import enumerate_sets
from planner.solvers.decomposition.oracle import EnumeratingOracle
from tests.small_arrays import brute_force, draw_arrays

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**32 - 1)


@QUICK
@given(SEEDS)
def test_no_expert_costs_less_than_its_bound_nor_more_than_its_holders(seed: int) -> None:
    arrays = draw_arrays(seed, coupled=True)
    sets = enumerate_sets(arrays)
    if len(sets) == 0:
        return
    exact, ascent = EnumeratingOracle(arrays, sets), AscentOracle(arrays)
    rng = np.random.default_rng(seed)
    theta = rng.uniform(0, 1, exact.coupling.size) * exact.coupling.scale * rng.choice([0.0, 0.3, 2.0])
    best, answer = exact.answer(theta), ascent.answer(theta)
    placeable = np.isfinite(best.lower)
    assert (answer.lower[placeable] <= best.lower[placeable] + 1e-9).all()
    experts = np.flatnonzero(placeable)
    assert admissible(arrays, answer.held[experts], experts).all()


@QUICK
@given(SEEDS)
def test_without_lists_of_sets_bound_optimum_and_incumbent_are_still_in_order(seed: int) -> None:
    arrays = draw_arrays(seed, coupled=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "ENUMERABLE_SETS", 0)
        outcome = solve.solve_arrays(arrays, Settings(gap=1e-6, time_limit_s=20))
    optimum = brute_force(arrays)
    assert outcome.bound <= optimum + 1e-6 * max(1.0, abs(optimum))
    if outcome.incumbent is not None:
        assert outcome.incumbent.objective >= optimum - 1e-6
