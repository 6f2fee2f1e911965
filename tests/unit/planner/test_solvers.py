"""What the exact solvers share: cut terms, statuses, gaps, explanations, sizes of the quickstart."""

from dataclasses import replace

import highspy
import numpy as np
import pytest

from planner.errors import BrokenPlacement, NoPlacementFound
from planner.solve import recheck, solve
from planner.solvers.base import Result, SolveStatus, StopReason, relative_gap, with_status
from planner.solvers.choose import find_solver
from planner.solvers.cpsat.scaling import integer_costs, integer_row
from planner.solvers.milp.explain import explain
from planner.solvers.terms import exact_terms
from tests.planning import line, model_spec, node, problem_of, topology_of


@pytest.fixture
def quickstart():
    """Four layers of sixteen experts on three nodes with two or three tiers each."""
    nodes = [
        node("a", device=13, host=7, rate=20),
        node("b", device=20, host=7, disk=3, rate=10),
        node("c", device=25, host=5, disk=7, rate=30),
    ]
    return problem_of(topology_of(nodes, line("a", "b", "c")), model_spec(layers=4, experts=16), seed=1)


def test_highs_is_one_that_can_be_believed():
    """HiGHS 1.14.0 says 15, and that it is optimal (its issue 3043)."""
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    one, whole = model.addVariable(0, 10, 2), model.addIntegral(0, 10, 3)
    model.addConstr(one + whole >= 4.5)
    model.run()
    assert model.getInfo().objective_function_value == pytest.approx(9)


def test_a_bound_below_nothing_is_rounding():
    placed = np.ones((1, 1, 1), dtype=bool)
    result = Result(
        solver="milp", status=SolveStatus.FEASIBLE, stop_reason=StopReason.FINISHED, seconds=0.0, placed=placed,
        objective=0.0, bound=-1e-15,
    )  # fmt: skip
    assert with_status(result, 1e-7).status is SolveStatus.OPTIMAL


def test_exact_solvers_agree_at_the_quickstart_s_size(quickstart):
    found = [solve(quickstart, name, in_process=True).result for name in ("milp", "milp:cbc", "cpsat")]
    assert all(result.status is SolveStatus.OPTIMAL for result in found)
    assert all(result.gap <= 1e-4 for result in found)
    assert [result.objective for result in found] == pytest.approx([found[0].objective] * 3, rel=1e-6)


def test_rows_that_cannot_bind_are_left_out(quickstart):
    assert not exact_terms(quickstart, "additive-latency").coupled
    slow = replace(quickstart, compute_limit=quickstart.compute_limit * 1e-3)
    assert exact_terms(slow, "additive-latency").load_nodes.tolist() == [0, 1, 2]


def test_more_memory_never_costs_more(quickstart):
    values = []
    for factor in (1.0, 1.2, 1.5):
        larger = replace(quickstart, capacity_bytes=(quickstart.capacity_bytes * factor).astype(np.int64))
        values.append(solve(larger, "milp", in_process=True).result.objective)
    assert values == sorted(values, reverse=True)


def test_a_gap_is_absent_without_a_bound():
    assert relative_gap(1.0, None) is None
    assert relative_gap(0.0, 0.0) == 0.0
    result = Result(solver="x", status=SolveStatus.UNKNOWN, stop_reason=StopReason.TIME, seconds=1.0)
    assert with_status(result, 0.1) is result
    placed = replace(result, placed=np.ones((1, 1, 1), dtype=bool), objective=2.0)
    assert with_status(placed, 0.1).status is SolveStatus.FEASIBLE
    assert with_status(replace(placed, bound=1.9), 0.1).status is SolveStatus.OPTIMAL
    assert with_status(replace(placed, bound=2.1), 0.1).bound == 2.0


def test_integers_never_exceed_what_they_stand_for():
    weights = np.random.default_rng(0).random((3, 4, 5))
    costs, scale = integer_costs(weights, 1)
    assert (costs <= weights * scale).all()
    assert np.abs(costs / scale - weights).max() < 1e-12
    coefficients, limit = integer_row(weights.ravel(), 7.5, 1 << 16)
    ratio = limit / coefficients.sum() / (1 << 16)
    assert ratio >= 7.5 / weights.sum()
    assert ratio == pytest.approx(7.5 / weights.sum(), rel=1e-4)


def test_a_bound_above_the_checked_objective_is_not_believed(quickstart, caplog):
    honest = solve(quickstart, "dancemoe").result
    claimed = replace(honest, solver="liar", bound=honest.objective * 2)
    solved = recheck(quickstart, claimed, objective="additive-latency", gap=1e-7)
    assert solved.result.bound is None
    assert solved.result.status is SolveStatus.FEASIBLE
    assert "liar claims bound" in caplog.text


def test_a_placement_that_breaks_memory_is_not_believed(quickstart):
    everything = Result(
        solver="liar",
        status=SolveStatus.OPTIMAL,
        stop_reason=StopReason.GAP,
        seconds=0.0,
        placed=np.ones((quickstart.num_places, 4, 16), dtype=bool),
    )
    with pytest.raises(BrokenPlacement, match="liar breaks constraints"):
        recheck(quickstart, everything, objective="additive-latency", gap=1e-7)


def test_no_placement_and_no_proof_is_said(quickstart):
    nothing = Result(solver="slow", status=SolveStatus.UNKNOWN, stop_reason=StopReason.TIME, seconds=3.0)
    with pytest.raises(NoPlacementFound, match=r"slow found no placement in 3\.0 s \(time\); raise --time-limit"):
        recheck(quickstart, nothing, objective="additive-latency", gap=1e-7)


def test_compute_is_blamed_only_where_memory_is_not(quickstart):
    slow = replace(quickstart, compute_limit=np.full(3, 1e-3))
    [first, *_] = explain(slow)
    assert first.constraint == "load"
    assert first.value > first.limit


def test_unknown_solver():
    with pytest.raises(ValueError, match="there are auto, decomposition"):
        find_solver("quantum")
