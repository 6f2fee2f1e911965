"""Whatever the split, the placement and the sessions: a chain of segments is the whole model."""

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import FAMILIES, chain_model, lasting_directory, make_checkpoint, make_store

LAYERS, EXPERTS, STEPS = 6, 8, 3


@cache
def model(family):
    """A checkpoint, its store, and the chain of one segment that has it all."""
    root = lasting_directory()
    path = make_checkpoint(family, root / "model", layers=LAYERS)
    store = make_store(path, root / "store")
    keys = [record.key for record in store.manifest.records]
    return path, store, keys, chain_model(path, store, [], dict.fromkeys(keys, 0))


def forced(chain, ids, prompt, **options):
    """Logits of a prompt's last token, then of each further token of `ids`."""
    chain.open("s", len(ids))
    rows = [chain.prefill("s", ids[:prompt], **options)]
    rows += [chain.step("s", torch.tensor([token]), **options) for token in ids[prompt:]]
    chain.close("s")
    return torch.cat(rows)


@settings(deadline=None, max_examples=30)
@given(
    family=st.sampled_from(FAMILIES[:5]),
    cuts=st.sets(st.integers(1, LAYERS - 1), max_size=4),
    nodes=st.integers(1, 5),
    prompts=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
)
def test_a_chain_is_the_whole_model(family, cuts, nodes, prompts, seed):
    path, store, keys, whole = model(family)
    draw = torch.Generator().manual_seed(seed)
    owners = dict(zip(keys, torch.randint(nodes, (len(keys),), generator=draw).tolist(), strict=True))
    sessions = [torch.randint(2, 256, (length + STEPS,), generator=draw).tolist() for length in prompts]
    chain = chain_model(path, store, sorted(cuts), owners)
    first = sessions[0]
    want = forced(whole, first, prompts[0], combine="ordered")
    assert torch.equal(forced(chain, first, prompts[0], combine="ordered"), want)

    names = [str(index) for index in range(len(prompts))]
    for name, ids, prompt in zip(names, sessions, prompts, strict=True):
        chain.open(name, len(ids))
        chain.prefill(name, ids[:prompt])
    tokens = torch.tensor([ids[-STEPS:] for ids in sessions])  # [B, STEPS]
    together = torch.stack([chain.step_batch(names, tokens[:, step]) for step in range(STEPS)])
    alone = torch.stack([forced(whole, ids, prompt)[1:] for ids, prompt in zip(sessions, prompts, strict=True)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    for name in names:
        chain.close(name)
    assert not any(segment.sessions.kv_used or len(segment.sessions) for segment in chain.segments)
