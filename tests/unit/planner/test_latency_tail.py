"""Shorter waits for the slowest tokens: what is promised of mean, percentile and limits."""

from itertools import count

import numpy as np
import pytest

from planner.solvers.latency import LatencyInstance, latency_instance, solve_latency, waits
from planner.solvers.latency.instance import token_waits
from planner.solvers.latency.patterns import Merging, layers_of
from planner.solvers.latency.solve import violations
from planner.solvers.latency.tail import Tail, percentile_wait, shorten_tail
from tests.unit.planner.test_latency import QUICK, instance, recorded

NO_HURRY = 1e6


def uneven(seed: int = 0, **changes) -> LatencyInstance:
    """Three nodes, the smallest of which has the slowest tokens."""
    given = {"node_of_place": np.arange(3), "num_experts": 12, "capacity": [40, 60, 80]} | changes
    cost = 0.01 * (1 - np.eye(3))
    return latency_instance(recorded(seed, layers=8), [1.0, 1.0, 1.0], cost, given.pop("capacity"), **given)


def shorten(problem: LatencyInstance, placed: np.ndarray, tail: Tail, **options) -> np.ndarray:
    return shorten_tail(problem, placed, tail, time_s=NO_HURRY, batches=10, **options)


@pytest.fixture(scope="module")
def best() -> np.ndarray:
    placed = solve_latency(uneven(), schedule=QUICK).placed
    assert placed is not None
    return placed


def mean(problem: LatencyInstance, placed: np.ndarray) -> float:
    return float(problem.tokens_per_s @ waits(problem, placed)) / problem.tokens_per_s.sum()


@pytest.mark.parametrize("seed", range(3))
def test_the_slowest_wait_less_and_the_mean_keeps_its_limit(seed):
    problem = uneven(seed)
    placed = solve_latency(problem, schedule=QUICK).placed
    assert placed is not None
    shortened = shorten(problem, placed, Tail(share=0.05, mean_given_up=0.1))
    assert violations(problem, shortened) == []
    assert percentile_wait(problem, shortened, 0.05) < percentile_wait(problem, placed, 0.05)
    assert mean(problem, shortened) <= 1.1 * mean(problem, placed)


@pytest.mark.parametrize("given_up", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_neither_percentile_nor_mean_is_worse_than_promised(given_up, seed):
    problem = instance(seed)
    placed = solve_latency(problem, schedule=QUICK).placed
    assert placed is not None
    shortened = shorten(problem, placed, Tail(share=0.05, mean_given_up=given_up), seed=seed)
    assert violations(problem, shortened) == []
    assert percentile_wait(problem, shortened, 0.05) <= percentile_wait(problem, placed, 0.05) + 1e-12
    assert mean(problem, shortened) <= (1 + given_up) * mean(problem, placed) * (1 + 1e-9)


def test_the_same_seed_gives_the_same_placement(best):
    found = [shorten(uneven(), best, Tail(share=0.05), seed=5) for _ in range(2)]
    assert (found[0] == found[1]).all()


def test_pins_bans_and_survival_are_kept():
    forced = np.zeros((3, 8, 12), dtype=bool)
    forced[0, :, 5] = True
    allowed = np.ones((3, 8, 12), dtype=bool)
    allowed[0, :, 9] = False
    problem = uneven(forced=forced, allowed=allowed)
    placed = solve_latency(problem, schedule=QUICK).placed
    assert placed is not None
    shortened = shorten(problem, placed, Tail(share=0.05, mean_given_up=0.5))
    assert violations(problem, shortened) == []
    twice = instance(capacity=[30, 40, 40], required=2)
    placed = solve_latency(twice, schedule=QUICK).placed
    assert placed is not None
    assert violations(twice, shorten(twice, placed, Tail(share=0.1))) == []


def test_tiers_hold_an_expert_once():
    problem = instance(
        cost_s=np.array([[0, 0.001, 0.01, 0.01], [0.01, 0.011, 0, 0.01], [0.01, 0.011, 0.01, 0]]),
        capacity=[8, 8, 20, 20],
        node_of_place=[0, 0, 1, 2],
    )
    placed = solve_latency(problem, schedule=QUICK).placed
    assert placed is not None
    assert violations(problem, shorten(problem, placed, Tail(share=0.1))) == []


def test_what_is_not_acceptable_is_never_returned(best):
    tail = Tail(share=0.05, mean_given_up=0.5)
    assert shorten(uneven(), best, tail, acceptable=lambda _: False) is best


def test_out_of_time_it_returns_what_it_was_given(best):
    ticks = count()
    assert shorten_tail(uneven(), best, Tail(share=0.05), time_s=1, clock=lambda: float(next(ticks))) is best


def test_nobody_waits_so_nothing_is_shortened():
    problem = instance(capacity=[48, 48, 48])
    placed = np.ones((3, 4, 12), dtype=bool)
    assert shorten(problem, placed, Tail(share=0.05)) is placed


def test_percentiles_count_tokens_by_the_rate_of_their_ingress():
    problem = instance(tokens_per_s=[8.0, 1.0, 1.0])
    placed = np.zeros((3, 4, 12), dtype=bool)
    placed[0] = True  # a third waits for nothing; by rate it is four fifths
    assert percentile_wait(problem, placed, 0.2) == pytest.approx(0.04)
    assert percentile_wait(problem, placed, 0.21) == 0.0


def test_equal_weights_make_the_layers_of_the_recorded_events():
    problem = instance(2)
    placed = solve_latency(problem, schedule=QUICK).placed
    assert placed is not None
    pairs = zip(problem.events, problem.tokens_per_s, strict=True)
    weighted = Merging(problem).layers([np.full(len(chosen), rate / len(chosen)) for chosen, rate in pairs])
    for layer, other, hold in zip(layers_of(problem), weighted, placed.transpose(1, 2, 0), strict=True):
        assert layer.wait(hold) == pytest.approx(other.wait(hold))


def test_waits_of_tokens_average_to_the_objective():
    problem = instance(1)
    placed = solve_latency(problem, schedule=QUICK).placed
    assert placed is not None
    means = [waited.mean() for waited in token_waits(problem, placed)]
    np.testing.assert_allclose(means, waits(problem, placed))
