"""The latency solver: levels, input, stopping, and what it finds where the answer is known."""

from itertools import count

import numpy as np
import pytest

from planner.solvers.latency import (
    InvalidInstance,
    LatencyInstance,
    Limits,
    Progress,
    Schedule,
    latency_instance,
    solve_latency,
    waits,
)
from planner.solvers.latency.holders import any_placement, holder_sets
from planner.solvers.latency.patterns import layers_of, levels_of
from planner.solvers.latency.solve import violations

QUICK = Schedule(dual_steps=80, rounds=2, select_steps=500, more_dual_steps=20)


def recorded(
    seed: int = 0, *, nodes: int = 3, layers: int = 4, experts: int = 12, tokens: int = 120
) -> tuple[np.ndarray, ...]:
    """Each ingress prefers experts of its own, three of them per event."""
    rng = np.random.default_rng(seed)
    events = []
    for node in range(nodes):
        liking = rng.gumbel(size=(tokens, layers, experts))
        liking[:, :, node * experts // nodes : (node + 1) * experts // nodes] += 2.5
        events.append(np.argsort(-liking, axis=2)[:, :, :3].astype(np.int16))
    return tuple(events)


def instance(seed: int = 0, **changes) -> LatencyInstance:
    given = {
        "tokens_per_s": [1.0, 2.0, 1.0],
        "cost_s": 0.01 * (1 - np.eye(3)),
        "capacity": [16, 20, 24],
        "node_of_place": np.arange(3),
        "num_experts": 12,
    } | changes
    return latency_instance(
        recorded(seed), given.pop("tokens_per_s"), given.pop("cost_s"), given.pop("capacity"), **given
    )


def test_levels_add_up_to_the_cost():
    cost = np.array([[0.0, 0.02, 0.005], [0.01, 0.01, 0.0]])
    levels = levels_of(cost)
    steps = np.vstack([np.zeros(2), np.cumsum(levels.step, axis=0)])
    rebuilt = levels.base[:, None] + np.take_along_axis(steps.T, levels.rank, axis=1)
    np.testing.assert_allclose(rebuilt, cost)


def test_merged_levels_never_cost_more():
    cost = np.random.default_rng(0).random((4, 9))
    levels = levels_of(cost, max_levels=3)
    steps = np.vstack([np.zeros(4), np.cumsum(levels.step, axis=0)])
    rebuilt = levels.base[:, None] + np.take_along_axis(steps.T, levels.rank, axis=1)
    assert levels.num_questions == 2
    assert (rebuilt <= cost + 1e-12).all()


def test_merged_events_give_the_wait_of_the_recorded_ones():
    problem = instance(cost_s=np.array([[0, 0.01, 0.03], [0.02, 0, 0.01], [0.05, 0.01, 0.001]]))
    placed = any_placement(problem)
    assert placed is not None
    merged = sum(layer.wait(hold) for layer, hold in zip(layers_of(problem), placed.transpose(1, 2, 0), strict=True))
    assert merged == pytest.approx(float(problem.tokens_per_s @ waits(problem, placed)))


def test_gap_is_small_and_the_placement_feasible():
    outcome = solve_latency(instance(), limits=Limits(time_s=1e6))
    assert outcome.placed is not None
    assert violations(instance(), outcome.placed) == []
    assert outcome.gap is not None
    assert outcome.gap < 0.06
    assert outcome.stop_reason == "finished"


def test_all_experts_everywhere_wait_for_nobody():
    outcome = solve_latency(instance(capacity=[48, 48, 48]), schedule=QUICK)
    assert outcome.objective == 0.0
    assert outcome.stop_reason == "gap"


def test_a_node_takes_whole_layers_rather_than_parts_of_many():
    """With uniform choices of 3 of 12 experts, half of each layer is worth far less than half of the layers."""
    rng = np.random.default_rng(1)
    events = tuple(np.argsort(rng.random((200, 4, 12)), axis=2)[:, :, :3].astype(np.int16) for _ in range(2))
    problem = latency_instance(
        events, [1, 1], 0.01 * (1 - np.eye(2)), [24, 24], node_of_place=np.arange(2), num_experts=12
    )
    outcome = solve_latency(problem)
    assert outcome.placed is not None
    assert sorted(outcome.placed.sum(axis=2).ravel().tolist()) == [0, 0, 0, 0, 12, 12, 12, 12]
    assert outcome.objective == pytest.approx(0.04)
    assert outcome.gap is not None


def test_impossible_memory_is_infeasible():
    outcome = solve_latency(instance(capacity=[10, 10, 10]))
    assert outcome.placed is None
    assert outcome.objective is None
    assert outcome.gap is None
    assert outcome.stop_reason == "infeasible"


def test_two_copies_on_different_nodes_even_with_tiers():
    problem = instance(
        cost_s=np.array([[0, 0.001, 0.01, 0.01], [0.01, 0.011, 0, 0.01], [0.01, 0.011, 0.01, 0]]),
        capacity=[20, 30, 30, 30],
        node_of_place=[0, 0, 1, 2],
        required=2,
    )
    outcome = solve_latency(problem, schedule=QUICK)
    assert outcome.placed is not None
    assert violations(problem, outcome.placed) == []


def test_the_result_is_never_worse_than_the_warm_start():
    best = solve_latency(instance()).placed
    assert best is not None
    again = solve_latency(instance(), warm_start=best, schedule=Schedule(dual_steps=10, rounds=1, select_steps=10))
    assert again.objective is not None
    assert again.objective <= float(instance().tokens_per_s @ waits(instance(), best)) + 1e-12


def test_an_infeasible_warm_start_is_refused():
    with pytest.raises(InvalidInstance, match="warm start"):
        solve_latency(instance(), warm_start=np.ones((3, 4, 12), dtype=bool))


def test_what_is_not_acceptable_is_never_returned():
    refused = solve_latency(instance(), schedule=QUICK, acceptable=lambda _: False)
    assert refused.placed is None
    limited = solve_latency(instance(), schedule=QUICK, acceptable=lambda placed: placed[0].sum() < 16)
    assert limited.placed is None or limited.placed[0].sum() < 16


def test_interrupted_at_any_moment_it_has_a_placement_and_a_bound():
    for stop_at in (1, 3, 20, 200):
        calls = count()
        outcome = solve_latency(instance(), should_stop=lambda calls=calls, at=stop_at: next(calls) >= at)
        assert outcome.placed is not None
        assert outcome.objective is not None
        assert 0 <= outcome.bound <= outcome.objective
        assert outcome.stop_reason == "interrupted"


def test_out_of_time_it_says_so():
    ticks = count()
    outcome = solve_latency(instance(), limits=Limits(time_s=5), clock=lambda: float(next(ticks)))
    assert outcome.placed is not None
    assert outcome.stop_reason == "time"


def test_progress_only_gets_better():
    heard: list[Progress] = []
    outcome = solve_latency(instance(), schedule=QUICK, report=heard.append)
    objectives = [item.objective for item in heard if item.objective is not None]
    bounds = [item.bound for item in heard]
    assert objectives == sorted(objectives, reverse=True)
    assert bounds == sorted(bounds)
    assert objectives[-1] == outcome.objective


def test_a_place_that_is_worth_more_has_a_higher_price():
    cost = np.array([[0, 0.05, 0.05], [0.05, 0, 0.05], [0.05, 0.05, 0]])
    outcome = solve_latency(instance(cost_s=cost, tokens_per_s=[10.0, 1.0, 0.1]), schedule=QUICK)
    assert outcome.slot_price[0] > outcome.slot_price[1] > outcome.slot_price[2]


def test_sets_of_many_nodes_are_not_enumerated_and_the_bound_still_holds():
    nodes = 14
    events = recorded(nodes=nodes, experts=28, tokens=30)
    problem = latency_instance(
        events, np.ones(nodes), 0.01 * (1 - np.eye(nodes)), [12] * nodes, node_of_place=np.arange(nodes), num_experts=28
    )
    assert not holder_sets(problem).complete
    outcome = solve_latency(problem, schedule=QUICK)
    assert outcome.objective is not None
    assert 0 < outcome.bound <= outcome.objective


def test_every_fault_of_the_input_is_named():
    with pytest.raises(InvalidInstance) as caught:
        instance(cost_s=np.full((3, 3), np.nan), tokens_per_s=[0.0, 0.0, 0.0], required=0)
    assert len(caught.value.faults) == 3
    with pytest.raises(InvalidInstance, match=r"experts 0\.\.11 of 8"):
        instance(num_experts=8)
    with pytest.raises(InvalidInstance, match="no ingress"):
        latency_instance((), [], np.zeros((0, 1)), [1], node_of_place=[0], num_experts=1)


def test_costs_may_differ_by_layer():
    cost = np.repeat(0.01 * (1 - np.eye(3))[:, None, :], 4, axis=1)
    cost[:, 2:] *= 5
    problem = instance(cost_s=cost)
    outcome = solve_latency(problem, schedule=QUICK)
    assert outcome.placed is not None
    assert violations(problem, outcome.placed) == []
