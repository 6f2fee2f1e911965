"""Uses that are foreseen: better than windows where one expert announces another, and never out of order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.policy.eviction import EVICTIONS
from runtime.policy.uses import DECAYS, SOURCES, Estimates, LearnedUses, Uses, fit
from runtime.predictors import Lesson, learn_uses, loads_share
from tests.recordings import planted


def turns(tokens, seed=0):
    """Experts of layer 0 come in pairs, one pair after another in a fixed order, each for a few tokens; layer 1 too."""
    rng = np.random.default_rng(seed)
    pairs = np.repeat(np.arange(tokens) % 6, rng.integers(1, 4, tokens))[:tokens]
    chosen = np.stack([np.stack([2 * pairs, 2 * pairs + 1], axis=1)] * 2, axis=1)
    return Lesson(chosen.astype(np.int64), np.arange(tokens) == 0, 12)


def test_what_comes_next_is_kept_rather_than_what_was_just_used():
    uses = learn_uses(turns(2000))
    ours = loads_share(LearnedUses(uses), turns(300, seed=1))
    for name in ("steady", "rates", "lru"):
        assert ours < 0.95 * loads_share(EVICTIONS[name](2, 12), turns(300, seed=1)), name


def test_layers_below_announce_what_a_layer_uses():
    lesson = planted(500, noise=0.0)
    uses = learn_uses(lesson)
    assert not uses.given[0, len(DECAYS) :].any()
    assert uses.given[1, len(DECAYS) :].any()
    assert not uses.given[1, len(DECAYS) + 2 :].any()  # one layer is below
    assert uses.given.shape[1] == SOURCES


@given(st.integers(0, 1000), st.integers(1, 30))
def test_tokens_together_are_tokens_one_after_another(seed, cut):
    uses, rng = random_uses(seed), np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(8)[:2] for _ in range(31 * 3)]).reshape(31, 3, 2)
    scores = rng.random((31, 3, 2))
    whole, apart = Estimates(uses), Estimates(uses)
    for layer in range(3):
        want = whole.advance(layer, chosen[:, layer], scores[:, layer])
        assert want.shape == (31, 8)
    for part in (slice(0, cut), slice(cut, None)):
        for layer in range(3):
            got = apart.advance(layer, chosen[part, layer], scores[part, layer])
    np.testing.assert_allclose(got[-1], want[-1], atol=1e-4)


@given(st.integers(0, 1000))
def test_worth_is_positive_and_in_the_order_of_what_is_expected(seed):
    uses = random_uses(seed)
    policy = LearnedUses(uses)
    rng = np.random.default_rng(seed)
    for layer in range(3):
        policy.observe(layer, rng.permutation(8)[None, :4], rng.random((1, 4)), 2)
    for layer in range(3):
        worth = policy.worth(np.arange(layer * 8, layer * 8 + 8), 1)
        assert (worth >= 0).all()
        order = np.argsort(policy._expected[layer], kind="stable")
        assert (np.diff(worth[order]) >= 0).all()


def test_a_rank_below_that_of_experts_is_a_coarser_estimate():
    lesson = turns(600)
    full, coarse = (fit(lesson.chosen, lesson.scores_of_choice, 12, rank=rank) for rank in (32, 2))
    assert full.out.shape == (2, 12, 12)
    assert coarse.out.shape == (2, 2, 12)
    wrong = []
    for uses in (full, coarse):
        got = Estimates(uses).advance(0, lesson.chosen[:, 0], lesson.scores_of_choice[:, 0])
        soon = np.zeros(got.shape)
        np.put_along_axis(soon[:-1], lesson.chosen[1:, 0], 1.0, axis=1)
        wrong.append(((got - soon) ** 2).mean())
    assert wrong[0] < wrong[1]


def test_a_network_learns_what_no_line_tells():
    """Expert 2 is next where both 0 and 1 were chosen, or neither was; expert 3 where one of them was."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 6000)
    now = np.array([[0, 1], [0, 4], [5, 1], [5, 4]])[kinds]
    after = np.array([[2, 6], [3, 6], [3, 6], [2, 6]])[kinds]
    chosen = np.stack([now, after], axis=1).reshape(-1, 1, 2)
    uses = fit(chosen, np.ones(chosen.shape), 7)
    linear = uses.linear()
    expected = after[:500, :1]
    for each, told in ((linear, False), (uses, True)):
        soon = Estimates(each).advance(0, chosen[:1000, 0], np.ones((1000, 2)))[::2]
        margin = np.take_along_axis(soon, expected, axis=1) - np.take_along_axis(soon, 5 - expected, axis=1)
        assert (margin.mean() > 0.05) == told


def test_an_estimate_without_hidden_units_is_linear():
    uses = random_uses(1)
    older, none = uses.linear(), uses._replace(effect=np.zeros_like(uses.effect))
    assert older.seen.shape == (3, SOURCES, 8, 0)
    chosen, scores = np.array([[1, 2], [0, 5]]), np.ones((2, 2))
    for layer in range(3):
        got, want = (Estimates(each).advance(layer, chosen, scores) for each in (older, none))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_nothing_is_too_little_to_learn_from():
    uses = learn_uses(planted(2))
    assert np.isfinite(np.concatenate([each.ravel() for each in uses])).all()
    assert loads_share(LearnedUses(uses), planted(20)) == pytest.approx(0.6, abs=0.4)


def random_uses(seed):
    rng = np.random.default_rng(seed)
    shapes = ((3, len(DECAYS), 8), (3, SOURCES, 8, 4), (3, 4, 8), (3, 8), (3, SOURCES, 8, 5), (3, 5), (3, 5, 8))
    return Uses(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
