"""Choosing tokens: by mass, and from seed and position alone."""

import itertools

import pytest
import torch

from runtime.errors import InvalidInput
from runtime.sampling import PREFILL_CHUNK, Sampling, prefill_chunks, sample

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))


def test_top_p_keeps_the_most_likely_mass():
    drawn = [sample(LOGITS, Sampling(temperature=1, top_p=0.75), position) for position in range(4000)]
    assert set(drawn) == {1, 2}
    assert drawn.count(1) / 4000 == pytest.approx(5 / 8, abs=0.03)
    assert {sample(LOGITS, Sampling(temperature=1, top_p=1e-6), position) for position in range(20)} == {1}
    assert sample(LOGITS, Sampling(), 0) == 1


def test_shares_are_the_models_at_every_position_and_seed():
    hot = Sampling(temperature=1, seed=(1 << 63) - 1)
    by_position = [sample(LOGITS, hot, position) for position in range(8000)]
    by_seed = [sample(LOGITS, Sampling(temperature=1, seed=seed), 5) for seed in range(8000)]
    for drawn in (by_position, by_seed):
        shares = [drawn.count(token) / 8000 for token in range(4)]
        assert shares == pytest.approx([0.1, 0.5, 0.3, 0.1], abs=0.03)
        pairs = [(a, b) for a, b in itertools.pairwise(drawn) if a == 1]
        assert sum(b == 1 for _, b in pairs) / len(pairs) == pytest.approx(0.5, abs=0.04)


def test_a_little_rounding_changes_no_token():
    hot, logits = (
        Sampling(temperature=0.8, top_p=0.95, seed=3),
        torch.randn(500, generator=torch.Generator().manual_seed(1)),
    )
    noise = 1e-6 * torch.randn(500, generator=torch.Generator().manual_seed(2))
    assert all(sample(logits, hot, n) == sample(logits + noise, hot, n) for n in range(300))


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"temperature": float("nan")}, {"seed": -1}])
def test_absurd_sampling_is_refused(options):
    with pytest.raises(InvalidInput, match=r"is (outside|negative)"):
        Sampling(**options)


@pytest.mark.parametrize("count", [1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 5 * PREFILL_CHUNK - 1])
def test_chunks_cover_a_prompt_once(count):
    ids = list(range(count))
    assert [token for chunk in prefill_chunks(count) for token in ids[chunk]] == ids
    assert all(0 < len(ids[chunk]) <= PREFILL_CHUNK for chunk in prefill_chunks(count))
