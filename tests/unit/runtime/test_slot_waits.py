"""Nobody waits for a slot that never comes: what can be read nowhere else makes no room, everything else does."""

import threading
from contextlib import closing

import pytest
import torch

from runtime.errors import RuntimeFault
from runtime.policy.prefetch import Slack
from runtime.records import RecordFile
from runtime.slots import Caching, Residency
from schemas.store import RECORDS_NAME


class EagerSlack(Slack):
    """Room for two loads, always."""

    room = 2
    is_slow = True


@pytest.fixture
def opened(store):
    return store("qwen3_moe")


def record(opened, key):
    return opened.read(opened.by_key[key].sha256)


def source_of(opened, key):
    return RecordFile(opened.path / RECORDS_NAME, opened.by_key[key].sha256, opened.by_key[key].offset)


def residency(opened, tmp_path, *, is_apart=False, **count):
    spec, size = opened.manifest.model, opened.manifest.layout.bytes
    budgets = {tier: slots * size for tier, slots in count.items()}
    return Residency(
        opened.manifest.layout,
        budgets,
        tmp_path / "records",
        caching=Caching(spec.layers, spec.experts),
        is_apart=is_apart,
    )


def too_full(opened, tmp_path, *, disk=0):
    """One device slot left of three, in which an expert lies that can be read nowhere else; another has no slot."""
    held, size = residency(opened, tmp_path, device=3, disk=disk), opened.manifest.layout.bytes
    for key in ((0, 0), (0, 1)):
        held.put(key, "device", record(opened, key), source_of(opened, key))
    held.set_budget("device", size)
    held.put((1, 0), "device", record(opened, (1, 0)))
    return held


def promptly(work):
    """Do something; fails where it takes longer than any load."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "waits for a slot that never comes"


def take(held, layer, experts):
    """Weights by expert."""
    found = {}

    def work():
        with closing(held.lend(layer, experts)) as lending:
            for position, lent in lending:
                found[experts[position]] = lent.weights.gate_up.clone()

    promptly(work)
    return found


def assert_lends(held, opened, layer, experts):
    whole = Residency(opened.manifest.layout, {"host": opened.manifest.layout.bytes * len(experts)})
    for expert in experts:
        whole.put((layer, expert), "host", record(opened, (layer, expert)))
    for expert, found in take(held, layer, experts).items():
        assert torch.equal(found, whole.acquire((layer, expert)).gate_up)


def test_what_can_be_read_nowhere_else_leaves_no_room_to_wait_for(opened, tmp_path):
    held = too_full(opened, tmp_path)
    assert_lends(held, opened, 0, [0, 1])
    assert held.tier_of((1, 0)) == "device"
    assert held.used()["device"] == held.budgets["device"]


def test_a_replica_makes_room_once_it_can_be_read_elsewhere(opened, tmp_path):
    held = too_full(opened, tmp_path)
    held.place((1, 0), source_of(opened, (1, 0)))
    assert_lends(held, opened, 0, [0, 1])
    assert_lends(held, opened, 1, [0])


def test_a_replica_stays_once_it_can_be_read_nowhere_else(opened, tmp_path):
    """Its record on the disk is dropped, which would have let it make room."""
    held = too_full(opened, tmp_path, disk=1)
    held.put((1, 0), "disk", record(opened, (1, 0)))
    held.drop((1, 0), "disk")
    assert_lends(held, opened, 0, [0, 1])
    assert_lends(held, opened, 1, [0])


def test_guesses_that_were_wrong_make_room_though_host_memory_could(opened, tmp_path):
    """Copies there that may be evicted are no slots of the device."""
    held = residency(opened, tmp_path, is_apart=True, device=2, host=8)
    held.slack = EagerSlack()
    for key in opened.by_key:
        held.place(key, source_of(opened, key))
    assert_lends(held, opened, 0, [0, 1])
    held.prefetch(1, lambda: [2, 3])
    with held._changed:
        assert held._changed.wait_for(lambda: {(1, 2), (1, 3)} <= held._shelf.ready.keys(), 10)
    assert_lends(held, opened, 1, [5])


def test_what_the_device_has_copied_makes_room_though_nobody_lends(opened, tmp_path):
    """A replica that is put comes to the slot that the last load was made from."""
    held = residency(opened, tmp_path, is_apart=True, device=1, host=2)
    for expert in (0, 1):
        held.place((0, expert), source_of(opened, (0, expert)))
    for expert in (0, 1, 0):
        assert_lends(held, opened, 0, [expert])
    for key in ((1, 0), (1, 1)):
        promptly(lambda key=key: held.put(key, "host", record(opened, key)))
        assert held.tier_of(key) == "host"


def test_books_that_are_wrong_are_told(opened, tmp_path):
    """Rather than waiting for ever; a copy that is in use is waited for all the same."""
    held = residency(opened, tmp_path, device=1)
    for expert in (0, 1):
        held.place((0, expert), source_of(opened, (0, expert)))
    take(held, 0, [0])
    copies = held.take(0, [0])
    threading.Timer(0.2, held.end, (0, copies)).start()
    assert_lends(held, opened, 0, [1])
    held._shelf.evictable.clear()
    with (
        pytest.raises(RuntimeFault, match="layer 0 expert 0: no slot will ever be free"),
        closing(held.lend(0, [0])) as it,
    ):
        next(it)
