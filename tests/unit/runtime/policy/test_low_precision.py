"""Which experts will do in low precision: what is missing after all that is given up, for every token that gets it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.policy.routing import Exact, LowMissing, MassBudget
from runtime.policy.step import choose_each, choose_whole, low_experts

IDS = np.array([[5, 3, 0, 7], [3, 1, 5, 2]])  # two tokens, best first
SCORES = np.array([[0.4, 0.3, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1]])
K = 2


def holding(*experts):
    resident = np.zeros(8, dtype=bool)
    resident[list(experts)] = True
    return resident


def test_what_is_missing_will_do_unless_it_weighs_too_much():
    choice = LowMissing(Exact()).choose(0, IDS[0], SCORES[0], holding(3), K)
    assert (choice.experts.tolist(), choice.low.tolist(), choice.lost) == ([5, 3], [True, False], 0.0)
    light = LowMissing(Exact(), share=0.5).choose(0, IDS[0], SCORES[0], holding(), K)
    assert light.low.tolist() == [False, True]
    replaced = LowMissing(MassBudget((0.9,))).choose(0, IDS[0], SCORES[0], holding(0, 7), K)
    assert not replaced.low.any(), "what stands in is at hand"


def test_tokens_that_need_an_expert_as_it_is_get_it_for_all():
    rule = LowMissing(Exact(), share=0.6)  # 5 weighs .57 of the first token's mass, 3 .71 of the second's
    choices = choose_each(rule, 0, (IDS, SCORES), holding(), K)
    assert low_experts(choices) == [1, 5]
    assert low_experts(choose_each(LowMissing(Exact()), 0, (IDS, SCORES), holding(), K)) == [1, 3, 5]


@pytest.mark.parametrize("here", [(), (3,), (5, 3, 1)])
def test_where_a_wait_is_shared_it_is_the_routers_own_choice(here):
    choices = choose_whole(LowMissing(MassBudget((0.05,), whole=True)), 0, (IDS, SCORES), holding(*here), K)
    assert [choice.experts.tolist() for choice in choices] == [[5, 3], [3, 1]]
    assert low_experts(choices) == sorted({5, 3, 1} - set(here))


@given(st.sets(st.integers(0, 7)), st.floats(0, 1))
def test_nothing_at_hand_is_low_and_nothing_else_changes(here, share):
    resident = holding(*here)
    want = choose_each(Exact(), 0, (IDS, SCORES), resident, K)
    got = choose_each(LowMissing(Exact(), share), 0, (IDS, SCORES), resident, K)
    for a, b in zip(want, got, strict=True):
        assert a.experts.tolist() == b.experts.tolist()
        assert not b.low[resident[b.experts]].any()
    if share == 0:
        assert low_experts(got) == []
