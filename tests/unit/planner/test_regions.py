"""Regions: what is joined, what rows weigh, and a generated cluster from topology to re-checked plan."""

import dataclasses

import numpy as np
import pytest

from planner.solve import solve
from planner.solvers import routing
from planner.solvers.base import SolveLimits
from planner.solvers.decomposition.arrays import Settings
from planner.solvers.decomposition.evaluate import nearest_places
from planner.solvers.decomposition.solver import placement_arrays
from planner.solvers.regions.of_problem import arrays_without_rows, problem_rows
from planner.solvers.regions.partition import between_regions, find_regions
from planner.solvers.regions.rows import flow_of, sparse_rows
from planner.solvers.regions.savings import savings
from planner.solvers.regions.serve import serve
from planner.solvers.regions.solve import solve_regions
from tests.bench.planner_instances import generate_regions, with_load, with_makespan
from tests.bench.regional_clusters import make_problem, region_of_nodes


@pytest.fixture(scope="module")
def cluster():
    return make_problem(60, layers=2, experts=16, fill=2.0, seed=5)


def test_nodes_that_are_near_form_a_region(cluster):
    meant = region_of_nodes(60, np.random.default_rng(5))
    found = find_regions(arrays_without_rows(cluster, "additive-latency")).of_place[np.argsort(cluster.place_node)]
    pairs = {(int(a), int(b)) for a, b in zip(meant[cluster.place_node], found, strict=True)}
    assert len(pairs) == len(set(meant.tolist())) == len(set(found.tolist()))


def test_the_problem_between_regions_has_all_demand_and_memory():
    arrays = generate_regions(2, 8, 40, regions=4, fill=2.0)
    coarse = between_regions(arrays, find_regions(arrays))
    assert coarse.num_places == 4
    assert coarse.demand.sum() == pytest.approx(arrays.demand.sum())
    assert coarse.capacity.sum() == arrays.slots.sum()
    assert (coarse.cost.diagonal() <= coarse.cost.min(axis=1)).all()


def test_savings_are_their_definition():
    rng = np.random.default_rng(0)
    demand, paid, cost = rng.uniform(size=(70, 5)), rng.uniform(size=(70, 5)), rng.uniform(size=(5, 6))
    expected = (demand[:, :, None] * np.maximum(paid[:, :, None] - cost, 0)).sum(axis=1)
    np.testing.assert_allclose(savings(demand, paid, cost), expected)


def test_sparse_rows_are_the_dense_ones(cluster):
    busy = dataclasses.replace(cluster, tokens_per_s=50 * cluster.tokens_per_s)
    dense, rows = sparse_rows(placement_arrays(busy, "additive-latency")), problem_rows(busy)
    assert len(rows.limit) > 60
    np.testing.assert_allclose(rows.weight.toarray(), dense.weight.toarray())
    np.testing.assert_allclose(rows.limit, dense.limit)


def test_a_cluster_is_planned_from_topology_to_recheck():
    cluster = make_problem(30, layers=8, experts=32, fill=2.0, seed=5)
    solved = solve(
        cluster, "decomposition", objective="additive-latency", limits=SolveLimits(time_s=60), in_process=True
    )
    assert solved.result.gap < 0.02


def test_calls_leave_the_nearest_holder_where_it_is_too_busy():
    arrays = with_load(generate_regions(4, 16, 40, regions=4, fill=3.0, seed=1), headroom=3.0)
    outcome = solve_regions(arrays, Settings(gap=1e-3, time_limit_s=60))
    rows, holders = sparse_rows(arrays), outcome.incumbent.holders
    nearest = nearest_places(arrays, holders, arrays.cost[None]).astype(np.int64)
    assert rows.broken(rows.use(flow_of(arrays, nearest))).any()
    service = serve(arrays, rows, holders)
    assert not rows.broken(rows.use(flow_of(arrays, service.place.astype(np.int64)))).any()
    assert outcome.gap < 0.05


def test_whole_calls_cost_little_more_than_split_ones(cluster, monkeypatch):
    placed = solve(
        cluster, "decomposition", objective="additive-latency", limits=SolveLimits(time_s=60), in_process=True
    ).placed
    load = routing.node_load(cluster, routing.nearest(cluster, placed, "additive-latency"))
    limit = np.where(load == load.max(), 0.9 * load.max(), cluster.compute_limit)
    tight = dataclasses.replace(cluster, compute_limit=limit)
    split = routing.routed_cost(tight, placed, "additive-latency")
    monkeypatch.setattr(routing, "MOST_SHARES", 0)
    whole = routing.routed_cost(tight, placed, "additive-latency")
    assert split <= whole * (1 + 1e-9)
    assert whole < 1.02 * split


def test_what_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="heaviest nodes"):
        solve_regions(with_makespan(generate_regions(1, 4, 10, regions=2)))
