"""What giving a copy up costs: where it would come back from, and that a slow peer is asked less for it."""

import time

import numpy as np
import pytest
import torch

from runtime.comebacks import Comebacks, Origin
from runtime.copies import Copy
from runtime.counters import Counters
from runtime.dispatch import Dispatcher, NoCaller
from runtime.packed import Unpacked
from runtime.precision import packed_layout
from runtime.records import FetchedRecord, RecordFile
from runtime.routing import Routing
from runtime.slots import Caching, Residency
from schemas.store import RECORDS_NAME

LAYERS, EXPERTS = 4, 8


def file_of(store, key):
    record = store.by_key[key]
    return RecordFile(store.path / RECORDS_NAME, record.sha256, record.offset)


def peer_of(store, key, asked):
    def fetch(sha256):
        asked.append(key)
        time.sleep(2e-3)
        return store.read(sha256)

    return FetchedRecord(store.by_key[key].sha256, fetch)


def test_where_a_copy_comes_back_from(store, packed_store):
    opened, low = store("qwen3_moe"), packed_store("qwen3_moe")
    layout = opened.manifest.layout
    disk, peer = file_of(opened, (0, 0)), peer_of(opened, (0, 1), [])
    unpacked = Unpacked(file_of(low, (0, 2)), layout, packed_layout(layout, "int8"))
    sources = {(0, 0): [disk, peer], (0, 1): [peer, disk], (0, 2, "int8"): [unpacked]}
    copies = {((0, 0), "host"): Copy((0, 0), "host", 0, is_ready=True)}
    on_cpu = Comebacks(sources, copies, ("device", "host"))
    on_cuda = Comebacks(sources, copies, ("device",))
    device = [Copy(key, "device", 0) for key in sources]
    assert [on_cpu.origin(each) for each in device] == [Origin("disk"), Origin("peer"), Origin("disk", "int8")]
    assert [on_cuda.origin(each).where for each in device] == ["host", "peer", "disk"]
    assert on_cuda.origin(copies[(0, 0), "host"]) == Origin("disk")
    guest = Copy((0, 1), "device", 0, is_guest=True)
    assert on_cpu.origin(guest) == Origin("call")
    assert on_cuda.seconds(device[0]) < on_cuda.seconds(device[2]) < on_cuda.seconds(device[1])
    on_cuda.observe(Origin("host"), 1.0)
    assert on_cuda.seconds(device[0]) == 1.0


def asked_of_the_peer(opened, eviction):
    """Run a few hundred tokens through one layer, the odd experts of which come from a slow peer; room for 4 of 8."""
    layout, asked = opened.manifest.layout, []
    caching = Caching(LAYERS, EXPERTS, eviction=eviction, prefetch=False)
    held = Residency(layout, {"device": 4 * layout.bytes}, caching=caching)
    for expert in range(EXPERTS):
        key = (0, expert)
        held.place(key, peer_of(opened, key, asked) if expert % 2 else file_of(opened, key))
    routing = Routing.all_local(1, layers=LAYERS, experts=EXPERTS)
    draw, hidden, answers = np.random.default_rng(0), torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), []
    for _ in range(200):
        chosen = torch.from_numpy(draw.choice(EXPERTS, 2, replace=False))[None]
        dispatcher = Dispatcher(held, routing, NoCaller(), Counters(LAYERS, EXPERTS).fresh())
        with torch.inference_mode():
            answers.append(dispatcher.run(0, hidden, chosen, torch.tensor([[0.25, 0.75]])))
    return len(asked), torch.cat(answers)


@pytest.mark.timeout(30)
def test_a_slow_peer_is_asked_less_and_the_bits_are_the_same(store):
    opened = store("qwen3_moe")
    ours, answers = asked_of_the_peer(opened, "cost-aware")
    theirs, same = asked_of_the_peer(opened, "rates")
    assert torch.equal(answers, same)
    assert ours < 0.75 * theirs
