"""One token's experts: the bits of any number of tokens', whatever is at hand, and what is told about it."""

import threading

import numpy as np
import pytest
import torch

from runtime.counters import Counts
from runtime.dispatch import Dispatcher
from runtime.experts import ExpertCall, Rows, compute_rows, execute_call
from runtime.few import Picked, answer_call, compute_few, compute_token, pick
from runtime.generation import generate
from runtime.records import RecordFile
from runtime.slots import Caching, Residency
from schemas.store import RECORDS_NAME
from tests.families import FAMILIES, make_store, split_model, spread

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def resident(opened, experts=range(8)):
    held = Residency(opened.manifest.layout, {"device": 8 * opened.manifest.layout.bytes})
    for expert in experts:
        held.put((0, expert), "device", opened.read(opened.by_key[0, expert].sha256))
    return held


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_any_number_of_tokens(family, checkpoint, store, tmp_path, dtype):
    opened = store(family) if dtype == "float32" else make_store(checkpoint(family), tmp_path, dtype)
    held, draw = resident(opened), torch.Generator().manual_seed(3)
    for experts in ([4], [0, 7], [1, 2, 5], [0, 7]):
        hidden = torch.randn(1, 64, generator=draw).to(getattr(torch, dtype))
        weights, tiers = torch.rand(len(experts), generator=draw), {}
        rows = Rows(np.zeros(len(experts), dtype=np.int32), np.array(experts), weights)
        got = compute_token(held, Picked(0, experts, weights.numpy()), hidden, tiers)
        assert torch.equal(got, compute_rows(held, 0, rows, hidden, combine="partial"))
        assert tiers == {"device": len(experts)}
    assert all(copy.users == 0 for copy in held._shelf.copies.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_few_tokens(family, checkpoint, store, tmp_path, dtype):
    opened = store(family) if dtype == "float32" else make_store(checkpoint(family), tmp_path, dtype)
    held, tiers = resident(opened), {}
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(4)).to(getattr(torch, dtype))
    for token, expert in ([(0, 1, 3, 2), (0, 0, 0, 5)], [(1, 2, 3), (1, 4, 7)], [(0, 1, 2, 3, 0), (2, 2, 2, 2, 3)]):
        rows = Rows(np.array(token), np.array(expert), torch.rand(len(token)))
        got = compute_few(held, 0, rows, hidden, tiers)
        assert torch.equal(got, compute_rows(held, 0, rows, hidden, combine="partial"))
    assert tiers == {"device": 12}


def test_threads_do_not_share_the_memory_they_compute_in(store):
    held, wrong = resident(store("qwen3_moe")), []

    def run(seed):
        hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
        picked = Picked(0, [1, 5], np.array([0.25, 0.75], dtype=np.float32))
        want = compute_token(held, picked, hidden)
        wrong.extend(seed for _ in range(200) if not torch.equal(compute_token(held, picked, hidden), want))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_done_where_an_expert_is_not_at_hand(store):
    held = resident(store("mixtral"), experts=[0, 1])
    weights = np.ones(2, dtype=np.float32)
    assert compute_token(held, Picked(0, [1, 2], weights), torch.zeros(1, 64)) is None
    assert all(copy.users == 0 for copy in held._shelf.copies.values())


def test_an_expert_in_use_outlives_its_replica(store):
    held = resident(store("mixtral"), experts=[0])
    (copy,) = held.take(0, [0])
    held.drop((0, 0))
    assert held.used()["device"] == held.layout.bytes
    assert float(held.weights(copy).down.abs().sum()) > 0
    held.end(0, [copy])
    assert held.used()["device"] == 0


@pytest.mark.parametrize("combine", ["partial", "ordered"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_call_is_answered_as_ever(store, combine, tokens):
    held = resident(store("olmoe"))
    token, expert = np.array([0, tokens - 1], dtype=np.int32), np.array([2, 6], dtype=np.int32)
    call = ExpertCall("me", 1, 0, combine, torch.randn(tokens, 64), token, expert, torch.rand(2))
    assert torch.equal(answer_call(held, call), execute_call(held, call))


def test_a_choice_is_sorted_by_expert():
    picked = pick(3, torch.tensor([[6, 1, 4]]), torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.bfloat16))
    assert (picked.layer, picked.experts) == (3, [1, 4, 6])
    np.testing.assert_array_equal(picked.weights, torch.tensor([0.3, 0.2, 0.5]).bfloat16().float())
    assert picked.some([0, 2]).experts == [1, 6]


def test_calls_of_one_token_are_those_of_rows(checkpoint, store, monkeypatch):
    runs = []
    for is_single in (True, False):
        split = split_model(checkpoint("qwen3_moe"), store("qwen3_moe"), spread(store("qwen3_moe")))
        if not is_single:
            monkeypatch.setattr(Dispatcher, "_run_token", lambda *_: None)  # as where it cannot be had so quickly
        tokens = list(generate(split.segment, [5, 6, 7], max_tokens=6, caller=split.caller, stop_ids=frozenset()))
        calls = [(c.layer, c.holder, c.token.tolist(), c.expert.tolist()) for c in split.caller.calls]
        counts = split.segment.counters.snapshot()
        runs.append((tokens, calls, counts.routed.tolist(), counts.remote_rows, counts.local_calls, counts.tier_rows))
    assert runs[0] == runs[1]


def test_counts_of_single_tokens_and_of_rows_add_up():
    counts = Counts(np.zeros((2, 4), dtype=np.int64))
    counts.count_token(1, [0, 3], remote_rows=1)
    counts.count_layer(1, np.array([3, 3, 2]), tokens=2, remote_rows=0, remote_tokens=0)
    counts.settle()
    assert counts.routed.tolist() == [[0] * 4, [1, 0, 1, 3]]
    assert (counts.events, counts.remote_events, counts.rows, counts.remote_rows) == (3, 1, 5, 1)


def test_what_is_called_and_what_is_loaded_add_up_to_what_is_at_hand(checkpoint, store):
    """Some experts are called, the others read into two slots: no bit differs from where all of those are at hand."""
    opened = store("qwen3_moe")
    spec, layout, runs = opened.manifest.model, opened.manifest.layout, []
    for is_cached in (False, True):
        split = split_model(checkpoint("qwen3_moe"), opened, spread(opened, 2))
        if is_cached:
            here = Residency(layout, {"device": 2 * layout.bytes}, caching=Caching(spec.layers, spec.experts))
            for key in split.segment.residency.held()["device"]:
                record = opened.by_key[key]
                here.place(key, RecordFile(opened.path / RECORDS_NAME, record.sha256, record.offset))
            split.segment.residency = here
        split.segment.open("s", 30)
        logits = [split.segment.step("s", torch.tensor([5, 6, 7]), caller=split.caller)]
        for _ in range(12):
            logits.append(split.segment.step("s", logits[-1][-1:].argmax(-1), caller=split.caller))
        runs.append((torch.cat(logits), [call.expert.tolist() for call in split.caller.calls]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert sum(split.segment.residency.counts.loads) > 12
