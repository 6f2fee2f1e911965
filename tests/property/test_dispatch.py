"""However experts are spread and whatever the router chooses, the sum is the eager experts' sum."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.counters import Counters
from runtime.dispatch import Dispatcher
from runtime.routing import Routing
from runtime.slots import Residency
from runtime.text import TextStream
from schemas.placement import Route
from tests.families import InProcessCaller, lasting_directory, make_checkpoint, make_store, reference

EXPERTS, NAMES = 8, ("here", "a", "b", "c")
DEMO = Path(__file__).parents[2] / "examples" / "models" / "tinymoe-demo"


@cache
def pieces(family):
    """The eager experts of layer 0 and a residency that holds all of them."""
    root = lasting_directory()
    model = make_checkpoint(family, root / "model", layers=1)
    store = make_store(model, root / "store")
    residency = Residency(store.manifest.layout, {"device": store.manifest.model.total_expert_bytes})
    for record in store.manifest.records:
        residency.put(record.key, "device", store.read(record.sha256))
    return reference(model).model.layers[0].mlp.experts, residency


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(["qwen3_moe", "gpt_oss"]),
    owners=st.lists(st.sampled_from(NAMES), min_size=EXPERTS, max_size=EXPERTS),
    tokens=st.integers(1, 40),
    top_k=st.integers(1, EXPERTS),
    seed=st.integers(0, 1 << 30),
)
def test_any_split_equals_eager_experts(family, owners, tokens, top_k, seed):
    eager, residency = pieces(family)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 64, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    routes = [Route(ingress="i", layer=0, expert=e, holder=o) for e, o in enumerate(owners) if o != "here"]
    local = [(0, e) for e, o in enumerate(owners) if o == "here"]
    routing = Routing.build(1, layers=1, experts=EXPERTS, local=local, routes=routes)
    caller = InProcessCaller(dict.fromkeys(NAMES, residency))
    with torch.inference_mode():
        want = eager(hidden, index, weights)
        for combine in ("ordered", "partial"):
            counters = Counters(1, EXPERTS)
            counts = counters.fresh()
            got = Dispatcher(residency, routing, caller, counts, combine).run(0, hidden, index, weights)
            if combine == "ordered":
                assert torch.equal(got, want)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
            counters.add(counts)
            counts = counters.snapshot()
            np.testing.assert_array_equal(counts.routed[0], np.bincount(index.flatten().numpy(), minlength=EXPERTS))
            remote = torch.tensor([owner != "here" for owner in owners])[index]
            assert (counts.remote_rows, counts.remote_events) == (int(remote.sum()), int(remote.any(1).sum()))
            assert counts.remote_calls == len({owners[e] for e in index.flatten().tolist()} - {"here"})


@cache
def tokenizer():
    from runtime.loading import load_tokenizer

    return load_tokenizer(DEMO)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_streamed_pieces_join_to_the_text(text):
    ids = tokenizer()(text)["input_ids"]
    stream = TextStream(tokenizer())
    streamed = [stream.push(token) for token in ids]
    assert "".join(streamed) + stream.end() == tokenizer().decode(ids, skip_special_tokens=True)
    assert all("\ufffd" not in piece for piece in streamed) or "\ufffd" in text


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 6143), max_size=30))
def test_streamed_pieces_of_any_tokens_join_to_their_text(ids):
    stream = TextStream(tokenizer())
    streamed = "".join([stream.push(token) for token in ids]) + stream.end()
    assert streamed == tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
