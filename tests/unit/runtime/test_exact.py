"""The whole path against one-node transformers: every family, experts here or spread, prefill and decode."""

import pytest
import torch

from runtime.engine import Segment
from runtime.generation import generate
from runtime.loading import load_trunk
from runtime.routing import EpochBoard, Routing
from runtime.sampling import PREFILL_CHUNK
from tests.families import FAMILIES, all_here, make_store, reference, reference_tokens, residencies, split_model, spread

PROMPT = [int(x) for x in torch.randint(2, 256, (24,), generator=torch.Generator().manual_seed(1))]
TOKENS = 20


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def one_node(family, checkpoint):
    return reference(checkpoint(family))


def forced(split, ids, combine):
    """Logits of a prompt in one step, then of each further token in a step of its own. [T, V]"""
    segment = split.segment
    segment.open("forced", len(ids))
    try:
        rows = [segment.step("forced", torch.tensor(ids[:24]), caller=split.caller, combine=combine, keep="all")]
        rows += [
            segment.step("forced", torch.tensor([token]), caller=split.caller, combine=combine) for token in ids[24:]
        ]
    finally:
        segment.close("forced")
    return torch.cat(rows)


def forced_reference(model, ids):
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        rows = [model(torch.tensor([ids[:24]]), past_key_values=cache).logits[0]]
        rows += [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in ids[24:]]
    return torch.cat(rows)


@pytest.mark.parametrize("owners", [all_here, spread])
def test_logits_equal_one_node(family, one_node, checkpoint, store, owners):
    ids = PROMPT + reference_tokens(one_node, PROMPT, TOKENS)
    want = forced_reference(one_node, ids)
    split = split_model(checkpoint(family), store(family), owners(store(family)))
    assert torch.equal(forced(split, ids, "ordered"), want)
    torch.testing.assert_close(forced(split, ids, "partial"), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert bool(split.caller.calls) == (owners is spread)


@pytest.mark.parametrize("combine", ["partial", "ordered"])
def test_greedy_tokens_equal_one_node(family, one_node, checkpoint, store, combine):
    split = split_model(checkpoint(family), store(family), spread(store(family)))
    got = generate(split.segment, PROMPT, max_tokens=TOKENS, combine=combine, caller=split.caller, stop_ids=frozenset())
    assert list(got) == reference_tokens(one_node, PROMPT, TOKENS)


def test_a_prompt_in_chunks_gives_the_tokens_of_one_node(family, one_node, checkpoint, store):
    prompt = torch.randint(2, 256, (PREFILL_CHUNK + 50,), generator=torch.Generator().manual_seed(8)).tolist()
    split = split_model(checkpoint(family), store(family), spread(store(family)))
    got = generate(split.segment, prompt, max_tokens=TOKENS, caller=split.caller, stop_ids=frozenset())
    assert list(got) == reference_tokens(one_node, prompt, TOKENS)


def test_layer_ranges_in_a_row_equal_the_whole(family, one_node, checkpoint, store):
    spec, residency = store(family).manifest.model, residencies(store(family), all_here(store(family)))["here"]
    board = EpochBoard(Routing.all_local(0, layers=spec.layers, experts=spec.experts))
    ranges = [(0, 0), (1, 2), (3, 3)]
    segments = [
        Segment(load_trunk(checkpoint(family), dtype="float32", first_layer=a, last_layer=b), residency, board)
        for a, b in ranges
    ]
    ids = PROMPT + reference_tokens(one_node, PROMPT, TOKENS)
    for segment in segments:
        segment.open("s", len(ids))
    rows = []
    for piece in [ids[:24], *([token] for token in ids[24:])]:
        flow = torch.tensor(piece)
        for segment in segments:
            flow = segment.step("s", flow, combine="ordered", keep="all")
        rows.append(flow)
    assert torch.equal(torch.cat(rows), forced_reference(one_node, ids))
    reserved = sum(segment.sessions.kv_used for segment in segments)
    assert reserved == spec.kv_bytes(tokens=len(ids), sessions=1)


def test_half_precision_ordered_is_bit_equal(family, checkpoint, tmp_path):
    dtype = torch.float16 if family in ("mixtral", "gpt_oss") else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    half = make_store(checkpoint(family), tmp_path / "store", name)
    split = split_model(checkpoint(family), half, spread(half))
    split.segment.open("s", 24)
    got = split.segment.step("s", torch.tensor(PROMPT), caller=split.caller, combine="ordered", keep="all")
    with torch.no_grad():
        want = reference(checkpoint(family), dtype=dtype)(torch.tensor([PROMPT])).logits[0]
    assert torch.equal(got, want)
