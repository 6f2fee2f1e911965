"""Paths: what they cost and take, the cheapest rings and shares of layers, and what a plan says of them."""

from itertools import permutations, product

import numpy as np
import pytest

from planner.assemble import trunk_paths
from planner.errors import InfeasibleProblem
from planner.journey_report import path_lines
from planner.objective import judge, layer_waits, path_seconds
from planner.problem import build_problem
from planner.solve import solve
from planner.solvers.base import SolveLimits
from planner.solvers.events import UnsuitedSolver
from planner.trunk.bound import blame_of, joint_bound, trunk_bound
from planner.trunk.rings import all_rings, grown_rings
from planner.trunk.spans import find_spans, path_of, share_layers, share_layers_wrapped
from planner.trunk.story import path_summaries
from planner.trunk.viterbi import better_paths, ring_path
from tests.planning import line, model_spec, node, problem_of, topology_of

MOVE = {"trunk": {"mode": "move"}}
LIMITS = SolveLimits(time_s=5, gap=1e-5)


def cluster(*rooms, latency="5 ms", model=None, rates=(10,), **rest):
    """Nodes a, b, … with so many experts of room each, all linked; tokens enter at the first ones."""
    names = "abcdef"[: len(rooms)]
    nodes = [
        node(name, device=room, rate=rates[number] if number < len(rates) else None, trunk_layer_us=100)
        for number, (name, room) in enumerate(zip(names, rooms, strict=True))
    ]
    links = [
        {"between": [first, second], "latency": latency, "bandwidth": "500 Mbit/s"}
        for number, first in enumerate(names)
        for second in names[:number]
    ]
    model = model or model_spec(layers=4, experts=4, top_k=2)
    return problem_of(topology_of(nodes, links, **{**MOVE, **rest}), model)


def test_memory_of_a_path_is_that_of_the_layers_it_runs_and_of_every_ingress():
    model = model_spec(
        layers=3, decoder_layers=6, moe_layers=(1, 2, 4), trunk_layer_bytes=10, embedding_bytes=7, input_bytes=5,
        head_bytes=6, kv_bytes_per_token_layer=2,
    )  # fmt: skip
    nodes = [node(name, device=50, rate=1 if name != "c" else None) for name in "abc"]
    problem = problem_of(topology_of(nodes, line("a", "b", "c"), context={"tokens": 3, "sessions": 2}), model)
    groups, kv = [{0, 1}, {2}, {3, 4, 5}], 2 * 3 * 2
    for rows in product(product(range(3), repeat=3), repeat=2):
        trunk, used = problem.room.taken(np.array(rows))
        for number in range(3):
            union = set().union(*(groups[layer] for row in rows for layer in range(3) if row[layer] == number))
            assert trunk[number] == model.range_bytes(union)
            each = [len(groups[layer]) for row in rows for layer in range(3) if row[layer] == number]
            assert used[number] == kv * sum(each)


def test_moving_the_trunk_moves_room_demand_and_what_hops_leave_of_links():
    model = model_spec(layers=2, trunk_layer_bytes=150)
    topology = topology_of([node("a", device=9, rate=10), node("b", device=9)], line("a", "b"))
    problem = problem_of(topology, model)
    moved = problem.with_trunk(np.array([[0, 1]]))
    assert (problem.slots.tolist(), moved.slots.tolist()) == ([6, 9], [7, 7])
    assert moved.caller_demand[1, 1].sum() == pytest.approx(20)
    assert problem.link_limit - moved.link_limit == pytest.approx(2 * 10 * problem.hop_bytes)
    back = moved.with_trunk(problem.trunk_node)
    assert back.capacity_bytes.tolist() == problem.capacity_bytes.tolist()
    assert back.link_limit == pytest.approx(problem.link_limit)


def test_a_trunk_that_does_not_fit_names_node_bytes_and_context():
    model = model_spec(layers=2, trunk_layer_bytes=100, kv_bytes_per_token_layer=10)
    topology = topology_of([node("a", device=3, rate=1)], [], context={"tokens": 20, "sessions": 1})
    with pytest.raises(InfeasibleProblem, match=r"node a: .* need 600 B .* 300 B missing; .* than 1 × 20 tokens"):
        problem_of(topology, model)
    with pytest.raises(InfeasibleProblem, match=r"no nodes have room for the trunk .* enlarge a"):
        problem_of(topology_of([node("a", device=3, rate=1)], [], context={"tokens": 20, "sessions": 1}, **MOVE), model)


def test_where_the_ingress_is_too_small_a_moving_trunk_begins_elsewhere():
    model = model_spec(layers=2, trunk_layer_bytes=100)
    topology = topology_of([node("a", device=1, rate=1), node("b", device=12)], line("a", "b"), **MOVE)
    assert problem_of(topology, model).trunk_node.tolist() == [[1, 1]]


def test_rings_are_the_cheapest_of_all_orders():
    rng = np.random.default_rng(3)
    hop = rng.uniform(1, 9, (5, 5))
    hop = (hop + hop.T) / 2
    np.fill_diagonal(hop, 0)
    rings = {frozenset(ring.nodes): ring for ring in all_rings(hop)}
    assert len(rings) == 31
    for members, ring in rings.items():
        cost = [sum(hop[a, b] for a, b in zip(o, o[1:] + o[:1], strict=True)) for o in permutations(members)]
        assert ring.hops_s == pytest.approx(min(cost))
        assert sum(hop[a, b] for a, b in zip(ring.nodes, ring.nodes[1:] + ring.nodes[:1], strict=True)) == (
            pytest.approx(ring.hops_s)
        )
    for ring in grown_rings(hop, np.array([2]), 5):
        assert ring.hops_s >= rings[frozenset(ring.nodes)].hops_s - 1e-9


def test_layers_are_shared_at_least_cost():
    rng = np.random.default_rng(5)
    layers, costs = 5, [rng.uniform(1, 9, (6, 6)) for _ in range(3)]
    value, ends = share_layers(costs)
    ways = {(a, b): costs[0][0, a] + costs[1][a, b] + costs[2][b, layers] for a, b in product(range(6), repeat=2)}
    assert value == pytest.approx(min(ways.values()))
    assert ways[ends[0], ends[1]] == pytest.approx(value)
    value, changes = share_layers_wrapped(costs[0], costs[1:])
    wrapped = {(a, b, c): costs[0][a, c] + costs[1][a, b] + costs[2][b, c] for a, b, c in product(range(6), repeat=3)}
    assert value == pytest.approx(min(wrapped.values()))
    assert wrapped[changes] == pytest.approx(value)
    assert path_of([4, 1, 4], [2, 3, 5]).tolist() == [4, 4, 1, 4, 4]


def test_the_best_ring_path_is_found_among_all_paths():
    rng = np.random.default_rng(7)
    cost, hop = rng.uniform(0, 3, (3, 4)), rng.uniform(0, 2, (3, 3))
    value, path = ring_path(cost, hop)

    def seconds(way):
        return sum(cost[n, layer] + hop[n, way[(layer + 1) % 4]] for layer, n in enumerate(way))

    assert value == pytest.approx(min(seconds(way) for way in product(range(3), repeat=4)))
    assert seconds(path.tolist()) == pytest.approx(value)


def test_spans_are_exact_where_whole_layers_fit():
    problem = cluster(10, 20)
    whole = find_spans(problem).whole_s
    assert whole[0, 0, 2] == pytest.approx(2 * problem.compute_s[0, 0])
    assert np.isinf(whole[0, 0, 3])
    assert whole[1, 0, 4] == pytest.approx(problem.compute_s[1].sum())
    wrapped = find_spans(problem, wrapped=True).whole_s
    assert wrapped[0, 1, 3] == pytest.approx(2 * problem.compute_s[0, 0])
    assert np.isinf(wrapped[0, 1, 2])


def test_where_links_are_slow_whole_layers_hop_instead_of_calling_experts():
    slow = solve(cluster(8, 8), "auto", limits=LIMITS, in_process=True)
    assert slow.judgement.wait_s.tolist() == [0.0]
    assert len(np.unique(slow.problem.trunk_node)) == 2
    hops = slow.problem.hop_s[0, 1]
    assert slow.judgement.predicted_latency_s == pytest.approx(4 * slow.problem.compute_s[0, 0] + 2 * hops)
    stay = solve(cluster(8, 8, trunk={"mode": "stay"}), "auto", limits=LIMITS, in_process=True)
    assert (stay.problem.trunk_node == 0).all()
    assert stay.judgement.predicted_latency_s > slow.judgement.predicted_latency_s
    assert {trial.name for trial in slow.trials} >= {"stay", "pipeline", "pipeline-speed"}


def test_a_node_that_has_room_for_all_keeps_the_trunk():
    solved = solve(cluster(20, 20), "auto", limits=LIMITS, in_process=True)
    assert (solved.problem.trunk_node == solved.problem.trunk_node[0, 0]).all()
    assert solved.result.gap == pytest.approx(0, abs=1e-6)


def test_pipelines_hold_whole_layers_in_proportion_to_memory_or_by_speed():
    problem = cluster(6, 18)
    shares = solve(problem, "pipeline").problem.trunk_node[0]
    assert np.bincount(shares).tolist() == [1, 3]
    solved = solve(problem, "pipeline-speed")
    held = solved.problem.held(solved.placed)
    for layer, number in enumerate(solved.problem.trunk_node[0]):
        assert held[number, layer].all()
    assert solved.judgement.any_remote_share == 0
    with pytest.raises(InfeasibleProblem, match="pipeline: whole layers do not fit"):
        solve(cluster(7, 7, 7), "pipeline")


def test_published_placements_keep_the_trunk_at_the_ingress():
    solved = solve(cluster(10, 10), "dancemoe")
    assert (solved.problem.trunk_node == 0).all()


def test_better_paths_use_only_memory_that_experts_leave():
    problem = cluster(16, 16, model=model_spec(layers=4, experts=4, top_k=2, trunk_layer_bytes=100))
    placed = np.zeros((2, 4, 4), dtype=bool)
    placed[0, :2], placed[1, 2:] = True, True
    moved = problem.with_trunk(better_paths(problem, placed))
    assert moved.trunk_node.tolist() == [[0, 0, 1, 1]]
    placed[1] = True
    assert better_paths(problem, placed).tolist() == problem.trunk_node.tolist()


def test_a_summary_adds_up_to_what_is_predicted():
    model = model_spec(layers=3, decoder_layers=6, moe_layers=(1, 2, 4), trunk_layer_bytes=1)
    solved = solve(cluster(5, 5, 5, model=model), "auto", limits=LIMITS, in_process=True)
    [summary] = path_summaries(solved.problem, solved.routing, solved.trials)
    assert [cost.layer for cost in summary.layers] == list(range(6))
    parts = np.array([[cost.compute_s, cost.wait_s, cost.hop_s] for cost in summary.layers]).sum(axis=0)
    assert parts.sum() == pytest.approx(judge(solved.problem, solved.routing).latency_s[0])
    assert parts[1] == pytest.approx(layer_waits(solved.problem, solved.routing).sum())
    assert parts[0] + parts[2] == pytest.approx(path_seconds(solved.problem)[0])
    assert "a token" in summary.why
    [path] = trunk_paths(solved.problem, model.moe_layer_indices, 6)
    runners = {layer: part.node for part in path.segments for layer in range(part.first_layer, part.last_layer + 1)}
    assert [runners[cost.layer] for cost in summary.layers] == [cost.node for cost in summary.layers]


def test_bounds_hold_where_the_optimum_is_plain():
    problem = cluster(10, 10)
    ring = 4 * problem.compute_s[0, 0] + 2 * problem.hop_s[0, 1]
    blame = blame_of(problem, "latency")
    assert blame.sum(axis=2) == pytest.approx(np.ones((1, 4)))
    assert joint_bound(problem, "latency") <= 10 * ring * (1 + 1e-9)
    assert trunk_bound(problem, blame) > 4 * problem.compute_s[0, 0]
    assert joint_bound(problem, "remote-calls") is None


def test_the_joint_model_refuses_what_it_cannot_hold():
    model = model_spec(layers=8, experts=128, top_k=4)
    problem = cluster(500, 500, 500, 500, model=model, rates=(1, 1, 1, 1))
    with pytest.raises(UnsuitedSolver, match="paths and placement together need"):
        solve(problem, "milp", limits=LIMITS, in_process=True)
    with pytest.raises(UnsuitedSolver, match="minimise latency"):
        solve(cluster(10, 10), "milp", objective="remote-calls", limits=LIMITS, in_process=True)


def test_prompts_decide_between_expert_calls_and_whole_layers():
    """Few calls cost a token less than a further hop, and a prompt more: all of its chunks call in every such layer."""
    cheap = {"expert_us": 10, "prompt_layer_us": 1, "prompt_expert_us": 0.5}

    def place(**prompts):
        nodes = [node("a", device=12, rate=10, **cheap), node("b", device=4, **cheap)]
        nodes[0]["ingress"] |= prompts
        topology = topology_of(nodes, line("a", "b", latency="5 ms"), **MOVE)
        problem = build_problem(topology, model_spec(layers=4, experts=4, top_k=1), [events])
        return solve(problem, "auto", limits=LIMITS, in_process=True)

    events = np.random.default_rng(1).choice(4, (200, 4, 1), p=[0.3, 0.3, 0.3, 0.1]).astype(np.int16)
    tokens, prompts = place(), place(prompt_tokens=256, answer_tokens=2)
    calls = tokens.judgement.wait_s[0]
    assert calls > 0
    assert tokens.judgement.latency_s[0] < 10e-3, "less than two hops"
    assert prompts.judgement.wait_s[0] == 0
    assert prompts.judgement.prompt_s[0] == pytest.approx(10e-3 + 256 * 4 * 1.5e-6, rel=0.2)
    assert prompts.result.objective == pytest.approx(10 * prompts.judgement.latency_s[0])
    assert prompts.result.bound <= prompts.result.objective
    summary = path_summaries(prompts.problem, prompts.routing, prompts.trials)[0]
    assert (summary.prompt_tokens, summary.prompt_s) == (256, prompts.judgement.prompt_s[0])
    assert "of its prompt" in summary.why
    assert "behind a prompt of 256 tokens" in next(path_lines([summary]))
