"""The solver by regions on tiny problems cut into regions by force: bound ≤ brute force ≤ incumbent, always feasible."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.solvers.decomposition.arrays import PlacementArrays, Settings, Stop
from planner.solvers.decomposition.evaluate import holders_are_feasible, objective_of, rows_are_kept, worst_cost
from planner.solvers.regions import partition
from planner.solvers.regions.solve import solve_regions
from tests.small_arrays import brute_force, draw_arrays

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FEW = settings(QUICK, max_examples=50)  # of what the first property's problems show as well
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def small_regions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "FEWEST_NODES", 1)
        patch.setattr(partition, "MOST_NODES", 2)
        yield


def draw(seed: int, *, coupled: bool) -> PlacementArrays:
    """A tiny problem within what the solver by regions knows."""
    arrays = dataclasses.replace(draw_arrays(seed, coupled=coupled), makespan=None)
    if arrays.new_copies is not None:
        arrays = dataclasses.replace(arrays, new_copies=dataclasses.replace(arrays.new_copies, limit=None))
    return arrays


@QUICK
@given(SEEDS, st.booleans())
def test_bound_optimum_and_incumbent_are_in_order(seed: int, coupled: bool) -> None:
    arrays = draw(seed, coupled=coupled)
    outcome, optimum = solve_regions(arrays, Settings(gap=1e-6, time_limit_s=20)), brute_force(arrays)
    tolerance = 1e-6 * max(1.0, worst_cost(arrays))
    assert outcome.bound <= optimum + tolerance
    if outcome.stop is Stop.INFEASIBLE:
        assert np.isinf(optimum)
    if outcome.incumbent is None:
        return
    holders, serving = outcome.incumbent.holders, outcome.incumbent.serving
    assert holders_are_feasible(arrays, holders)
    assert rows_are_kept(arrays, serving)
    assert holders[serving.expert, serving.place].all()
    assert outcome.incumbent.objective == pytest.approx(objective_of(arrays, holders, serving))
    assert outcome.incumbent.objective >= optimum - tolerance


@FEW
@given(SEEDS)
def test_the_same_seed_gives_the_same_placement(seed: int) -> None:
    arrays = draw(seed, coupled=False)
    one, other = (solve_regions(arrays, Settings(time_limit_s=20, seed=3)) for _ in range(2))
    assert one.bound == other.bound
    assert (one.incumbent is None) == (other.incumbent is None)
    if one.incumbent is not None and other.incumbent is not None:
        assert (one.incumbent.holders == other.incumbent.holders).all()


@FEW
@given(SEEDS, st.integers(0, 6))
def test_an_interrupted_solve_keeps_what_it_has(seed: int, steps: int) -> None:
    arrays = draw(seed, coupled=False)
    told = []

    def on_progress(progress, incumbent):
        told.append((progress, incumbent))
        return len(told) <= steps

    outcome = solve_regions(arrays, Settings(gap=0.0, time_limit_s=20, on_progress=on_progress))
    assert outcome.bound <= brute_force(arrays) + 1e-6 * max(1.0, worst_cost(arrays))
    if told and told[-1][1] is not None:
        assert outcome.incumbent is not None
        assert outcome.incumbent.objective <= told[-1][1].objective
