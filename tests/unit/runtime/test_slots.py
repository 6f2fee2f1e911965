"""Residency: tiers hold what was put, never more bytes than allowed, and nothing is freed under a user."""

import threading

import pytest
import torch

from runtime.errors import ExpertUnavailable, InvalidInput, OverBudget, RuntimeFault
from runtime.slots import Residency


@pytest.fixture
def opened(store):
    return store("gpt_oss")


def record(opened, key):
    return opened.read(opened.by_key[key].sha256)


def residency(opened, tmp_path, **count):
    size = opened.manifest.layout.bytes
    return Residency(opened.manifest.layout, {tier: n * size for tier, n in count.items()}, tmp_path / "records")


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_every_tier_gives_back_what_was_put(opened, tmp_path, tier):
    held = residency(opened, tmp_path, **{tier: 2})
    for key in ((0, 1), (2, 5)):
        held.put(key, tier, record(opened, key))
        held.put(key, tier, record(opened, key))  # again: nothing changes
    assert held.record((2, 5)) == record(opened, (2, 5))
    assert held.record((0, 1)) == record(opened, (0, 1))
    assert held.acquire((0, 1)).gate_up.shape == (64, 64)
    assert held.tier_of((0, 1)) == tier
    assert held.held()[tier] == [(0, 1), (2, 5)]
    size = opened.manifest.layout.bytes
    assert held.used() == {"device": 0, "host": 0, "disk": 0} | {tier: 2 * size}


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_budget_is_never_exceeded(opened, tmp_path, tier):
    held = residency(opened, tmp_path, **{tier: 1})
    held.put((0, 0), tier, record(opened, (0, 0)))
    with pytest.raises(OverBudget, match=f"{tier} tier") as caught:
        held.put((0, 1), tier, record(opened, (0, 1)))
    assert caught.value.used == caught.value.budget
    assert not held.holds((0, 1))
    held.drop((0, 0))
    held.put((0, 1), tier, record(opened, (0, 1)))
    assert held.record((0, 1)) == record(opened, (0, 1))


def test_a_replica_may_be_in_two_tiers_while_it_changes_place(opened, tmp_path):
    held = residency(opened, tmp_path, device=1, disk=1)
    held.put((0, 0), "disk", record(opened, (0, 0)))
    held.put((0, 0), "device", record(opened, (0, 0)))
    assert held.tier_of((0, 0)) == "device"
    held.drop((0, 0), "disk")
    assert held.tier_of((0, 0)) == "device"
    assert list((tmp_path / "records").iterdir()) == []
    held.drop((0, 0), "disk")  # what is not held is no error
    held.drop((0, 0))
    assert held.tier_of((0, 0)) is None
    assert set(held.used().values()) == {0}


def test_equal_records_share_a_file_until_the_last_is_dropped(opened, tmp_path):
    held = residency(opened, tmp_path, disk=2)
    same = record(opened, (0, 0))
    held.put((0, 0), "disk", same)
    held.put((1, 1), "disk", same)
    held.drop((0, 0))
    assert held.record((1, 1)) == same
    held.drop((1, 1))
    assert list((tmp_path / "records").iterdir()) == []


def test_a_slot_in_use_is_not_given_away(opened, tmp_path):
    held = residency(opened, tmp_path, device=1)
    held.put((0, 0), "device", record(opened, (0, 0)))
    with held.borrow(0, [0]) as (lent,):
        before = lent.weights.gate_up.clone()
        held.drop((0, 0))
        assert not held.holds((0, 0))
        with pytest.raises(OverBudget):
            held.put((0, 1), "device", record(opened, (0, 1)))
        assert torch.equal(lent.weights.gate_up, before)
    assert held.used()["device"] == 0
    held.put((0, 1), "device", record(opened, (0, 1)))


def test_what_is_not_held_is_named(opened, tmp_path):
    held = residency(opened, tmp_path, host=1)
    held.put((1, 0), "host", record(opened, (1, 0)))
    with pytest.raises(ExpertUnavailable, match="layer 1 expert 4 is not held"), held.borrow(1, [0, 4]):
        pass
    held.drop((1, 0))
    assert held.used()["host"] == 0  # the borrow that failed let go of expert 0
    with pytest.raises(InvalidInput, match="record of 3 bytes"):
        held.put((1, 0), "host", b"abc")


def test_threads_never_exceed_the_budget_nor_mix_up_slots(opened, tmp_path):
    held = residency(opened, tmp_path, device=3)
    keys, faults = [(0, expert) for expert in range(8)], []

    def churn(offset):
        for turn in range(40):
            key = keys[(turn + offset) % 8]
            try:
                held.put(key, "device", record(opened, key))
                if held.record(key) != record(opened, key):
                    faults.append(key)
            except (OverBudget, ExpertUnavailable):
                pass
            held.drop(key)

    threads = [threading.Thread(target=churn, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert held.used()["device"] == 0


def test_a_key_put_twice_at_once_takes_one_slot(opened, tmp_path):
    """Whoever comes second finds it on its way, or there."""
    held, key = residency(opened, tmp_path, device=2), (0, 0)
    threads = [threading.Thread(target=held.put, args=(key, "device", record(opened, key))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held.used()["device"] == opened.manifest.layout.bytes
    assert held.record(key) == record(opened, key)
    held.drop(key)
    assert held.used()["device"] == 0


def test_a_pool_that_cannot_be_reserved_is_told(opened, tmp_path):
    layout = opened.manifest.layout
    with pytest.raises(RuntimeFault, match=r"1024 TiB cannot be reserved on cpu; lower memory\.device"):
        Residency(layout, {"device": 1 << 50})
    held = Residency(layout, {"device": 1 << 50}, max_slots=1)
    held.put((0, 0), "device", record(opened, (0, 0)))
    with pytest.raises(OverBudget):
        held.put((0, 1), "device", record(opened, (0, 1)))
