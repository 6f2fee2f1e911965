import dataclasses

import numpy as np
import pytest

from planner.objective import judge, layer_calls, link_load, nearest, node_load
from planner.simulate import Arrivals, build_network, simulate
from planner.simulate.arrivals import draw_requests, tokens_by_ingress
from planner.simulate.clock import run
from planner.simulate.script import build_script
from runtime.sampling import prefill_chunks
from schemas.topology import Compute
from tests.small_clusters import make_model, make_problem, make_topology, own_favourites


def cluster(**options):
    topology = make_topology([8, 10, 14], [20.0, 10.0, 30.0], **options)
    problem = make_problem(topology, make_model())
    return topology, problem, nearest(problem, own_favourites(problem), "additive-latency")


def without_compute(problem):
    """Compute that takes no time, in the costs too."""
    own = np.arange(problem.num_nodes)[:, None] == problem.place_node[None, :]
    cost = np.where(own, 0.0, problem.cost_s - problem.service_s[None, :])
    return dataclasses.replace(problem, service_s=problem.service_s * 0, cost_s=cost)


@pytest.mark.parametrize(
    ("links", "bandwidth"),
    # over a shared link two calls of one layer wait for each other, unless it is wide
    [(None, 62.5e6), ([(0, 1), (1, 2)], 1e12)],
    ids=["direct", "through n1"],
)
def test_without_queues_and_compute_latency_is_the_objectives(links, bandwidth):
    topology, problem, routing = cluster(links=links, bandwidth=bandwidth)
    problem = without_compute(problem)
    script = build_script(problem, routing, build_network(topology), problem.events)
    once_each = Arrivals(tokens=600, pattern="tokens", spacing="fixed", rate_scale=0.1)
    requests = draw_requests(np.ones(3), [200, 200, 200], once_each)
    times = run(script, requests)
    entered = requests.ingress[times.request]
    means = [times.latency_s[entered == ingress].mean() for ingress in range(3)]
    np.testing.assert_allclose(means, judge(problem, routing).wait_s, rtol=1e-6)
    np.testing.assert_allclose(times.network_s, times.latency_s, rtol=1e-6)


def test_busy_time_and_bytes_are_what_the_placement_asks_for():
    topology, problem, routing = cluster()
    arrivals = Arrivals(tokens=30_000, pattern="tokens", spacing="fixed")
    found = simulate(problem, routing, build_network(topology), arrivals)
    np.testing.assert_allclose([node.offered for node in found.nodes], node_load(problem, routing), rtol=0.02)
    seconds = 30_000 / problem.tokens_per_s.sum()
    carried = np.array([link.bytes for link in found.links]).reshape(-1, 2)
    assert (carried[:, 0] == carried[:, 1]).all(), "every call is answered over the link it came by"
    # link_load counts one message per expert, a call bundles all experts of a holder
    assert (carried.sum(axis=1) <= link_load(problem, routing) * seconds * 1.02).all()
    per_token = judge(problem, routing).mean_bytes_per_token
    assert carried.sum() / found.tokens == pytest.approx(per_token, rel=0.02)


def test_calls_by_layer_are_those_whose_bytes_are_counted():
    _, problem, routing = cluster()
    sent = layer_calls(problem, routing).sum(axis=1) * problem.call_bytes
    np.testing.assert_allclose(sent, judge(problem, routing).bytes_per_token)


def test_parts_of_the_wait_add_up():
    topology, problem, routing = cluster(
        compute=Compute(expert_us=400, trunk_layer_us=300, call_overhead_us=150), bandwidth=1e6
    )
    found = simulate(problem, routing, build_network(topology), Arrivals(tokens=5000, rate_scale=3))
    for latency in (found.total, *found.ingresses.values()):
        waits = latency.waits
        parts = waits.network_s + waits.queue_s + waits.compute_s + waits.overhead_s
        assert parts == pytest.approx(latency.mean_s, rel=1e-9)
        assert min(waits.network_s, waits.queue_s, waits.compute_s, waits.overhead_s) > 0
        assert latency.p50_s <= latency.p95_s <= latency.p99_s


def test_the_same_seed_gives_the_same_figures_and_another_seed_others():
    topology, problem, routing = cluster()
    network = build_network(topology)
    first, second, third = (simulate(problem, routing, network, Arrivals(tokens=3000, seed=s)) for s in (1, 1, 2))
    assert first.total == second.total
    assert first.links == second.links
    assert first.total != third.total


def test_queues_grow_with_the_rate_and_overload_is_named():
    topology, problem, routing = cluster(compute=Compute(expert_us=500))
    network = build_network(topology)
    waits = [
        simulate(problem, routing, network, Arrivals(tokens=4000, pattern="tokens", rate_scale=scale)).total.waits
        for scale in (1, 8, 20)
    ]
    assert waits[0].queue_s < waits[1].queue_s < waits[2].queue_s
    flooded = simulate(problem, routing, network, Arrivals(tokens=4000, pattern="tokens", rate_scale=200))
    assert flooded.overloaded


def test_single_server_queue_is_as_long_as_the_textbook_says():
    """M/D/1: mean wait = rho s / (2 (1 - rho))."""
    topology = make_topology([8], [50.0], compute=Compute(expert_us=10_000))
    problem = make_problem(topology, make_model(layers=1, top_k=1))
    routing = nearest(problem, own_favourites(problem), "additive-latency")
    found = simulate(problem, routing, build_network(topology), Arrivals(tokens=60_000, pattern="tokens"))
    assert found.total.waits.queue_s == pytest.approx(0.5 * 0.01 / (2 * 0.5), rel=0.05)


def test_closed_sessions_never_overlap_within_one():
    topology, problem, routing = cluster()
    one = simulate(problem, routing, build_network(topology), Arrivals(tokens=3000, pattern="closed"))
    many = simulate(problem, routing, build_network(topology), Arrivals(tokens=3000, pattern="closed", sessions=8))
    assert one.elapsed_s > 4 * many.elapsed_s
    assert one.total.waits.queue_s < many.total.waits.queue_s


def test_split_routes_send_each_holder_its_share():
    from planner.objective import Routing

    topology = make_topology([0, 8, 8], [10.0, 0.0, 0.0])
    problem = make_problem(topology, make_model(layers=1, top_k=1), tokens=4000)
    share = np.zeros((3, 2, 1, 8))
    share[:, 0], share[:, 1] = 0.25, 0.75
    routing = Routing(share.argmax(axis=1), share)
    found = simulate(problem, routing, build_network(topology), Arrivals(tokens=8000))
    sent = {(link.source, link.target): link.bytes for link in found.links}
    assert sent["n0", "n1"] / (sent["n0", "n1"] + sent["n0", "n2"]) == pytest.approx(0.25, abs=0.03)


def ring(**options):
    """Two nodes, the first two layers wholly at one and the last at the other, with the trunk where the experts are."""
    topology = make_topology([12, 12], [10.0, 0.0], latency=5e-3, **options)
    problem = make_problem(topology, make_model())
    placed = np.ones((2, 3, 8), dtype=bool)
    placed[0, 2] = placed[1, 0] = placed[1, 1] = False
    moved = dataclasses.replace(problem, trunk_node=np.array([[0, 0, 1]]))
    return topology, moved, nearest(moved, placed, "additive-latency")


def test_a_moving_trunk_sends_a_hidden_state_on_and_a_token_back():
    topology, problem, routing = ring(compute=Compute(expert_us=100, trunk_layer_us=300, call_overhead_us=400))
    found = simulate(problem, routing, build_network(topology), Arrivals(tokens=2000, rate_scale=0.01))
    state, token = problem.call_bytes / 2, 8
    hops = 2 * 5e-3 + (state + token) / 62.5e6
    assert found.total.waits.network_s == pytest.approx(hops, rel=1e-9)
    assert found.total.waits.hops_s == pytest.approx(hops, rel=1e-9)
    assert [link.bytes for link in found.links] == [2000 * state, 2000 * token]
    assert found.total.waits.overhead_s == pytest.approx(2 * 200e-6)  # half a call's for each hop
    assert found.total.waits.compute_s == pytest.approx(3 * (problem.top_k * 100e-6 + 300e-6))
    unloaded = judge(problem, routing).predicted_latency_s
    assert found.total.p50_s == pytest.approx(unloaded, rel=0.01)  # the plan counts the token as a hidden state


def test_compute_after_idling_takes_longer_until_the_token_leaves():
    compute = Compute(expert_us=100, trunk_layer_us=300, idle_factor=1.5)
    topology, problem, routing = ring(compute=compute)
    network = build_network(topology)
    found = simulate(problem, routing, network, Arrivals(tokens=2000, pattern="closed"))
    each = 300e-6 + problem.top_k * 100e-6
    assert found.total.waits.compute_s == pytest.approx(3 * each * 1.5)  # each end idles for 10 ms and more
    assert found.total.waits.queue_s == pytest.approx(0)
    alone = dataclasses.replace(problem, trunk_node=np.zeros_like(problem.trunk_node))
    here = dataclasses.replace(routing, holder=np.zeros_like(routing.holder))
    busy = simulate(alone, here, network, Arrivals(tokens=2000, pattern="closed"))
    assert busy.total.waits.compute_s == pytest.approx(3 * each)
    there = nearest(alone, held_elsewhere(alone), "additive-latency")
    calling = simulate(alone, there, network, Arrivals(tokens=2000, pattern="closed"))
    assert calling.total.waits.compute_s == pytest.approx(3 * each * 1.5)


def held_elsewhere(problem):
    placed = np.zeros((problem.num_places, problem.layers, problem.experts), dtype=bool)
    placed[problem.place_node == 1] = True
    return placed


@pytest.mark.parametrize("tokens", [200, 512, 700])
def test_chunks_of_a_prompt_compute_at_both_ends_of_a_ring_at_once(tokens):
    compute = Compute(expert_us=100, trunk_layer_us=300, prompt_layer_us=30, prompt_expert_us=10)
    topology, problem, routing = prompted(tokens, compute=compute)
    found = simulate(problem, routing, build_network(topology), Arrivals(tokens=320, rate_scale=0.01))
    first = found.first_tokens["n0"]
    each = 30e-6 + 2 * 10e-6
    sizes = [min(256, tokens - start) for start in range(0, tokens, 256)]
    free = [0.0, 0.0]
    for size in sizes:  # two layers here, one there, each node one chunk after the other
        free[0] += 2 * size * each
        there = free[0] + 5e-3 + size * 4096 / 62.5e6
        free[1] = max(free[1], there) + size * each
    assert first.prompts == 10
    assert first.mean_s == pytest.approx(free[1] + 5e-3 + 8 / 62.5e6, rel=1e-6)
    assert judge(problem, routing).prompt_s[0] == pytest.approx(first.mean_s, rel=0.1)
    offered = tokens * each / (32 / (10.0 * 0.01))
    assert found.nodes[0].offered == pytest.approx(2 * offered + 2 * (300e-6 + 200e-6) * 0.1, rel=0.2)


def test_a_prompt_waits_a_round_trip_in_each_layer_that_calls_but_its_chunks_wait_together():
    compute = Compute(expert_us=100, prompt_layer_us=30, prompt_expert_us=10)
    topology, problem, routing = prompted(512, compute=compute, stays=True, bandwidth=1e12)
    found = simulate(problem, routing, build_network(topology), Arrivals(tokens=320, rate_scale=0.01))
    layer, experts = 256 * 30e-6, 256 * 2 * 10e-6
    one = 2 * (layer + experts) + layer + 10e-3 + experts  # a chunk alone: two layers here, one elsewhere
    assert found.first_tokens["n0"].mean_s == pytest.approx(one + 2 * (layer + experts) + layer, rel=1e-3)
    assert judge(problem, routing).prompt_s[0] == pytest.approx(found.first_tokens["n0"].mean_s, rel=1e-3)
    assert found.first_tokens["n0"].mean_s < 2 * one


def test_a_prompt_goes_to_the_first_layer_s_node_and_its_first_token_comes_back():
    """The ring turned round: the ingress is not where it begins, nor where it ends."""
    compute = Compute(prompt_layer_us=0, prompt_expert_us=1e-3, call_overhead_us=200)
    topology, problem, _ = prompted(100, compute=compute, bandwidth=1e12)
    away = dataclasses.replace(problem, trunk_node=np.ones_like(problem.trunk_node))
    there = nearest(away, held_elsewhere(away), "additive-latency")
    for pattern in ("requests", "closed"):
        arrivals = Arrivals(tokens=320, pattern=pattern, rate_scale=0.01)
        found = simulate(away, there, build_network(topology), arrivals).first_tokens["n0"]
        assert found.mean_s == pytest.approx(2 * (5e-3 + 100e-6), rel=1e-3)
    assert judge(away, there).prompt_s[0] == pytest.approx(2 * (5e-3 + 100e-6), rel=1e-3)


def test_chunks_are_those_that_agents_compute():
    _, problem, _ = prompted(700, compute=Compute())
    pieces = [piece.stop - piece.start for piece in prefill_chunks(700)]
    assert problem.prompts.chunks(0) == pieces


def prompted(tokens, *, compute, stays=False, **options):
    """The ring behind prompts, or the same placement with the trunk at the ingress."""
    topology, problem, routing = ring(compute=compute, **options)
    first, *rest = topology.nodes
    ingress = first.ingress.model_copy(update={"prompt_tokens": tokens})
    topology = topology.model_copy(update={"nodes": (first.model_copy(update={"ingress": ingress}), *rest)})
    prompts = make_problem(topology, make_model()).prompts
    trunk = np.zeros_like(problem.trunk_node) if stays else problem.trunk_node
    return topology, dataclasses.replace(problem, prompts=prompts, trunk_node=trunk), routing


def test_sessions_keep_both_ends_of_a_ring_busy():
    topology, problem, routing = ring(compute=Compute(expert_us=1000, trunk_layer_us=500))

    def rate(sessions):
        arrivals = Arrivals(tokens=2000, pattern="closed", sessions=sessions)
        found = simulate(problem, routing, build_network(topology), arrivals)
        return found.tokens / found.elapsed_s

    one, eight = rate(1), rate(8)
    busiest = 2 * (problem.top_k * 1e-3 + 0.5e-3)  # the first node's two layers
    assert eight > 2.5 * one
    assert eight == pytest.approx(1 / busiest, rel=0.05)


def test_layers_without_experts_take_their_time_too():
    topology = make_topology([24], [10.0], compute=Compute(expert_us=100, trunk_layer_us=300))
    model = make_model().model_copy(update={"decoder_layers": 5, "moe_layers": (1, 2, 4)})
    problem = make_problem(topology, model)
    routing = nearest(problem, np.ones((1, 3, 8), dtype=bool), "latency")
    found = simulate(problem, routing, build_network(topology), Arrivals(tokens=200, rate_scale=0.01))
    assert found.total.p50_s == pytest.approx(judge(problem, routing).predicted_latency_s)
    assert found.total.waits.compute_s == pytest.approx(5 * 300e-6 + 3 * problem.top_k * 100e-6)


def test_tokens_are_shared_out_by_rate():
    np.testing.assert_array_equal(tokens_by_ingress(np.array([1.0, 0.0, 3.0]), 400), [100, 0, 300])
    with pytest.raises(ValueError, match="nothing to simulate"):
        tokens_by_ingress(np.zeros(2), 400)
