"""Experts in low precision: the same bits wherever and however they are held, damage found, the exact copy preferred."""

from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.alone import Times, open_alone, packing_pays
from runtime.engine import Segment
from runtime.errors import ExpertLost, ExpertUnavailable
from runtime.experts import Rows, compute_rows
from runtime.few import Picked, compute_taken
from runtime.importance import Importance
from runtime.packed import Repacked, Unpacked
from runtime.policy.eviction import EVICTIONS
from runtime.policy.prefetch import Slack
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import Exact, LowMissing, PrecisionByRank
from runtime.precision import empty_parts, unpack_parts
from runtime.records import CheckpointExpert, RecordFile
from runtime.slots import Caching, Residency
from schemas.checkpoint import read_checkpoint
from schemas.precision import LOW_PRECISIONS
from schemas.store import RECORDS_NAME
from tests.unit.runtime.test_cached import (
    FIVE,
    PROMPTS,
    EagerSlack,
    logits_of,
    resident,
    source_of,
    take,
    trunk_and_board,
)


def low_source(store, key, precision):
    records = store.manifest.packed_as(precision).records
    found = records[key[0] * store.manifest.model.experts + key[1]]
    return RecordFile(store.path / RECORDS_NAME, found.sha256, found.offset)


def weights_of(store, key, precision):
    """A record of weights as a packed one gives them back."""
    layout, packed = store.manifest.layout, store.manifest.packed_as(precision)
    record = packed.records[key[0] * store.manifest.model.experts + key[1]]
    parts = empty_parts(layout)
    unpack_parts(torch.frombuffer(bytearray(store.read(record.sha256)), dtype=torch.uint8), packed.layout, parts)
    return b"".join(part.view(-1).view(torch.uint8).numpy().tobytes() for part in parts)


def all_in_slots(store, precision):
    """Every expert in a slot, as weights of the precision."""
    held = Residency(store.manifest.layout, {"device": store.manifest.model.total_expert_bytes})
    for record in store.manifest.records:
        held.put(record.key, "device", weights_of(store, record.key, precision))
    return held


def packed_cache(store, precision, *, tier="device", slots=3, eviction="rates", is_remade=False):
    """Slots that hold packed records, loaded from those of the store, or made anew from its weights."""
    spec, size = store.manifest.model, store.manifest.packed_as(precision).layout.bytes
    held = Residency(
        store.manifest.layout,
        {tier: slots * size},
        caching=Caching(spec.layers, spec.experts, eviction=eviction),
        precision=precision,
    )
    for record in store.manifest.records:
        held.place(record.key, source_of(store, record.key))
        if not is_remade:
            held.place_packed(record.key, precision, low_source(store, record.key, precision))
    return held


def weights_cache(store, precision, *, slots=3, eviction="rates"):
    """Slots that hold weights, unpacked when they are loaded."""
    spec, layout = store.manifest.model, store.manifest.layout
    packed = store.manifest.packed_as(precision).layout
    caching = Caching(spec.layers, spec.experts, eviction=eviction)
    held = Residency(layout, {"device": slots * layout.bytes}, caching=caching)
    for record in store.manifest.records:
        held.place(record.key, Unpacked(low_source(store, record.key, precision), layout, packed))
    return held


@pytest.mark.parametrize("family", FIVE)
def test_cached_is_resident_bit_for_bit_in_every_precision(family, checkpoint, packed_store):
    opened = packed_store(family)
    trunk, board = trunk_and_board(checkpoint(family), opened)
    exact = logits_of(trunk, board, resident(opened), batch=1)
    for precision in LOW_PRECISIONS:
        want = logits_of(trunk, board, all_in_slots(opened, precision), batch=1)
        assert not torch.equal(want, exact)
        for number, eviction in enumerate(EVICTIONS):
            held = (packed_cache if number % 2 else weights_cache)(opened, precision, eviction=eviction)
            held.slack = EagerSlack()
            assert torch.equal(logits_of(trunk, board, held, batch=1), want), (precision, eviction)
            assert sum(held.counts.loads) > 20
            size = opened.manifest.packed_as(precision).layout.bytes
            assert sum(held.counts.load_bytes) == size * sum(held.counts.loads)
        for options in ({"tier": "host"}, {"slots": 0}, {"slots": 32}, {"is_remade": True}):
            held = packed_cache(opened, precision, **options)
            assert torch.equal(logits_of(trunk, board, held, batch=1), want), (precision, options)
        batched = logits_of(trunk, board, all_in_slots(opened, precision), batch=4)
        assert torch.equal(logits_of(trunk, board, packed_cache(opened, precision), batch=4), batched)


def test_more_experts_fit_into_the_same_bytes(packed_store):
    opened = packed_store("mixtral")
    size = opened.manifest.layout.bytes
    for precision, count in (("int8", 33), ("int4", 57)):
        held = Residency(opened.manifest.layout, {"device": 9 * size}, precision=precision)
        packed = opened.manifest.packed_as(precision).layout.bytes
        assert 9 * size // packed == count
        for record in opened.manifest.records:  # all 32, where 9 would fit
            held.put(record.key, "device", opened.read(record.sha256))
        assert held.used()["device"] == 32 * packed


def test_what_is_put_as_weights_is_told_as_weights(packed_store, tmp_path):
    """A node that holds experts packed still gives peers the record that the plan names, from where it has it."""
    opened, key = packed_store("gpt_oss"), (1, 3)
    record = opened.read(opened.by_key[key].sha256)
    held = Residency(opened.manifest.layout, {"device": 1 << 20, "disk": 1 << 20}, tmp_path / "r", precision="int8")
    held.put(key, "device", record)
    with pytest.raises(ExpertUnavailable, match="this node but in int8"):
        held.record(key)
    held.put(key, "disk", record)
    assert held.record(key) == record
    held.drop(key, "disk")
    assert not any((tmp_path / "r").iterdir())
    held.add_source(key, source_of(opened, key))
    assert held.record(key) == record


def damaged(store, key, precision, path):
    record = low_source(store, key, precision)
    data = bytearray((store.path / RECORDS_NAME).read_bytes())
    data[record.offset + 77] ^= 4
    path.write_bytes(data)
    return RecordFile(path, record.sha256, record.offset)


def test_a_flipped_bit_in_a_packed_record_is_refused_and_it_is_made_anew(packed_store, checkpoint, tmp_path):
    opened, key = packed_store("qwen3_moe"), (1, 3)
    layout, packed = opened.manifest.layout, opened.manifest.packed_as("int4").layout
    bad = damaged(opened, key, "int4", tmp_path / "bad")
    found = read_checkpoint(checkpoint("qwen3_moe"))
    for elsewhere in (source_of(opened, key), CheckpointExpert(found, layout, key)):
        for precision in ("int4", None):
            held = Residency(layout, {"device": 1 << 20}, caching=Caching(4, 8), precision=precision)
            held.place(key, bad if precision is None else elsewhere)
            held.drop(key)
            if precision is None:
                held.place(key, Unpacked(bad, layout, packed))
                with pytest.raises(ExpertLost, match=r"layer 1 expert 3: no intact record is left: .*bad"):
                    take(held, 1, [3])
                held.add_source(key, Unpacked(Repacked(elsewhere, layout, packed), layout, packed))
            else:
                held.place(key, elsewhere)
                held.place_packed(key, "int4", bad)
            want = torch.frombuffer(bytearray(weights_of(opened, key, "int4")), dtype=torch.float32)
            got = take(held, 1, [3])[3]
            assert torch.equal(got.flatten(), want[: got.numel()])
            assert sum(held.counts.load_bytes) == layout.bytes


def test_a_low_copy_will_do_where_it_is_allowed_and_no_better_one_is_here(packed_store):
    opened = packed_store("olmoe")
    layout, low = opened.manifest.layout, opened.manifest.packed_as("int4").layout
    held = Residency(layout, {"device": 4 * layout.bytes}, caching=Caching(4, 8))
    for record in opened.manifest.records:
        held.place(record.key, source_of(opened, record.key))
        if record.key != (0, 7):
            held.place_packed(record.key, "int4", low_source(opened, record.key, "int4"))
    assert held.low_precisions((0, 1)) == ["int4"]
    assert held.low_precisions((0, 7)) == []

    def lent(experts, *allowed):
        with closing(held.lend(0, experts, dict.fromkeys(allowed, "int4"))) as lending:
            return {experts[position]: each.precision for position, each in lending}

    assert lent([1, 2], 2) == {1: "checkpoint", 2: "int4"}
    assert held.counts.load_bytes[0] == layout.bytes + low.bytes
    assert [held.precision_of((0, expert)) for expert in (1, 2, 3)] == ["checkpoint", "int4", None]
    assert held.at_hand(0, 8).tolist() == [False, True] + [False] * 6
    assert lent([1, 2], 1, 2) == {1: "checkpoint", 2: "int4"}
    assert sum(held.counts.loads) == 2  # both were here
    assert lent([7], 7) == {7: "checkpoint"}  # no low record is known
    assert lent([2]) == {2: "checkpoint"}
    assert held.used()["device"] == 3 * layout.bytes  # the exact copy took the low one's place
    assert held.slack.low_load_s > 0
    held.drop((0, 2))
    with pytest.raises(ExpertUnavailable):
        lent([2], 2)


class LowSlack(Slack):
    """A disk so slow that low precision is always loaded sooner."""

    def prefers_low(self):
        return True


def low_cache(store):
    """Slots of weights, for exact records and for those in int4."""
    spec, layout = store.manifest.model, store.manifest.layout
    held = Residency(layout, {"device": 6 * layout.bytes}, caching=Caching(spec.layers, spec.experts))
    for record in store.manifest.records:
        held.place(record.key, source_of(store, record.key))
        held.place_packed(record.key, "int4", low_source(store, record.key, "int4"))
    held.slack = LowSlack()
    return held


def decoded(segment, names=("a",), count=8):
    """Logits of decode steps after a prompt, of one session or several together."""
    seen = []
    for name in names:
        segment.open(name, 32)
        segment.step(name, torch.tensor(PROMPTS[0]))
    for token in range(count):
        inputs = torch.tensor([token + 9 + 40 * index for index in range(len(names))])
        seen.append(segment.step(names[0], inputs) if len(names) == 1 else segment.step_batch(list(names), inputs))
    return torch.stack(seen)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("rule", [LowMissing(Exact()), PrecisionByRank(low=0.2, skip=1.0)])
def test_missing_experts_come_in_low_precision_as_the_budget_allows(checkpoint, packed_store, names, rule):
    opened = packed_store("qwen3_moe")
    trunk, board = trunk_and_board(checkpoint("qwen3_moe"), opened)
    want = decoded(Segment(trunk, low_cache(opened), board), names)
    price = 0.001
    for budget, precision in ((0.5, "int4"), (0.5, None), (0.0, "int4")):
        account = Controller(Allowance(budget, (budget,) * 4, (1.0,) * 4, nll_per_low_row=(price,) * 4, horizon=1000))
        segment = Segment(trunk, low_cache(opened), board)
        segment.importance = Importance(rule, account, is_whole=False, precision=precision)
        got, counts = decoded(segment, names), segment.counters.snapshot()
        assert account.spent == pytest.approx(price * counts.low_rows)
        loaded = segment.residency.counts.load_bytes
        if budget and precision:
            assert 0 < counts.low_rows < counts.rows
            assert not torch.equal(got, want)
            assert any(each % opened.manifest.layout.bytes for each in loaded)
        else:
            assert counts.low_rows == 0
            assert torch.equal(got, want)


def test_low_copies_at_hand_are_used_as_they_would_be_lent(packed_store):
    """In as few operations as exact ones, and counted as such."""
    held = low_cache(packed_store("qwen3_moe"))
    picked = Picked(0, [1, 2, 5], np.array([0.5, 0.3, 0.2], dtype=np.float32))
    hidden = torch.randn(1, held.layout.parts[0].shape[1], generator=torch.Generator().manual_seed(3))
    rows = Rows(np.zeros(3, dtype=np.int64), np.array(picked.experts), torch.from_numpy(picked.weights))
    low = {1: "int4", 5: "int4"}
    answers = [compute_rows(held, 0, rows, hidden, combine="partial", low=low) for _ in range(2)]  # loaded, at hand
    assert held.take(0, picked.experts) is None
    copies = held.take(0, picked.experts, "int4")
    assert [len(copy.key) for copy in copies] == [3, 2, 3]
    with torch.inference_mode():
        answers.append(compute_taken(held, picked, copies, hidden))
    assert all(torch.equal(each, answers[0]) for each in answers)
    assert not any(copy.users for copy in held._shelf.copies.values())


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e-2), st.floats(0, 1e-2))
def test_packing_pays_more_where_reading_takes_longer_and_less_fits(fit, more, read_s, unpack_s):
    fit_packed = min(1.0, fit + more)
    assert not packing_pays(Times(read_s, unpack_s), fit=1.0, fit_packed=1.0)
    if packing_pays(Times(read_s, unpack_s), fit=fit, fit_packed=fit_packed):
        assert packing_pays(Times(2 * read_s, unpack_s), fit=fit, fit_packed=fit_packed)
        assert packing_pays(Times(read_s, unpack_s / 2), fit=fit, fit_packed=fit_packed)
        assert packing_pays(Times(read_s, unpack_s), fit=fit / 2, fit_packed=fit_packed)


def test_a_segment_alone_gives_the_same_bits_packed_or_not(packed_store):
    opened = packed_store("mixtral")
    logits = []
    for options in ({"is_packed": True}, {"is_packed": False}, {"budget": None}):
        segment = open_alone(opened.path, **{"budget": 600_000, **options}, max_tokens=64, precision="int8")
        logits.append(decoded(segment))
        assert options.get("is_packed") in {None, segment.residency.packed is not None}
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
