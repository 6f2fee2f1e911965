"""Calls: what a holder refuses, and what it answers."""

import numpy as np
import pytest
import torch

from runtime.errors import ExpertUnavailable, InvalidInput
from runtime.experts import ExpertCall, execute_call
from runtime.slots import Residency


@pytest.fixture
def residency(store):
    opened = store("mixtral")
    held = Residency(opened.manifest.layout, {"host": 4 * opened.manifest.layout.bytes})
    for expert in range(4):
        held.put((0, expert), "host", opened.read(opened.by_key[0, expert].sha256))
    return held


def call(token, expert, *, tokens=3, combine="partial", weights=None):
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(len(token) if weights is None else weights)
    rows = (np.array(token, dtype=np.int32), np.array(expert, dtype=np.int32))
    return ExpertCall("me", 1, 0, combine, hidden, *rows, weight)


@pytest.mark.parametrize(("bad", "message"), [
    (call([], []), "at least one"),
    (call([0, 1], [1]), "as many"),
    (call([0], [1], weights=2), "as many"),
    (call([3], [1]), "outside of 3"),
    (call([-1], [1]), "outside of 3"),
    (call([0, 1], [2, 1]), "not sorted"),
    (call([0, 0], [1, 1]), "twice"),
])  # fmt: skip
def test_calls_that_contradict_themselves_are_refused(bad, message):
    with pytest.raises(InvalidInput, match=message):
        bad.check()


@pytest.mark.parametrize("tokens", [1, 3])
def test_answers_have_the_promised_shape_and_agree(residency, tokens):
    token, expert = ([0, 0, 0], [0, 1, 3]) if tokens == 1 else ([2, 0, 1, 2], [0, 1, 1, 3])
    rows, tiers = call(token, expert, tokens=tokens, combine="ordered"), {}
    sums = ExpertCall("me", 1, 0, "partial", rows.hidden, rows.token, rows.expert, rows.weight)
    sums.check()
    ordered, partial = execute_call(residency, rows, tier_rows=tiers), execute_call(residency, sums)
    assert (
        (tuple(ordered.shape), ordered.dtype)
        == (rows.answer_shape, rows.answer_dtype)
        == ((len(token), 64), torch.float32)
    )
    assert (
        (tuple(partial.shape), partial.dtype) == (sums.answer_shape, sums.answer_dtype) == ((tokens, 64), torch.float32)
    )
    assert tiers == {"host": len(token)}
    torch.testing.assert_close(torch.zeros(tokens, 64).index_add_(0, torch.tensor(token), ordered), partial)


def test_an_expert_that_is_not_held_is_named(residency):
    with pytest.raises(ExpertUnavailable, match="layer 0 expert 6"):
        execute_call(residency, call([0], [6]))
