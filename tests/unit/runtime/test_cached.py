"""Residency as a cache: the same bits as with every expert in memory, within the budget, whatever the disk returns."""

import threading
from contextlib import closing

import pytest
import torch

from runtime.engine import Segment
from runtime.errors import BudgetTooSmall, ExpertLost, ExpertUnavailable
from runtime.loading import load_trunk
from runtime.policy.eviction import EVICTIONS
from runtime.policy.prefetch import Slack
from runtime.records import CheckpointExpert, FetchedRecord, RecordFile
from runtime.routing import EpochBoard, Routing
from runtime.slots import Caching, Residency
from runtime.store import layout_of
from runtime.streaming import Ahead
from schemas.checkpoint import read_checkpoint
from schemas.store import RECORDS_NAME

FIVE = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
PROMPTS = ([5, 9, 200, 17, 33, 8, 120, 64, 2, 77], [3, 1, 4], [90, 91, 92, 93], [250])
DECODED = 5


class EagerSlack(Slack):
    """Room for two loads, always."""

    @property
    def room(self):
        return 2

    @property
    def is_slow(self):
        return True


def source_of(store, key):
    record = store.by_key[key]
    return RecordFile(store.path / RECORDS_NAME, record.sha256, record.offset)


def cached(store, *, tier="device", slots=3, **options):
    """A node that executes every expert from the store, with so many slots."""
    spec = store.manifest.model
    caching = Caching(spec.layers, spec.experts, **options)
    held = Residency(store.manifest.layout, {tier: slots * store.manifest.layout.bytes}, caching=caching)
    for record in store.manifest.records:
        held.place(record.key, source_of(store, record.key))
    return held


def resident(store):
    held = Residency(store.manifest.layout, {"device": store.manifest.model.total_expert_bytes})
    for record in store.manifest.records:
        held.put(record.key, "device", store.read(record.sha256))
    return held


def trunk_and_board(model_dir, store):
    spec = store.manifest.model
    return load_trunk(model_dir, dtype=store.manifest.dtype), EpochBoard(
        Routing.all_local(1, layers=spec.layers, experts=spec.experts)
    )


def logits_of(trunk, board, residency, *, batch, combine="partial"):
    """Logits of prompts, then of decoded tokens: of one session, or of four together."""
    segment, seen = Segment(trunk, residency, board), []
    names = [f"s{index}" for index in range(batch)]
    for name, prompt in zip(names, PROMPTS, strict=False):
        segment.open(name, 32)
        seen.append(segment.step(name, torch.tensor(prompt), combine=combine))
    inputs = torch.cat([logits[-1:] for logits in seen]).argmax(-1)
    for _ in range(DECODED):
        alone = batch == 1
        logits = segment.step(names[0], inputs, combine=combine) if alone else segment.step_batch(names, inputs)
        seen.append(logits)
        inputs = logits.argmax(-1)
    return torch.cat(seen)


@pytest.mark.parametrize("family", FIVE)
def test_cached_is_resident_bit_for_bit(family, checkpoint, store):
    """Every eviction, every tier, prefetch on and off, one and four sessions, threads that load beside."""
    opened = store(family)
    trunk, board = trunk_and_board(checkpoint(family), opened)
    for batch in (1, 4):
        want = logits_of(trunk, board, resident(opened), batch=batch)
        for eviction in EVICTIONS:
            for prefetch in (False, True):
                held = cached(opened, eviction=eviction, prefetch=prefetch)
                if prefetch:
                    held.slack = EagerSlack()
                assert torch.equal(logits_of(trunk, board, held, batch=batch), want), (eviction, prefetch, batch)
                assert sum(held.counts.loads) > 20
                assert (sum(held.counts.prefetched) > 0) == prefetch
        for tier, slots in (("host", 3), ("device", 1), ("device", 0), ("device", 32)):
            held = cached(opened, tier=tier, slots=slots)
            assert torch.equal(logits_of(trunk, board, held, batch=batch), want), (tier, slots, batch)
            assert held.used()[tier] <= held.budgets[tier]


def test_ordered_steps_and_a_checkpoint_itself(checkpoint, store):
    """The records may be made from the checkpoint whenever they are needed."""
    opened = store("qwen3_moe")
    trunk, board = trunk_and_board(checkpoint("qwen3_moe"), opened)
    held = cached(opened)
    found = read_checkpoint(checkpoint("qwen3_moe"))
    for record in opened.manifest.records:
        held.drop(record.key)
        held.place(record.key, CheckpointExpert(found, layout_of(found), record.key))
    got = logits_of(trunk, board, held, batch=1, combine="ordered")
    assert torch.equal(got, logits_of(trunk, board, resident(opened), batch=1, combine="ordered"))


def test_what_is_put_stays_and_what_is_left_is_cache(store):
    opened = store("qwen3_moe")
    held, size = cached(opened, slots=4), opened.manifest.layout.bytes
    held.put((0, 0), "device", opened.read(opened.by_key[0, 0].sha256))
    for layer in (1, 2, 1):
        take(held, layer, range(8))
        assert held.tier_of((0, 0)) == "device"
        assert held.used()["device"] == 4 * size
    for expert in range(1, 4):
        held.put((0, expert), "device", opened.read(opened.by_key[0, expert].sha256))
    assert held.held()["device"] == [(0, expert) for expert in range(4)]
    take(held, 1, range(8))  # no room for a cache: read for one use
    assert held.used()["device"] == 4 * size
    assert held.tier_of((1, 0)) == "disk"


def take(held, layer, experts):
    """Lend experts and return their first weights, by expert."""
    experts = list(experts)
    with closing(held.lend(layer, experts)) as lending:
        return {experts[position]: lent.weights.gate_up.clone() for position, lent in lending}


def test_a_lower_budget_takes_effect_at_once_and_a_higher_one_again(store):
    opened, size = store("qwen3_moe"), store("qwen3_moe").manifest.layout.bytes
    held = cached(opened, slots=8)
    for expert in range(4):
        record = opened.by_key[0, expert]
        held.put((0, expert), "device", opened.read(record.sha256), source=source_of(opened, record.key))
    take(held, 1, range(4))
    assert held.used()["device"] == 8 * size
    held.set_budget("device", 3 * size)
    assert held.used()["device"] == 3 * size
    assert held.held()["device"] == [(0, expert) for expert in range(4)]  # still what the plan gave
    before = {expert: opened.read(opened.by_key[0, expert].sha256) for expert in range(4)}
    assert {expert: held.record((0, expert)) for expert in range(4)} == before
    assert len(take(held, 0, range(4))) == 4
    assert held.used()["device"] <= 3 * size
    held.set_budget("device", 100 * size)
    assert held.budgets["device"] == 8 * size  # what was reserved


def test_replicas_that_lie_nowhere_else_do_not_make_room(store):
    opened, size = store("qwen3_moe"), store("qwen3_moe").manifest.layout.bytes
    held = Residency(opened.manifest.layout, {"device": 4 * size}, caching=Caching(4, 8))
    for expert in range(3):
        held.put((0, expert), "device", opened.read(opened.by_key[0, expert].sha256))
    with pytest.raises(BudgetTooSmall, match="3 experts have no copy on this node's disk") as caught:
        held.set_budget("device", size)
    assert caught.value.needed == 3 * size


def damaged_copy(opened, path, key, *, at=100):
    """A copy of the records file with one bit flipped in the record of `key`."""
    data = bytearray((opened.path / RECORDS_NAME).read_bytes())
    record = opened.by_key[key]
    data[record.offset + at] ^= 1
    path.write_bytes(data)
    return RecordFile(path, record.sha256, record.offset)


def test_a_flipped_bit_is_refused_and_the_record_found_elsewhere(store, tmp_path):
    opened, key = store("qwen3_moe"), (1, 3)
    held = Residency(opened.manifest.layout, {"device": 1 << 20}, caching=Caching(4, 8))
    bad = damaged_copy(opened, tmp_path / "bad", key)
    held.place(key, bad)
    with pytest.raises(ExpertLost, match=r"layer 1 expert 3: no intact record is left: .*bad"):
        take(held, 1, [3])
    assert held.used()["device"] == 0
    fetched = []

    def fetch(name):
        fetched.append(name)
        return opened.read(name)

    held.add_source(key, FetchedRecord(bad.sha256, fetch))
    assert held.record(key) == opened.read(bad.sha256)
    take(held, 1, [3])
    assert len(fetched) == 2
    (tmp_path / "bad").write_bytes((opened.path / RECORDS_NAME).read_bytes())  # the disk has recovered
    held.drop(key)
    held.place(key, bad)
    assert held.record(key) == opened.read(bad.sha256)


def test_a_file_that_is_gone_or_short_is_refused(store, tmp_path):
    opened, key = store("qwen3_moe"), (0, 0)
    held = Residency(opened.manifest.layout, {"device": 1 << 20}, caching=Caching(4, 8))
    (tmp_path / "short").write_bytes(b"abc")
    for name, why in (("none", "No such file"), ("short", "cut short")):
        held.place(key, RecordFile(tmp_path / name, opened.by_key[key].sha256))
        with pytest.raises(ExpertLost, match=why):
            take(held, 0, [0])
        held.drop(key)
    with pytest.raises(ExpertUnavailable):
        take(held, 0, [0])


def test_a_prompt_streams_layers_bit_for_bit(checkpoint, store):
    """What the next layer asks for is loaded while this one is computed, as far as there are slots nobody uses."""
    opened = store("qwen3_moe")
    trunk, board = trunk_and_board(checkpoint("qwen3_moe"), opened)
    prompt = torch.arange(7, 107)

    def logits(held):
        segment = Segment(trunk, held, board)
        segment.open("s", 200)
        return torch.cat([segment.step("s", prompt), segment.step("s", prompt[:50])])

    want = logits(resident(opened))
    for slots in (3, 8, 20):
        held = cached(opened, slots=slots)
        held.slack = EagerSlack()
        assert torch.equal(logits(held), want), slots
        assert sum(held.counts.prefetch_hits) > 10
        assert held.used()["device"] <= held.budgets["device"]


def test_what_the_next_layer_has_at_hand_stays(store):
    held = cached(store("qwen3_moe"), slots=8)
    held.slack = EagerSlack()
    take(held, 1, [0, 1, 2])
    with closing(held.lend(0, [0, 1, 2], rows=300, ahead=Ahead(1, lambda: range(8)))) as lending:
        assert len(list(lending)) == 3
    assert [held.tier_of((1, expert)) for expert in range(3)] == ["device"] * 3
    assert held.counts.prefetched[1] == 5  # the three of layer 0 made room
    take(held, 1, range(8))
    assert (held.counts.prefetch_hits[1], held.counts.loads[1]) == (5, 8)


def test_nothing_makes_room_for_what_is_on_its_way(store):
    held = cached(store("qwen3_moe"), slots=4)
    held.slack = EagerSlack()
    take(held, 0, [0, 1])
    held.prefetch(1, lambda: [0, 1])
    take(held, 1, [0, 1])
    assert (held.counts.prefetch_hits[1], held.counts.evictions) == (2, 0)


def test_a_guess_that_came_true_makes_room_again(store):
    """Even if it was at hand before its layer began, and all of that layer was."""
    held = cached(store("qwen3_moe"), slots=2)
    held.slack = EagerSlack()
    held.prefetch(1, lambda: [0, 1])
    with held._changed:
        assert held._changed.wait_for(lambda: all((1, expert) in held._shelf.ready for expert in (0, 1)), 10)
    take(held, 1, [0, 1])
    assert held.counts.prefetch_hits[1] == 2
    assert len(held._shelf.evictable) == 2
    assert len(take(held, 2, range(4))) == 4


def test_several_threads_share_few_slots(store):
    """Each gets the right weights though three slots are fought over, and nobody waits for ever."""
    opened = store("qwen3_moe")
    held, want = cached(opened), resident(opened)
    held.slack = EagerSlack()
    faults = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for turn in range(40):
            layer = (turn + seed) % 4
            experts = sorted(torch.randperm(8, generator=generator)[: 1 + turn % 4].tolist())
            held.prefetch((layer + 1) % 4, lambda experts=experts: experts)
            for expert, weights in take(held, layer, experts).items():
                if not torch.equal(weights, want.acquire((layer, expert)).gate_up):
                    faults.append((layer, expert))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert faults == []
    assert held.used()["device"] <= held.budgets["device"]


def test_a_loan_that_is_given_up_is_returned(store):
    opened = store("qwen3_moe")
    held = cached(opened, slots=4)
    for _ in range(20):
        lending = held.lend(0, [0, 1, 2, 3])
        next(lending)
        lending.close()
    assert len(take(held, 1, range(8))) == 8
