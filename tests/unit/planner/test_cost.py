import numpy as np
import pytest

from planner.cost import call_bytes, call_seconds, find_paths, hop_seconds, service_seconds
from tests.planning import line, model_spec, node, topology_of

MODEL = model_spec()
BYTES = 2 * 8 * 4


@pytest.fixture
def topology():
    """a - b - c in a row, and a slow direct link a - c."""
    nodes = [
        node("a", device=1, host=1, disk=1, rate=1, expert_us=40, host_expert_us=90, disk_bandwidth="1 MB/s"),
        node("b", device=1, expert_us=50),
        node("c", device=1, expert_us=60),
        node("d", device=1),
    ]
    links = [
        {"between": ["a", "b"], "latency": "1 ms", "bandwidth": "8 Mbit/s"},
        {"between": ["b", "c"], "latency": "2 ms", "bandwidth": "4 Mbit/s"},
        {"between": ["a", "c"], "latency": "10 ms", "bandwidth": "80 Mbit/s"},
        {"between": ["d", "c"], "latency": "1 ms", "bandwidth": "80 Mbit/s"},
    ]
    return topology_of(nodes, links)


def test_a_declared_link_is_taken_even_where_a_detour_is_quicker(topology):
    paths = find_paths(topology)
    assert paths.latency_s[0, 2] == pytest.approx(10e-3)
    assert paths.bandwidth[0, 2] == pytest.approx(10e6)


def test_other_pairs_take_the_path_of_least_latency_and_its_narrowest_link(topology):
    paths = find_paths(topology)
    assert paths.latency_s[0, 3] == paths.latency_s[3, 0] == pytest.approx(4e-3)  # a - b - c - d
    assert paths.bandwidth[0, 3] == pytest.approx(0.5e6)
    crossed = paths.hop_link[(paths.hop_caller == 0) & (paths.hop_holder == 3)]
    assert crossed.tolist() == [0, 1, 3]


def test_nobody_pays_to_call_itself(topology):
    paths = find_paths(topology)
    assert (np.diag(paths.latency_s) == 0).all()
    assert np.isinf(np.diag(paths.bandwidth)).all()
    assert not (paths.hop_caller == paths.hop_holder).any()


def test_call_seconds_follow_the_formula(topology):
    cost = call_seconds(topology, MODEL, find_paths(topology))
    load = MODEL.expert_bytes / 1e6
    assert cost[0, 0] == pytest.approx([0, 50e-6, 50e-6 + load])
    assert cost[1, 0] == pytest.approx([2e-3 + BYTES / 1e6 + compute for compute in (40e-6, 90e-6, 90e-6 + load)])
    assert cost[0, 1, 0] == pytest.approx(2e-3 + BYTES / 1e6 + 50e-6)
    assert call_bytes(MODEL) == BYTES


def test_software_is_paid_by_who_leaves_its_node_only():
    software = [
        node("a", device=1, rate=1),
        node("b", device=1, call_overhead_us=500),
        node("c", device=1, call_overhead_us=500, hop_overhead_us=400),
    ]
    links = [*line("a", "b"), *line("b", "c"), *line("a", "c")]
    plain = topology_of([node("a", device=1, rate=1), node("b", device=1), node("c", device=1)], links)
    asked = topology_of(software, links)
    paths = find_paths(asked)
    calls = call_seconds(asked, MODEL, paths) - call_seconds(plain, MODEL, paths)
    hops = hop_seconds(asked, MODEL, paths) - hop_seconds(plain, MODEL, paths)
    assert calls[0, :, 0] == pytest.approx([0, 500e-6, 500e-6])
    assert calls[1, :, 0] == pytest.approx([0, 0, 500e-6])
    assert hops[0] == pytest.approx([0, 250e-6, 400e-6])  # half a call where a hop was not measured


def test_host_memory_twice_as_slow_where_not_measured():
    topology = topology_of([{"id": "a", "memory": {}, "ingress": {"workload": "a", "tokens_per_s": 1}}], [])
    assert service_seconds(topology, MODEL)[0, :2] == pytest.approx([50e-6, 100e-6])


def test_two_hundred_nodes_are_quick():
    names = [f"n{number}" for number in range(200)]
    star = [link for name in names[1:] for link in line("n0", name, latency="1 ms")]
    topology = topology_of([node(name, rate=1) for name in names], star)
    assert find_paths(topology).latency_s[1, 199] == pytest.approx(2e-3)
