"""What replacements cost one token beside others: told by its scores, whoever ranks them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.policy.routing import MassBudget, Probed
from runtime.policy.sensitivity import HIDDEN, Sensitivity, fit, inputs

E, K = 8, 3


@pytest.fixture(scope="module")
def found():
    """Two layers: in the first a token matters three times as much where expert 2 is scored higher than expert 5."""
    rng = np.random.default_rng(0)
    scores = [rng.dirichlet(np.ones(E), 12000).astype(np.float32) for _ in range(2)]
    noise = rng.exponential(size=(2, 12000))
    mattered = [noise[0] * np.where(scores[0][:, 2] > scores[0][:, 5], 3.0, 1.0), noise[1]]
    return fit(scores, mattered)


def ranked(seed):
    score = np.random.default_rng(seed).dirichlet(np.ones(E))
    ids = np.argsort(-score)
    return ids, score[ids], score


def test_what_matters_is_learnt_and_about_one_on_average(found):
    factors = {True: [], False: []}
    for seed in range(400):
        ids, scores, score = ranked(seed)
        factors[bool(score[2] > score[5])].append(found.factor(0, ids, scores))
        assert found.factor(1, ids, scores) == pytest.approx(1.0, abs=0.2), "there is nothing to learn"
    dear, cheap = np.mean(factors[True]), np.mean(factors[False])
    assert dear / cheap == pytest.approx(3.0, rel=0.25)
    assert np.mean(factors[True] + factors[False]) == pytest.approx(1.0, rel=0.1)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_factors_depend_on_shares_alone_not_on_their_sum_or_order(found, seed, total):
    ids, scores, _ = ranked(seed)
    order = np.random.default_rng(seed).permutation(E)
    assert found.factor(0, ids[order], total * scores[order]) == pytest.approx(found.factor(0, ids, scores), rel=1e-3)


@given(st.integers(0, 10**6), st.floats(0, 0.1), st.integers(0, 1))
def test_a_dearer_token_gets_so_much_less(found, seed, share, layer):
    ids, scores, _ = ranked(seed)
    here = np.random.default_rng(seed).random(E) < 0.5
    factor = found.factor(layer, ids, scores)
    ours = MassBudget((share,), weighted=True, sensitivity=found).choose(layer, ids, scores, here, K)
    plain = MassBudget((share / factor,), weighted=True).choose(layer, ids, scores, here, K)
    assert ours.experts.tolist() == plain.experts.tolist()
    assert (share > 0) or ours.lost == 0
    assert not ours.lost or ours.factor == factor
    usual = MassBudget((10.0,), weighted=True)
    none = usual.scaled(0.0)
    probed = Probed(none, MassBudget((10.0,), weighted=True, sensitivity=found)).choose(layer, ids, scores, here, K)
    assert probed.probed == pytest.approx(factor * Probed(none, usual).choose(layer, ids, scores, here, K).probed)


def test_candidates_that_are_not_all_experts_tell_nothing(found):
    ids, scores, _ = ranked(3)
    assert found.factor(0, ids[:6], scores[:6]) == 1.0


def test_numbers_take_few_digits(found):
    assert found.given.shape == (2, 2 * E, HIDDEN)
    assert all(len(f"{value}") <= 11 for array in found for value in array.ravel())


@pytest.mark.parametrize("tokens", [3, 3000])
def test_nothing_to_learn_from_makes_every_token_like_others(tokens):
    scores, nothing = [np.full((tokens, E), 1 / E, np.float32)], [np.zeros(tokens)]
    made = fit(scores, nothing)
    assert isinstance(made, Sensitivity)
    assert made.factor(0, np.arange(E), np.full(E, 1 / E)) == 1.0
    assert inputs(np.zeros((1, E))).shape == (1, 2 * E)
    assert np.isfinite(inputs(np.zeros((1, E)))).all()
