"""Sessions: bounds, memory, threads, epochs, sampling."""

import threading

import pytest
import torch

from runtime.errors import CallFailed, ContextFull, ExpertUnavailable, InvalidInput, KvBudgetExceeded, UnknownSession
from runtime.generation import generate
from runtime.routing import Routing
from runtime.sampling import Sampling
from tests.families import FAMILIES, InProcessCaller, all_here, reference, reference_tokens, split_model, spread

NEVER = frozenset()


@pytest.fixture
def split(checkpoint, store):
    return split_model(checkpoint("qwen3_moe"), store("qwen3_moe"), spread(store("qwen3_moe")))


def tokens(split, prompt, count=12, **options):
    return list(generate(split.segment, prompt, max_tokens=count, caller=split.caller, stop_ids=NEVER, **options))


def test_kv_memory_is_accounted_bounded_and_freed(checkpoint, store):
    split = split_model(checkpoint("qwen3_moe"), store("qwen3_moe"), all_here(store("qwen3_moe")), kv_budget=1 << 16)
    segment, each = split.segment, 2 * 2 * 16 * 4 * 4  # keys and values × heads × size × float32 × layers
    segment.open("a", 32)
    assert segment.sessions.kv_used == 32 * each
    with pytest.raises(KvBudgetExceeded, match="1 open sessions") as caught:
        segment.open("b", 33)
    assert caught.value.needed == 33 * each
    segment.close("a")
    segment.close("a")
    assert (segment.sessions.kv_used, len(segment.sessions)) == (0, 0)
    segment.open("b", 33)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_reserves_what_its_cache_takes(checkpoint, store, family):
    segment = split_model(checkpoint(family), store(family), all_here(store(family))).segment
    segment.open("a", 12)
    segment.step("a", torch.arange(5, 17))
    layers = segment.sessions["a"].cache.layers
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == segment.sessions.kv_used


def test_context_is_bounded(split):
    with pytest.raises(ContextFull, match="600 tokens exceed the model's context of 512"):
        split.segment.open("a", 600)
    split.segment.open("a", 4)
    split.segment.step("a", torch.tensor([5, 6, 7]), caller=split.caller)
    with pytest.raises(ContextFull, match="5 tokens exceed the session's reservation of 4"):
        split.segment.step("a", torch.tensor([8, 9]), caller=split.caller)
    with pytest.raises(InvalidInput, match="open already"):
        split.segment.open("a", 4)
    split.segment.close("a")
    with pytest.raises(UnknownSession, match="'a'"):
        split.segment.step("a", torch.tensor([8]))


def test_generate_frees_its_session_however_it_ends(split):
    stream = generate(split.segment, [5, 6], max_tokens=9, caller=split.caller, stop_ids=NEVER)
    next(stream)
    assert len(split.segment.sessions) == 1
    stream.close()
    assert len(split.segment.sessions) == 0
    with pytest.raises(CallFailed, match="no peers"):
        list(generate(split.segment, [5, 6], max_tokens=9))
    assert len(split.segment.sessions) == 0
    assert split.board.running_before(99) == 0
    with pytest.raises(InvalidInput):
        list(generate(split.segment, [], max_tokens=9))


def test_stop_token_ends_the_text_and_is_the_last(split):
    whole = tokens(split, [5, 6, 7])
    stop = whole[3]
    got = list(generate(split.segment, [5, 6, 7], max_tokens=12, caller=split.caller, stop_ids=frozenset({stop})))
    assert got == whole[: whole.index(stop) + 1]
    assert split.segment.trunk.stop_ids == {1}


def test_sessions_in_several_threads_do_not_disturb_each_other(checkpoint, split):
    model = reference(checkpoint("qwen3_moe"))
    prompts = [[5, 6, 7, 8 + n] for n in range(4)]
    got = {}

    def run(n):
        caller = InProcessCaller(split.caller.holders)
        mode = "ordered" if n % 2 else "partial"
        got[n] = list(generate(split.segment, prompts[n], max_tokens=12, caller=caller, combine=mode, stop_ids=NEVER))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n] for n in range(4)] == [reference_tokens(model, prompt, 12) for prompt in prompts]


def test_a_new_epoch_in_the_middle_changes_no_token(checkpoint, store, split):
    opened, residency = store("qwen3_moe"), split.segment.residency
    spec = opened.manifest.model
    want = tokens(split, [5, 6, 7])
    stream = generate(split.segment, [5, 6, 7], max_tokens=12, caller=split.caller, stop_ids=NEVER)
    got = [next(stream) for _ in range(5)]
    for record in opened.manifest.records:
        residency.put(record.key, "device", opened.read(record.sha256))
    split.board.install(Routing.all_local(2, layers=spec.layers, experts=spec.experts))
    assert split.board.wait_drained(2, timeout_s=1)
    split.caller.calls.clear()
    assert got + list(stream) == want
    assert split.caller.calls == []


def test_an_expert_that_nobody_holds_is_named(split):
    spec = split.segment.trunk.spec
    split.board.install(Routing.build(7, layers=spec.layers, experts=spec.experts, local=[]))
    with pytest.raises(ExpertUnavailable, match=r"layer 0 expert \d is not held by any node in epoch 7"):
        tokens(split, [5, 6, 7])


def test_an_answer_of_another_shape_is_refused(split):
    class Wrong:
        def begin(self, call):
            return self

        def result(self):
            return torch.zeros(1, 3)

    with pytest.raises(CallFailed, match="expected"):
        list(generate(split.segment, [5, 6, 7], max_tokens=2, caller=Wrong()))


def test_counters_tell_what_happened(split):
    spec = split.segment.trunk.spec
    tokens(split, [5, 6, 7, 8], 6)
    counts = split.segment.counters.snapshot()
    assert (counts.tokens, counts.steps) == (4 + 5, 6)  # the last token is not run
    assert counts.routed.sum() == counts.rows == 9 * spec.layers * spec.top_k
    assert counts.events == 9 * spec.layers
    assert counts.remote_rows == sum(len(call.token) for call in split.caller.calls)
    assert counts.remote_calls == len(split.caller.calls)
    assert counts.tier_rows == {"device": counts.rows - counts.remote_rows}
    assert 0 < counts.remote_call_share < counts.any_remote_share <= 1
    assert counts.hit_rate == pytest.approx(1 - counts.remote_call_share)
    assert min(counts.trunk_s, counts.local_s, counts.wait_s) > 0
    counts.routed[:] = 0
    assert split.segment.counters.snapshot().routed.any()  # a snapshot is a copy


def test_sampling_follows_its_seed(split):
    hot = [tokens(split, [5, 6], 16, sampling=Sampling(temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    torch.manual_seed(9)  # the process's own generator plays no part
    assert tokens(split, [5, 6], 16, sampling=Sampling(temperature=1.5, seed=1)) == hot[0]
