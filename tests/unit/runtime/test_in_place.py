"""Experts that lie in host memory, apart from the device's slots: loaded, or computed there, whichever is done first.

Both memories are the processor's here, so that all ways give the same bits.
"""

from contextlib import closing

import numpy as np
import pytest
import torch

from runtime.comebacks import Origin
from runtime.counters import Counters
from runtime.dispatch import Dispatcher
from runtime.experts import Rows, compute_rows
from runtime.launches import Launches
from runtime.menu import Menu
from runtime.policy.menu import Rates, SizedRates
from runtime.pool import record_of
from runtime.records import RecordFile
from runtime.routing import Routing
from runtime.slots import Caching, Residency
from schemas.store import RECORDS_NAME
from tests.families import InProcessCaller, make_store
from tests.unit.runtime.test_cached import FIVE, logits_of, resident, source_of, trunk_and_board

LAYERS, EXPERTS = 4, 8


def apart(store, *, slots=3, in_host=True, **options):
    """A node with some slots, and every record in host memory, or on disk only."""
    size = store.manifest.layout.bytes
    budgets = {"device": slots * size, "host": LAYERS * EXPERTS * size}
    caching = Caching(LAYERS, EXPERTS, prefetch=False, **options)
    held = Residency(store.manifest.layout, budgets, caching=caching, is_apart=True)
    for record in store.manifest.records:
        if in_host:
            held.put(record.key, "host", store.read(record.sha256), source_of(store, record.key))
        else:
            held.place(record.key, source_of(store, record.key))
    return held


def known(held, *, load_s, one_s, many_s):
    """Say what loads and the processor took so far."""
    held.inside.shelf.comebacks.observe(Origin("host"), load_s)
    for _ in range(2):
        held.ways.processor.observe(1, one_s)
        held.ways.processor.observe(64, many_s)
    return held


def compute(held, experts, tokens=1, **options):
    """Compute some experts for each of some tokens; returns what came of it and from where."""
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    expert = np.repeat(np.array(experts), tokens)
    rows = Rows(np.tile(np.arange(tokens), len(experts)), expert, torch.ones(len(expert)))
    tiers = {}
    answer = compute_rows(held, 0, rows, hidden, combine="partial", tier_rows=tiers, **options)
    return answer, tiers


def test_few_tokens_are_computed_in_place_and_many_make_a_load_worth_while(store):
    opened = store("qwen3_moe")
    want, _ = compute(resident(opened), [0, 1])
    held = known(apart(opened), load_s=1e-3, one_s=2e-4, many_s=2e-2)
    got, tiers = compute(held, [0, 1])
    assert torch.equal(got, want)
    assert (tiers, sum(held.counts.loads), sum(held.counts.found["host"])) == ({"host": 2}, 0, 2)
    want, _ = compute(resident(opened), [2, 3], tokens=64)
    got, tiers = compute(held, [2, 3], tokens=64)
    assert torch.equal(got, want)
    assert sum(held.counts.loads) == 2
    assert "host" in tiers  # it was read from there into slots
    assert held.tier_of((0, 2)) == held.tier_of((0, 3)) == "device"


def test_a_processor_that_is_busy_launching_computes_nothing_beside(store):
    held = known(apart(store("qwen3_moe"), slots=8), load_s=1e-3, one_s=9e-4, many_s=1e-2)
    held.ways.observe_launch(1e-3)
    compute(held, [0, 1, 2, 3])
    assert sum(held.counts.loads) == 4


def test_link_and_processor_share_what_a_layer_lacks(store):
    held = known(apart(store("qwen3_moe"), slots=8), load_s=1e-3, one_s=9e-4, many_s=1e-2)
    compute(held, [0, 1, 2, 3])
    assert sum(held.counts.loads) == 2


def test_what_is_asked_for_over_and_over_comes_to_the_device(store):
    held = apart(store("qwen3_moe"))
    ways = held.ways
    held.inside.shelf.comebacks.observe(Origin("host"), 1e-3)
    for _ in range(4):
        assert held.tier_of((0, 0)) == "host"
        ways.observe((0, 0), 1, 3e-4)
    assert [way.link for way in ways.of((0, 0), 1)] == ["host"]
    assert [way.link for way in ways.of((0, 1), 1)] == ["host", "processor"]
    compute(held, [0])
    assert held.tier_of((0, 0)) == "device"
    assert ways.of((0, 0), 1) == []


def test_one_expert_is_enough_to_find_out_what_the_processor_takes(store):
    held = apart(store("qwen3_moe"), slots=8)
    compute(held, [0, 1, 2, 3])
    assert sum(held.counts.found["host"]) == 1
    assert sum(held.counts.loads) == 3
    assert held.ways.processor.seconds(1) > 0
    assert not held.ways.processor.is_known, "a first try is slow"
    compute(held, [4, 5])
    assert held.ways.processor.is_known


@pytest.mark.parametrize("options", [{"in_host": False}, {"in_place": False}])
def test_without_host_memory_or_where_it_is_not_wanted_everything_is_loaded(store, options):
    held = known(apart(store("qwen3_moe"), **options), load_s=1.0, one_s=1e-6, many_s=1e-6)
    compute(held, [0, 1, 2])
    assert sum(held.counts.loads) == 3


@pytest.mark.parametrize("slots", [0, 3, 8])
@pytest.mark.parametrize("family", FIVE)
def test_whatever_is_computed_where_the_bits_are_the_same(family, slots, checkpoint, store):
    opened = store(family)
    trunk, board = trunk_and_board(checkpoint(family), opened)
    want = logits_of(trunk, board, resident(opened), batch=4)
    held = apart(opened, slots=slots)
    assert torch.equal(logits_of(trunk, board, held, batch=4), want)
    assert sum(held.counts.found["host"]) > 0
    assert bool(sum(held.counts.loads)) == bool(slots)


def test_sums_in_the_model_s_own_order_are_the_device_s_alone(checkpoint, store):
    opened = store("qwen3_moe")
    trunk, board = trunk_and_board(checkpoint("qwen3_moe"), opened)
    held = apart(opened)
    want = logits_of(trunk, board, resident(opened), batch=1, combine="ordered")
    assert torch.equal(logits_of(trunk, board, held, batch=1, combine="ordered"), want)
    assert sum(held.counts.found["host"]) == 0


def test_host_memory_is_weighed_against_a_call(store):
    """Expert 0 is in host memory here, and on n1's device."""
    opened = store("qwen3_moe")
    caller = InProcessCaller({"n1": resident(opened)})
    routing = Routing.build(
        1, layers=1, experts=8, local=[(0, expert) for expert in range(8)], others={(0, 0): ("n1",), (0, 1): ("n1",)}
    )

    def called(held, call_s):
        rates = Rates()
        rates.observe("n1", call_s)
        dispatcher = Dispatcher(held, routing, caller, Counters(4, 8).fresh(), "partial", rates=rates)
        caller.calls.clear()
        dispatcher.run(0, torch.zeros(1, 64), torch.tensor([[0, 1]]), torch.ones(1, 2))
        return [call.expert.tolist() for call in caller.calls]

    assert called(known(apart(opened), load_s=1.0, one_s=1.0, many_s=1.0), 1e-3) == [[0, 1]]
    assert called(known(apart(opened), load_s=1.0, one_s=1e-4, many_s=1.0), 1e-3) == []


def test_a_load_in_fewer_bits_has_an_estimate_of_its_own(tmp_path, checkpoint):
    """To load an expert as it is takes longer than the call, to load it in int8 does not."""
    opened = make_store(checkpoint("qwen3_moe"), tmp_path / "store", precisions=("int8",))
    held = Residency(opened.manifest.layout, {"device": 1 << 20}, caching=Caching(LAYERS, EXPERTS))
    for key in (keys := [(0, 0), (0, 1)]):
        low = opened.manifest.packed[0].records[key[1]]
        held.place(key, source_of(opened, key))
        held.place_packed(key, "int8", RecordFile(opened.path / RECORDS_NAME, low.sha256, low.offset))
    routing = Routing.build(1, layers=1, experts=8, local=keys, others=dict.fromkeys(keys, ("n1",)))
    rates = Rates()
    rates.observe("n1", 1e-2)
    held.slack.load_s, held.slack.low_load_s = 1.0, 1e-3
    menu = Menu(held, routing, rates)
    for low, where in (({}, [1, 1]), ({0: "int8"}, [0, 1]), ({0: "int8", 1: "int8"}, [0, 0])):
        with menu.settled(0, [0, 1], [0, 0], low) as settled:
            assert settled == where


def test_what_was_slow_once_is_tried_again():
    rates = SizedRates()
    rates.observe(1, 10.0)
    tries = 0
    while rates.seconds(1) > 1.0:
        rates.pass_over(1)
        tries += 1
    assert 100 < tries < 1000


def test_a_first_try_counts_until_there_is_a_second():
    rates = SizedRates()
    for seconds, known in ((1.0, 1.0), (0.1, 0.1), (0.2, 0.11)):
        rates.observe(1, seconds)
        assert rates.seconds(1) == pytest.approx(known)


def test_sizes_that_were_not_tried():
    rates = SizedRates()
    for tokens, seconds in ((1, 1.0), (64, 9.0)):
        rates.observe(tokens, seconds)
    assert [rates.seconds(tokens) for tokens in (1, 2, 4, 64, 128, 256)] == [1.0, 1.0, 2.0, 9.0, 9.0, 18.0]


@pytest.mark.parametrize("slots", [0, 1])
def test_what_lies_in_host_memory_alone_needs_no_slot(store, slots):
    """Its record is nowhere else: it is lent, and given to peers, from there."""
    opened, size = store("qwen3_moe"), store("qwen3_moe").manifest.layout.bytes
    held = Residency(opened.manifest.layout, {"device": slots * size, "host": size}, is_apart=True)
    record = opened.read(opened.by_key[0, 1].sha256)
    held.put((0, 1), "host", record)
    assert held.record((0, 1)) == record
    with closing(held.lend(0, [1])) as lending:
        assert [record_of(held.layout, lent.weights) for _, lent in lending] == [record]


class GoneDevice:
    """Copies to a device that answers no more."""

    def launch(self, *_):
        raise RuntimeError("the device is gone")


def test_loads_that_a_device_did_not_begin_are_not_waited_for_for_ever(store):
    held = apart(store("qwen3_moe"))
    shelf, changed, _, device, host = held.inside
    launches = Launches(shelf, changed, {"device": device, "host": host}, GoneDevice(), None)
    desk = held._lender._desk._replace(launches=launches)
    with changed:
        copies = [shelf.occupy((0, expert), *room) for expert, room in enumerate(shelf.rooms(0, 3))]
    with pytest.raises(RuntimeError, match="the device is gone"):
        desk.load(copies, wake=False)
    assert str(copies[0].error) == "the device is gone"
    assert all(desk.promoter.run(copy) and copy.is_ready for copy in copies[1:]), "whoever waits for them makes them"
