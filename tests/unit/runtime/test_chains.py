"""Segments in a row against the whole model: every split, experts here or called, one session and several at once."""

import gc
import random
import shutil
import weakref

import pytest
import torch

from runtime.errors import ContextFull, InvalidInput, UnknownSession
from runtime.sampling import PREFILL_CHUNK, Sampling, sample
from tests.families import FAMILIES, chain_model, make_store

DRAWN = torch.randint(2, 256, (4, 160), generator=torch.Generator().manual_seed(3)).tolist()
PROMPTS = [DRAWN[0][: PREFILL_CHUNK + 9], DRAWN[1][:3], DRAWN[2][:20], DRAWN[3][:15]]  # windows are 16
STEPS = 12
SPLITS = {2: [1], 3: [1, 3], 4: [1, 2, 3]}


def keys(store):
    return [record.key for record in store.manifest.records]


@pytest.fixture(scope="module", params=FAMILIES[:5])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def whole(family, checkpoint, store):
    """One node with everything, and what it answers to each prompt: logits of each step, by combine."""
    chain = chain_model(checkpoint(family), store(family), [], dict.fromkeys(keys(store(family)), 0))
    return {combine: [follow(chain, prompt, combine) for prompt in PROMPTS] for combine in ("ordered", "partial")}


def follow(chain, prompt, combine, name="s"):
    """Logits of the prompt's last token and of each greedy token. [STEPS, V]"""
    chain.open(name, len(prompt) + STEPS)
    rows = [chain.prefill(name, prompt, combine=combine)]
    while len(rows) < STEPS:
        rows.append(chain.step(name, rows[-1].argmax(-1), combine=combine))
    chain.close(name)
    return torch.cat(rows)


@pytest.mark.parametrize("where", ["local", "called"])
@pytest.mark.parametrize("count", SPLITS)
def test_a_chain_equals_the_whole(family, whole, checkpoint, store, count, where):
    spec, cuts = store(family).manifest.model, SPLITS[count]
    draw = random.Random(count)
    at = {layer: sum(cut <= decoder for cut in cuts) for layer, decoder in enumerate(spec.moe_layer_indices)}
    owners = {key: at[key[0]] if where == "local" else draw.randrange(count) for key in keys(store(family))}
    chain = chain_model(checkpoint(family), store(family), cuts, owners)
    for prompt, want in zip(PROMPTS[:2], whole["ordered"], strict=False):
        assert torch.equal(follow(chain, prompt, "ordered"), want)
    assert bool(chain.caller.calls) == (where == "called")
    got = follow(chain, PROMPTS[0], "partial")
    assert torch.equal(got.argmax(-1), whole["ordered"][0].argmax(-1))


def test_four_sessions_in_turn_equal_one_after_another(family, whole, checkpoint, store):
    chain = chain_model(checkpoint(family), store(family), [2], {key: sum(key) % 2 for key in keys(store(family))})
    logits = []
    for index, prompt in enumerate(PROMPTS):
        chain.open(str(index), len(prompt) + STEPS)
        logits.append([chain.prefill(str(index), prompt, combine="ordered")])
    for _ in range(STEPS - 1):
        for index, rows in enumerate(logits):
            rows.append(chain.step(str(index), rows[-1].argmax(-1), combine="ordered"))
    assert all(torch.equal(torch.cat(rows), want) for rows, want in zip(logits, whole["ordered"], strict=True))


def test_a_batch_equals_single_steps(family, whole, checkpoint, store):
    chain = chain_model(checkpoint(family), store(family), [1, 3], {key: sum(key) % 3 for key in keys(store(family))})
    names = [str(index) for index in range(4)]
    rows = []
    for name, prompt in zip(names, PROMPTS, strict=True):
        chain.open(name, len(prompt) + STEPS)
        rows.append(chain.prefill(name, prompt))
    logits = [torch.cat(rows)]
    chain.caller.calls.clear()
    while len(logits) < STEPS:
        logits.append(chain.step_batch(names, logits[-1].argmax(-1)))
    want = torch.stack(whole["partial"], dim=1)  # [STEPS, B, V]
    got = torch.stack(logits)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    bundles = {(call.layer, call.holder) for call in chain.caller.calls}
    assert len(chain.caller.calls) <= (STEPS - 1) * len(bundles)  # one call for all sessions
    for segment in chain.segments:
        counts = segment.counters.snapshot()
        assert counts.tokens == sum(len(prompt) for prompt in PROMPTS) + 4 * (STEPS - 1)
    for name in names:
        chain.close(name)
    assert [segment.sessions.kv_used for segment in chain.segments] == [0, 0, 0]


@pytest.fixture
def chain(checkpoint, store):
    return chain_model(checkpoint("qwen3_moe"), store("qwen3_moe"), [2], dict.fromkeys(keys(store("qwen3_moe")), 0))


def test_sessions_join_and_leave_a_batch(chain, checkpoint, store):
    names = ["a", "b", "c"]
    want = {
        name: follow(chain, prompt, "partial").argmax(-1).tolist() for name, prompt in zip(names, PROMPTS, strict=False)
    }
    got = {}
    for name, prompt in zip(names, PROMPTS, strict=False):
        chain.open(name, len(prompt) + STEPS)
        got[name] = chain.prefill(name, prompt).argmax(-1).tolist()
    for step in range(1, STEPS):
        some = [name for index, name in enumerate(names) if (step + index) % 3] if step < 8 else names
        chosen = chain.step_batch(some, torch.tensor([got[name][-1] for name in some])).argmax(-1).tolist()
        for name, token in zip(some, chosen, strict=True):
            got[name].append(token)
    assert all(got[name] == want[name][: len(got[name])] for name in names)


def test_a_batch_is_checked_before_anything_is_modified(chain):
    for name in "ab":
        chain.open(name, 5)
        chain.prefill(name, [5, 6, 7])
    first = chain.segments[0]
    for names, inputs in [(["a", "a"], [5, 6]), (["a"], [5, 6]), ([], [])]:
        with pytest.raises(InvalidInput, match="each session once"):
            first.step_batch(names, torch.tensor(inputs, dtype=torch.int64))
    with pytest.raises(UnknownSession):
        first.step_batch(["a", "x"], torch.tensor([5, 6]))
    first.step_batch(["a"], torch.tensor([5]))
    first.step_batch(["a"], torch.tensor([5]))
    with pytest.raises(ContextFull):
        first.step_batch(["b", "a"], torch.tensor([5, 6]))
    before = first.step_batch(["b"], torch.tensor([5]))
    assert before.shape == (1, 64)


def test_a_session_run_again_from_its_tokens_goes_on_with_the_same(chain):
    sampling, prompt = Sampling(temperature=1.2, top_p=0.9, seed=7), DRAWN[0][:30]

    def run(ids, upto):
        chain.open("s", 100)
        logits = chain.prefill("s", ids)
        while len(ids) < upto:
            ids = [*ids, sample(logits[-1], sampling, len(ids))]
            logits = chain.step("s", torch.tensor(ids[-1:]))
        chain.close("s")
        return ids

    whole = run(prompt, 70)
    assert run(whole[:50], 70) == whole


def test_a_batch_sees_no_more_than_its_windows(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("mixtral"), tmp_path / "model")
    text = (model / "config.json").read_text().replace('"sliding_window": null', '"sliding_window": 8')
    (model / "config.json").write_text(text)
    store = make_store(model, tmp_path / "store")
    chain = chain_model(model, store, [2], dict.fromkeys(keys(store), 0))
    assert set(chain.segments[0].trunk.decoder.windows) == {8}  # torch's own attention, unlike gpt_oss
    names = ["a", "b", "c"]
    prompts = [DRAWN[0][:30], DRAWN[1][:2], DRAWN[2][:7]]
    want = torch.stack([follow(chain, prompt, "partial") for prompt in prompts], dim=1)
    rows = []
    for name, prompt in zip(names, prompts, strict=True):
        chain.open(name, len(prompt) + STEPS)
        rows.append(chain.prefill(name, prompt))
    logits = [torch.cat(rows)]
    while len(logits) < STEPS:
        logits.append(chain.step_batch(names, logits[-1].argmax(-1)))
    assert torch.equal(torch.stack(logits).argmax(-1), want.argmax(-1))
    torch.testing.assert_close(torch.stack(logits), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_thousand_sessions_leave_no_memory_behind(checkpoint, store):
    chain = chain_model(checkpoint("olmoe"), store("olmoe"), [2], dict.fromkeys(keys(store("olmoe")), 0))
    draw, caches, opened = random.Random(1), weakref.WeakSet(), []
    limit = chain.segments[0].kv_bytes(8) * 6
    for segment in chain.segments:
        segment.sessions.kv_budget = limit
    for index in range(1000):
        name = str(index)
        chain.open(name, 8)
        opened.append(name)
        caches.update(segment.sessions[name].cache for segment in chain.segments)
        if index % 20 == 0:
            chain.prefill(name, [5, 6, 7])
        if index % 20 == 10:
            chain.segments[0].step(name, torch.tensor([5, 6]))  # lost on its way
        if index % 3 == 0:
            chain.close(name)  # cancelled
            opened.remove(name)
        while len(opened) > 5:
            chain.close(opened.pop(draw.randrange(len(opened))))
    for name in opened:
        chain.close(name)
    gc.collect()
    assert [(segment.sessions.kv_used, len(segment.sessions)) for segment in chain.segments] == [(0, 0)] * 2
    assert not caches
