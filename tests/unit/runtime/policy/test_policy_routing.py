import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.policy.routing import (
    ROUTINGS,
    AdaptiveGating,
    Buddies,
    CachePrior,
    DropCold,
    LeaveOut,
    MassBudget,
    PrecisionByRank,
    Probed,
    SmoeMargin,
    buddies_of,
)

IDS = np.array([5, 3, 0, 7, 2, 1])  # best first
SCORES = np.array([0.30, 0.20, 0.18, 0.15, 0.10, 0.07])
K = 3


def holding(*experts):
    resident = np.zeros(8, dtype=bool)
    resident[list(experts)] = True
    return resident


def chosen(policy, *experts):
    choice = policy.choose(0, IDS, SCORES, holding(*experts), K)
    return choice.experts.tolist()


def test_smoe_replaces_within_the_margin_alone():
    assert chosen(SmoeMargin((0.3,)), 7) == [5, 3, 7]  # edge .15: 0 may be replaced (≤ .195), 3 may not
    assert chosen(SmoeMargin((0.1,)), 7) == [5, 3, 0]
    assert chosen(SmoeMargin((0.3,)), 1) == [5, 3, 0]  # .07 lies below the margin


def test_smoe_margins_are_per_layer():
    policy = SmoeMargin((0.0, 0.3))
    assert policy.choose(0, IDS, SCORES, holding(7), K).experts.tolist() == [5, 3, 0]
    assert policy.choose(1, IDS, SCORES, holding(7), K).experts.tolist() == [5, 3, 7]


def test_mass_budget_replaces_the_least_first_and_says_what_was_lost():
    choice = MassBudget((0.05,)).choose(0, IDS, SCORES, holding(7), K)
    assert choice.experts.tolist() == [5, 3, 7]
    assert choice.lost == pytest.approx(0.03 / 0.68)
    assert chosen(MassBudget((0.04,)), 7) == [5, 3, 0]


def test_all_or_none_buys_no_half_of_a_wait():
    assert chosen(MassBudget((0.05,)), 5, 7) == [5, 3, 7]
    assert chosen(MassBudget((0.05,), whole=True), 5, 7) == [5, 3, 0]  # 3 would be missing still
    assert chosen(MassBudget((0.05,), whole=True), 5, 3, 7) == [5, 3, 7]


def test_cache_prior_lifts_residents_but_keeps_the_best():
    assert chosen(CachePrior(1.0), 2, 1, 7) == [5, 7, 2]
    assert chosen(CachePrior(0.0), 2, 1, 7) == [5, 3, 0]


def test_buddies_stand_in_where_the_gate_is_undecided():
    table = np.tile(np.array([7, 2]), (1, 8, 1))
    assert chosen(Buddies(table, undecided=0.5), 5, 7, 2) == [5, 7, 2]
    assert chosen(Buddies(table, undecided=1.1), 5, 7, 2) == [5, 3, 0]


def test_buddies_are_chosen_together():
    ids = np.array([[[0, 1]], [[1, 0]], [[0, 2]], [[3, 2]], [[3, 2]]])
    table = buddies_of(ids, experts=4, top_k=2, count=2)
    assert table[0, 0].tolist() == [1, 2]
    assert table[0, 3, 0] == 2


def test_drop_cold_never_drops_the_best():
    assert chosen(DropCold(0.9)) == [5]
    assert chosen(DropCold(0.28), 0) == [5, 3, 0]
    assert chosen(DropCold(0.28), 3) == [5, 3]


def test_adaptive_gating_uses_fewer_where_the_rest_weighs_little():
    assert chosen(AdaptiveGating(0.08)) == [5, 3]
    assert chosen(AdaptiveGating(0.08, sensitivity=(2.0,))) == [5, 3, 0]


def test_precision_by_rank():
    choice = PrecisionByRank(low=0.5, skip=0.7).choose(0, IDS, SCORES, holding(5), K)
    assert choice.experts.tolist() == [5, 3]  # 0 has .735 of the mass before it
    assert choice.low.tolist() == [False, False]
    assert PrecisionByRank(low=0.4, skip=1.0).choose(0, IDS, SCORES, holding(5), K).low.tolist() == [False, True, True]


@pytest.mark.parametrize("name", ROUTINGS)
@given(seed=st.integers(0, 2**32 - 1), value=st.floats(0, 1))
def test_choices_are_sound_and_zero_is_exact(name, seed, value):
    rng = np.random.default_rng(seed)
    experts, top_k = int(rng.integers(4, 12)), int(rng.integers(1, 4))
    ids = rng.permutation(experts)
    scores = np.sort(rng.dirichlet(np.ones(experts)))[::-1]
    resident = rng.random(experts) < rng.random()
    exact = ROUTINGS[name](0.0).choose(0, ids, scores, resident, top_k)
    assert exact.experts.tolist() == ids[:top_k].tolist()
    assert exact.lost == 0
    assert not exact.low.any()
    choice = ROUTINGS[name](value).choose(0, ids, scores, resident, top_k)
    assert 1 <= len(choice.experts) <= top_k
    assert len(set(choice.experts.tolist())) == len(choice.experts)
    position = {int(expert): rank for rank, expert in enumerate(ids)}
    assert all(choice.scores[i] == scores[position[int(e)]] for i, e in enumerate(choice.experts))
    if name in {"mass", "mass-whole"}:
        assert choice.lost <= value + 1e-9
    if name == "mass-whole" and choice.lost > 0:
        assert resident[choice.experts].all()
    if resident[ids[:top_k]].all() and name not in {"adaptive", "cache-prior"}:
        assert choice.experts.tolist() == ids[:top_k].tolist()


def test_all_that_is_missing_is_left_out_or_nothing_is():
    share = SCORES[:K] / SCORES[:K].sum()
    assert chosen(LeaveOut((share[2] ** 2 + 1e-9,)), 5, 3) == [5, 3]
    assert chosen(LeaveOut((share[2] ** 2 - 1e-9,)), 5, 3) == [5, 3, 0]
    both = float(share[1] ** 2 + share[2] ** 2)
    assert chosen(LeaveOut((both + 1e-9,)), 5) == [5]
    assert chosen(LeaveOut((both - 1e-9,)), 5, 7) == [5, 3, 0]
    assert chosen(LeaveOut((10.0,)), 7) == [5, 3, 0], "somebody must compute something"
    assert chosen(LeaveOut((0.0,)), 5) == [5, 3, 0]
    assert LeaveOut((10.0,)).choose(0, IDS, SCORES, holding(5, 0), K).lost == pytest.approx(share[1])


@given(st.floats(0, 0.5), st.floats(0.1, 10), st.integers(0, 1000))
def test_prices_scale_what_a_replacement_costs(share, price, seed):
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.random(8))[::-1]
    ids, here = rng.permutation(8), rng.random(8) < 0.5
    alike = MassBudget((share,), weighted=True, prices=((price,) * 8,)).choose(0, ids, scores, here, 4)
    plain = MassBudget((share / price,), weighted=True).choose(0, ids, scores, here, 4)
    assert alike.experts.tolist() == plain.experts.tolist()
    nothing = MassBudget((0.0,), weighted=True, prices=((price,) * 8,)).choose(0, ids, scores, here, 4)
    assert nothing.lost == 0


def test_an_expert_that_matters_more_is_loaded():
    prices = [[1.0] * 8]
    assert chosen(MassBudget((0.05,), prices=tuple(map(tuple, prices))), 7) == [5, 3, 7]
    prices[0][0] = 2.0
    assert chosen(MassBudget((0.05,), prices=tuple(map(tuple, prices))), 7) == [5, 3, 0]


def test_a_stand_in_may_weigh_less_than_its_score():
    choice = MassBudget((0.05,), stand_in=0.5).choose(0, IDS, SCORES, holding(7), K)
    assert choice.experts.tolist() == [5, 3, 7]
    assert choice.scores == pytest.approx([0.30, 0.20, 0.15 / 2])
    assert choice.lost == pytest.approx(0.03 / 0.68)
    nothing = MassBudget((0.0,), stand_in=0.5).choose(0, IDS, SCORES, holding(7), K)
    assert nothing.scores.tolist() == SCORES[:K].tolist()


def test_a_probe_replaces_the_lightest_expert_at_hand_besides():
    usual = MassBudget((0.02,), weighted=True, stand_in=0.5)
    none = usual.scaled(0.0)
    choice = Probed(none, usual).choose(0, IDS, SCORES, holding(5, 3, 7), K)
    assert choice.experts.tolist() == [5, 7, 0], "3 is at hand and lightest, 0 is still to be loaded"
    assert choice.scores.tolist() == pytest.approx([0.30, 0.075, 0.18])
    assert choice.probed == pytest.approx((0.20 - 0.15) / 0.68 * 0.20 / 0.68)
    assert choice.lost == 0
    too_dear = Probed(none, usual, most=0.1).choose(0, IDS, SCORES, holding(5, 3, 7), K)
    assert too_dear.experts.tolist() == [5, 3, 0]
    assert chosen(Probed(usual, usual), 5, 3, 0) == [5, 3, 0], "nothing at hand could stand in"
    assert chosen(Probed(usual, usual), 7, 2) == chosen(usual, 7, 2) == [5, 3, 7], "nothing at hand was kept"
    assert usual.scaled(1.0) is usual
