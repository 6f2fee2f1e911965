import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulate import build_network
from planner.transfers import build_roads, schedule_transfers
from tests.small_clusters import MIB, make_model, make_problem, make_topology

RATE = 62.5e6
ONE = MIB / RATE


def roads(slots=(8, 8, 8), links=None, node_rate=None, latency=5e-3):
    topology = make_topology(slots, [1.0] * len(slots), links=links, latency=latency)
    return build_roads(make_problem(topology, make_model(layers=1)), build_network(topology), node_rate)


def held(nodes, *holders):
    array = np.zeros((nodes, 8), dtype=bool)
    for node, expert in holders:
        array[node, expert] = True
    return array


def test_nothing_wanted_takes_no_time():
    schedule = schedule_transfers([], held(3), roads(), MIB)
    assert (schedule.transfers, schedule.makespan_s, schedule.bound_s) == ((), 0.0, 0.0)


def test_one_record_takes_its_bytes_and_the_latency():
    schedule = schedule_transfers([(4, 2)], held(3, (0, 4)), roads(), MIB)
    (only,) = schedule.transfers
    assert (only.expert, only.source, only.target) == (4, 0, 2)
    assert schedule.makespan_s == pytest.approx(ONE + 5e-3)


def test_several_sources_send_to_one_node_at_once():
    wanted = [(expert, 2) for expert in range(4)]
    everyone = held(3, *itertools.product((0, 1), range(4)))
    schedule = schedule_transfers(wanted, everyone, roads(), MIB)
    assert {transfer.source for transfer in schedule.transfers} == {0, 1}
    assert schedule.makespan_s == pytest.approx(2 * ONE + 5e-3)
    assert schedule.bound_s == pytest.approx(2 * ONE)


def test_a_nodes_own_rate_limits_what_it_receives():
    wanted = [(expert, 2) for expert in range(4)]
    everyone = held(3, *itertools.product((0, 1), range(4)))
    limited = roads(node_rate=np.array([np.inf, np.inf, RATE]))
    schedule = schedule_transfers(wanted, everyone, limited, MIB)
    assert schedule.makespan_s == pytest.approx(4 * ONE + 5e-3)


def test_what_has_arrived_is_passed_on():
    chain = roads(links=[(0, 1), (1, 2)])
    schedule = schedule_transfers([(0, 1), (0, 2)], held(3, (0, 0)), chain, MIB)
    assert [(t.source, t.target) for t in schedule.transfers] == [(0, 1), (1, 2)]


def test_the_nearest_holder_sends():
    chain = roads(slots=(8, 8, 8, 8), links=[(0, 1), (1, 2), (2, 3)])
    schedule = schedule_transfers([(5, 3)], held(4, (0, 5), (2, 5)), chain, MIB)
    assert schedule.transfers[0].source == 2


def test_stores_send_what_nobody_holds_and_the_rest_is_named():
    schedule = schedule_transfers([(1, 2)], held(3), roads(), MIB, stores=[0])
    assert schedule.transfers[0].source == 0
    schedule = schedule_transfers([(1, 2), (2, 0)], held(3, (1, 2)), roads(), MIB)
    assert schedule.unsourced == ((1, 2),)
    assert len(schedule.transfers) == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), chain=st.booleans())
def test_schedules_are_possible_and_not_below_the_bound(data, chain):
    nodes = 4
    links = [(0, 1), (1, 2), (2, 3)] if chain else None
    have = np.array(data.draw(st.lists(st.booleans(), min_size=32, max_size=32))).reshape(nodes, 8)
    want = np.array(data.draw(st.lists(st.booleans(), min_size=32, max_size=32))).reshape(nodes, 8) & ~have
    wanted = [(int(expert), int(node)) for node, expert in np.argwhere(want)]
    used = roads(slots=(8,) * nodes, links=links)
    schedule = schedule_transfers(wanted, have, used, MIB)
    arrived = {(expert, node): 0.0 for node, expert in np.argwhere(have).tolist()}
    arrived |= {(t.expert, t.target): t.finish_s for t in schedule.transfers}
    assert sorted([(t.expert, t.target) for t in schedule.transfers] + list(schedule.unsourced)) == sorted(wanted)
    on_link: dict[int, list[tuple[float, float]]] = {}
    for transfer in schedule.transfers:
        assert arrived[transfer.expert, transfer.source] <= transfer.start_s + 1e-12, "sends only what it has"
        for link in used.links[transfer.source, transfer.target]:
            if link < used.num_links:
                on_link.setdefault(int(link), []).append((transfer.start_s, transfer.start_s + ONE))
    for times in on_link.values():
        for (_, first_end), (second_start, _) in itertools.pairwise(sorted(times)):
            assert second_start >= first_end - 1e-12, "one record at a time on a link"
    assert schedule.makespan_s >= schedule.bound_s - 1e-12


def test_records_travel_only_between_nodes_that_hold_them_alike():
    """Two nodes hold experts in as many bytes, the third in half: it gets none from them, but from a store."""
    sizes, have = np.array([MIB, MIB, MIB // 2]), held(3, (0, 0), (0, 1))
    schedule = schedule_transfers([(0, 1), (1, 2)], have, roads(), sizes)
    assert [(one.expert, one.source, one.target) for one in schedule.transfers] == [(0, 0, 1)]
    assert schedule.unsourced == ((1, 2),)
    from_store = schedule_transfers([(1, 2)], have, roads(), sizes, stores=[0])
    whole = schedule_transfers([(1, 2)], have, roads(), MIB, stores=[0])
    assert from_store.bound_s == pytest.approx(whole.bound_s / 2)
    assert from_store.makespan_s < whole.makespan_s
