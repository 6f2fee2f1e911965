"""The quality account under any traffic: never more given up than earned, whatever the steps."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.policy.quality import Allowance, Controller

LAYERS = 3
steps = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.floats(0, 1), min_size=LAYERS, max_size=LAYERS)), min_size=1, max_size=80
)


@st.composite
def allowances(draw):
    budget = draw(st.sampled_from([0.0025, 0.02, 0.5]))
    parts = draw(st.lists(st.floats(0.1, 1), min_size=LAYERS, max_size=LAYERS))
    nll = tuple(math.log1p(budget) * part / sum(parts) for part in parts)
    prices = tuple(draw(st.lists(st.floats(0, 0.5), min_size=LAYERS, max_size=LAYERS)))
    return Allowance(budget, nll, prices, warmup=draw(st.integers(0, 9)), horizon=draw(st.integers(1, 50)))


@given(allowances(), steps)
def test_any_stretch_gives_up_no_more_than_it_earned_and_could_save(allowance, traffic):
    account, prices, sizes = Controller(allowance), [], []
    for tokens, masses in traffic:
        lost = {layer: mass * tokens for layer, mass in enumerate(masses)} if account.is_open else {}
        before = account.spent
        account.advance(tokens, range(LAYERS), lost)
        prices.append(account.spent - before)
        sizes.append(tokens)
        assert account.balance <= math.log1p(allowance.budget) * allowance.horizon + 1e-9
    for first in range(len(prices)):
        for last in range(first, len(prices)):
            earned = math.log1p(allowance.budget) * (sum(sizes[first : last + 1]) + allowance.horizon)
            assert sum(prices[first : last + 1]) <= earned + max(prices[first : last + 1]) + 1e-9


@given(allowances(), steps)
def test_closed_while_cold_or_overdrawn(allowance, traffic):
    account = Controller(allowance)
    for tokens, masses in traffic:
        assert account.is_open == (account.tokens >= allowance.warmup and account.balance > 0)
        account.advance(tokens, range(LAYERS), dict(enumerate(masses)) if account.is_open else {})
    account.restart()
    assert account.is_open == (allowance.warmup == 0 and account.balance > 0)


@given(allowances(), steps)
def test_nodes_that_run_different_layers_stay_within_the_budget_together(allowance, traffic):
    accounts = {layer: Controller(allowance) for layer in range(LAYERS)}
    overdraft = 0.0
    for tokens, masses in traffic:
        for layer, account in accounts.items():
            price = allowance.nll_per_mass[layer] * masses[layer] if account.is_open else 0.0
            account.advance(tokens, [layer], {layer: masses[layer]} if account.is_open else {})
            overdraft = max(overdraft, price)
    tokens = sum(size for size, _ in traffic)
    spent = sum(account.spent for account in accounts.values())
    assert spent <= math.log1p(allowance.budget) * tokens + LAYERS * overdraft + 1e-9


def test_a_budget_of_nothing_never_opens():
    account = Controller(Allowance(0.0, (0.0,), (1.0,)))
    account.advance(100, [0], {})
    assert account.standing == "off"


@given(st.floats(0.001, 0.1), st.integers(8, 64))
def test_text_unlike_the_calibrations_closes_until_it_is_like_it_again(limit, count):
    account = Controller(Allowance(0.01, (0.01,), (0.1,), divergence=limit, sample_every=4))
    account.advance(10, [0], {})
    assert account.wants_sample
    for number in range(count):
        account.sample(limit * (2 + number % 2))
    assert account.standing == "unlike"
    account.advance(4, [0], {})
    assert account.wants_sample
    for number in range(64):
        account.sample(limit * (0.5 + number % 2 / 10))
    assert account.is_open
    assert account.divergence < limit


def test_the_last_segments_samples_stand_for_all_layers() -> None:
    account = Controller(Allowance(0.01, (0.003, 0.001), (0.1, 0.1), divergence=0.02, sample_every=1))
    account.sample(0.004, [1])
    assert account.divergence == pytest.approx(0.016)
    account.sample(0.02, [0, 1])
    assert account.divergence == pytest.approx(0.018)


@pytest.mark.parametrize(("slope", "count"), [(0.1, 32), (2.0, 200)])
def test_probes_let_less_be_given_up_only_where_the_same_costs_more(slope, count):
    nll, rng = math.log1p(0.05), random.Random(count)
    allowance = Allowance(0.05, (nll,), (1.0,), divergence=2 * nll, slope=slope, probe_every=4)
    like, unlike = Controller(allowance), Controller(allowance)
    for _ in range(count):
        cost = rng.uniform(0.001, 0.01)
        like.probe(slope * cost * rng.uniform(0.5, 1.5), cost)
        unlike.probe(3 * slope * cost * rng.uniform(0.9, 1.1), cost)
    assert like.scale > 0.5
    assert 2.5 < unlike.excess < 3.1
    assert unlike.dearness == pytest.approx(1 + 2 * (unlike.excess - 1))
    assert unlike.scale < 0.2
    unlike.advance(1, [0], {0: 0.001})
    assert unlike.spent == pytest.approx(0.001 * unlike.dearness)
    for _ in range(256):
        unlike.probe(slope * 0.005, 0.005)
    assert unlike.scale == pytest.approx(1)


@given(st.integers(0, 31))
def test_few_probes_and_such_that_gave_nothing_up_say_nothing(count):
    account = Controller(Allowance(0.01, (0.01,), (1.0,), slope=0.1))
    for _ in range(count):
        account.probe(1.0, 0.001)
    for _ in range(64):
        account.probe(0.0, 0.0)
    assert account.scale == 1


def test_probes_are_seldom_once_text_is_known_to_be_like_the_calibrations():
    account = Controller(Allowance(0.01, (0.01,), (1.0,), slope=0.1, probe_every=2))
    distances, since = [], 0
    for _ in range(600):
        account.advance(1, [0], {})
        since += 1
        if account.wants_probe:
            account.probe(0.0001, 0.001)
            distances.append(since)
            since = 0
    assert set(distances[:256]) == {2}
    assert set(distances[256:]) == {16}
    assert not Controller(Allowance(0.01, (0.01,), (1.0,))).wants_probe
