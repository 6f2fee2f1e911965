"""The decomposition's promises apart from optimality: stopping, starting, determinism, refusal."""

import dataclasses

import numpy as np
import pytest

from planner.solvers.decomposition import oracle
from planner.solvers.decomposition.arrays import PlacementArrays, Settings, Stop, gap_of
from planner.solvers.decomposition.evaluate import holders_are_feasible, rows_are_kept
from planner.solvers.decomposition.holder_sets import count_sets, enumerate_sets
from planner.solvers.decomposition.oracle import EnumeratingOracle
from planner.solvers.decomposition.solve import solve_arrays
from tests.bench.planner_instances import generate, with_load, with_makespan


@pytest.fixture(scope="module")
def arrays() -> PlacementArrays:
    return generate(8, 16, 4, seed=1)


def test_an_additive_problem_is_certified(arrays):
    outcome = solve_arrays(arrays, Settings(gap=1e-6))
    assert outcome.stop is Stop.GAP
    assert outcome.gap <= 1e-6
    assert holders_are_feasible(arrays, outcome.incumbent.holders)


@pytest.mark.parametrize("couple", [with_load, with_makespan, lambda arrays: with_makespan(with_load(arrays))])
def test_load_and_heaviest_nodes_are_certified_closely(arrays, couple):
    coupled = couple(arrays)
    outcome = solve_arrays(coupled, Settings(gap=1e-2))
    assert outcome.gap <= 1e-2
    assert rows_are_kept(coupled, outcome.incumbent.serving)
    assert outcome.bound >= solve_arrays(arrays, Settings(gap=1e-2)).bound * (1 - 1e-2)


def test_without_time_there_is_still_a_placement_and_a_bound(arrays):
    outcome = solve_arrays(arrays, Settings(gap=1e-9, time_limit_s=0.0))
    assert outcome.stop is Stop.TIME
    assert outcome.bound <= outcome.incumbent.objective
    assert holders_are_feasible(arrays, outcome.incumbent.holders)


def test_an_interruption_hands_over_what_there_is(arrays):
    seen = []

    def stop_at_third(progress, incumbent):
        seen.append((progress, incumbent))
        return len(seen) < 3

    outcome = solve_arrays(arrays, Settings(gap=1e-9, on_progress=stop_at_third))
    assert outcome.stop is Stop.INTERRUPTED
    assert outcome.incumbent is not None
    assert outcome.bound >= seen[0][0].bound


def test_history_only_improves(arrays):
    history = solve_arrays(arrays, Settings(gap=1e-9)).history
    bounds = [progress.bound for progress in history]
    values = [progress.objective for progress in history if progress.objective is not None]
    assert bounds == sorted(bounds)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_repeat_whatever_the_threads(arrays, threads):
    coupled = with_makespan(arrays)
    one, other = (solve_arrays(coupled, Settings(gap=5e-3, threads=count, seed=5)) for count in (1, threads))
    assert one.incumbent.objective == other.incumbent.objective
    assert one.bound == other.bound
    np.testing.assert_array_equal(one.incumbent.holders, other.incumbent.holders)


def test_a_current_placement_is_where_it_starts(arrays):
    best = solve_arrays(arrays, Settings(gap=1e-6)).incumbent
    again = solve_arrays(arrays, Settings(gap=1e-6), start=best.holders)
    assert again.history[0].phase == "current placement"
    assert again.history[0].objective == pytest.approx(best.objective)
    assert again.incumbent.objective <= best.objective + 1e-12


def test_a_current_placement_that_does_not_fit_is_no_incumbent(arrays):
    everywhere = np.ones((arrays.num_experts, arrays.num_places), dtype=bool)
    outcome = solve_arrays(arrays, Settings(gap=1e-6), start=everywhere)
    assert outcome.history[0].objective is None
    assert outcome.gap <= 1e-6


def test_too_little_memory_is_proved_infeasible(arrays):
    tight = dataclasses.replace(arrays, capacity=np.full(4, arrays.num_experts / 4 - 1))
    outcome = solve_arrays(tight)
    assert outcome.stop is Stop.INFEASIBLE
    assert outcome.incumbent is None
    assert outcome.bound == np.inf


def test_more_domains_than_there_are_is_infeasible(arrays):
    outcome = solve_arrays(dataclasses.replace(arrays, required=2, domain_of_node=np.zeros(4, dtype=np.int64)))
    assert outcome.stop is Stop.INFEASIBLE


def test_every_fault_of_the_arrays_is_told_at_once(arrays):
    with pytest.raises(
        ValueError, match=r"cost has values.*; capacity has shape \(3,\), expected \(4,\).*; demand has"
    ):
        dataclasses.replace(
            arrays, cost=np.full((4, 4), np.nan), capacity=np.ones(3), demand=np.full(arrays.demand.shape, -1.0)
        )


def test_sets_have_one_tier_per_node_and_enough_domains(arrays):
    tiers = dataclasses.replace(
        generate(1, 2, 3),
        capacity=np.ones(3),
        node_of_place=np.array([0, 0, 1]),
        required=2,
        domain_of_node=np.array([0, 1]),
    )
    sets = enumerate_sets(tiers)
    assert count_sets(tiers) == 3 * 2
    assert sorted(map(tuple, sets.member.tolist())) == [(False, True, True), (True, False, True)]


def test_rounding_to_float32_only_lowers_the_bound(arrays, monkeypatch):
    sets = enumerate_sets(arrays)
    exact = EnumeratingOracle(arrays, sets)
    theta = 0.2 * exact.coupling.scale
    monkeypatch.setattr(oracle, "EXACT_CELLS", 0)
    rounded = EnumeratingOracle(arrays, sets)
    assert rounded.rounding > 0
    low, true = rounded.answer(theta).lower, exact.answer(theta).lower
    assert (low <= true).all()
    assert low == pytest.approx(true, rel=1e-5)


def test_a_bound_from_few_sets_is_made_good_by_a_pass_over_all(arrays, monkeypatch):
    whole = solve_arrays(arrays, Settings(gap=1e-6))
    monkeypatch.setattr(oracle, "WHOLE_SETS", 4)
    monkeypatch.setattr(oracle, "FIRST_SETS", 4)
    part = solve_arrays(arrays, Settings(gap=1e-6))
    assert part.bound <= whole.incumbent.objective * (1 + 1e-9)
    assert part.bound == pytest.approx(whole.bound, rel=1e-4)


def test_a_bound_that_passes_the_objective_by_rounding_is_no_gap():
    assert gap_of(1.0, 1.0 + 1e-12) == 0.0
