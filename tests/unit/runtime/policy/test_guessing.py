"""Guesses from recorded routing: what is planted is found, counts go on, and a small network learns it."""

import copy

import numpy as np
import pytest

from runtime.policy.guessing import Coactivation, Last, Previous, best
from runtime.policy.learned import Learned, train
from runtime.predictors import joined, recall
from tests.recordings import E, K, L, leaning, planted


def fitted(lesson):
    made = Coactivation(L, E)
    made.fit(lesson.chosen, lesson.is_start)
    return made


def test_the_token_before_comes_first_then_what_was_used_lately():
    predictor = Previous(1, 5)
    for experts in ([3, 4], [3, 1], [0, 2]):
        predictor.observe(0, np.array([experts]))
    assert best(predictor.scores(0), 3).tolist() == [0, 2, 3]


def test_the_last_choice_of_a_layer_lines_up_with_the_tokens_that_run():
    last = Last(2)
    assert last.of(1, 3) is None
    last.note(0, np.array([[1], [2]]))
    assert last.tokens(1) == 2
    assert last.of(0, 2).tolist() == [[1], [2]]
    assert last.of(0, 3).tolist() == [[2], [2], [2]]  # others ran: the newest stands for all
    assert last.of(-1, 1) is None


def test_coactivation_finds_what_follows_what():
    assert recall(fitted(planted(300)), planted(60, seed=1)) > 0.85
    assert recall(Previous(L, E), planted(60, seed=1)) < 0.4


def test_counting_goes_on_and_begins_with_nothing():
    predictor, lesson = Coactivation(L, E), planted(300)
    early = recall(predictor, lesson.part(0, 40))
    recall(predictor, lesson.part(40, 200))
    assert recall(predictor, lesson.part(200)) > max(0.85, early)


def test_counting_on_keeps_what_a_long_recording_said():
    """Where popularity fades faster than the rows it is compared with, guesses become worse with every token."""
    both, test = joined([leaning(2000, 0, 0), leaning(2000, 1, 1)]), leaning(200, 0, 5)
    made = Coactivation(4, 16)
    made.fit(both.chosen, both.is_start)
    before = recall(copy.deepcopy(made), test)
    recall(made, leaning(600, 0, 7))
    assert recall(made, test) > before - 0.005


def test_counts_never_outgrow_what_fades():
    predictor = fitted(planted(4000))
    recall(predictor, planted(100))
    assert predictor.tables.near.sum(axis=2).max() < 1.01 * K * 1000
    assert all((table >= 0).all() for table in predictor.tables)


def test_a_network_learns_it_the_same_way_each_time():
    lesson = planted(300)
    weights = train(*lesson[:3], hidden=16)
    again = train(*lesson[:3], hidden=16)
    assert all(np.array_equal(one, other) for one, other in zip(weights, again, strict=True))
    assert recall(Learned(weights), planted(60, seed=1)) > 0.85


@pytest.mark.parametrize(
    "make", [lambda: Previous(L, E), lambda: fitted(planted(50)), lambda: Learned(train(*planted(50)[:3]))]
)
def test_several_tokens_are_guessed_as_each_alone(make):
    steps = planted(2, seed=4).chosen
    together, apart = make(), [make(), make()]
    for layer in range(L):
        if layer:
            scores = together.scores(layer)
            alone = [each.scores(layer)[0] for each in apart]
            assert scores.shape == (2, E)
            if not isinstance(together, Previous):  # which ranks by what all tokens of the past used
                for row, other in zip(scores, alone, strict=True):
                    assert np.argsort(-row)[:K].tolist() == np.argsort(-other)[:K].tolist()
        together.observe(layer, steps[:, layer])
        for token, each in enumerate(apart):
            each.observe(layer, steps[token, layer][None])
