"""The decomposition against brute force: bound ≤ optimum ≤ incumbent on small random problems of every kind."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from planner.solvers.decomposition.arrays import PlacementArrays, Settings, Stop
from planner.solvers.decomposition.evaluate import holders_are_feasible, objective_of, rows_are_kept
from planner.solvers.decomposition.solve import solve_arrays
from tests.small_arrays import brute_force, draw_arrays, permuted

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**32 - 1)


def check_against_brute_force(arrays: PlacementArrays) -> tuple[float, float | None]:
    outcome, optimum = solve_arrays(arrays, Settings(gap=1e-7, time_limit_s=20)), brute_force(arrays)
    tolerance = 1e-6 * max(1.0, abs(optimum)) if np.isfinite(optimum) else 0.0
    assert outcome.bound <= optimum + tolerance
    if outcome.stop is Stop.INFEASIBLE:
        assert np.isinf(optimum)
    if outcome.incumbent is None:
        return optimum, None
    holders, serving, objective = outcome.incumbent.holders, outcome.incumbent.serving, outcome.incumbent.objective
    assert holders_are_feasible(arrays, holders)
    assert rows_are_kept(arrays, serving)
    assert holders[serving.expert, serving.place].all()
    assert objective == pytest.approx(objective_of(arrays, holders, serving))
    assert objective >= optimum - tolerance
    return optimum, objective


@QUICK
@given(SEEDS)
def test_separable_problems_are_solved_to_the_optimum(seed: int) -> None:
    optimum, objective = check_against_brute_force(draw_arrays(seed, coupled=False))
    assert (objective is None) == np.isinf(optimum)
    if objective is not None:
        assert objective == pytest.approx(optimum, rel=1e-6, abs=1e-9)


@QUICK
@given(SEEDS)
@example(434)  # HiGHS 1.14.0 called a wrong answer optimal
def test_bound_optimum_and_incumbent_are_in_order_where_calls_share_load_links_or_heaviest_nodes(seed: int) -> None:
    check_against_brute_force(draw_arrays(seed, coupled=True))


@QUICK
@given(SEEDS)
def test_more_memory_never_worsens_the_optimum(seed: int) -> None:
    arrays = draw_arrays(seed, coupled=False)
    roomier = dataclasses.replace(arrays, capacity=arrays.capacity + np.random.default_rng(seed).uniform(0, 14))
    less, more = (solve_arrays(each, Settings(gap=1e-9)) for each in (arrays, roomier))
    if less.incumbent is not None:
        assert more.incumbent is not None
        assert more.incumbent.objective <= less.incumbent.objective + 1e-7


@QUICK
@given(SEEDS)
def test_the_order_of_places_and_experts_does_not_change_the_optimum(seed: int) -> None:
    arrays = draw_arrays(seed, coupled=False)
    one, other = (solve_arrays(each, Settings(gap=1e-9)) for each in (arrays, permuted(arrays, seed)))
    assert (one.incumbent is None) == (other.incumbent is None)
    if one.incumbent is not None:
        assert one.incumbent.objective == pytest.approx(other.incumbent.objective, rel=1e-6, abs=1e-9)
