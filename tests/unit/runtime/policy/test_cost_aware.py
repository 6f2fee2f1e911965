"""Eviction by what having an expert back costs: prices, moving averages, and what it saves where loads are uneven."""

import numpy as np
import pytest

from runtime.policy.cost_aware import CostAware, ReloadTimes
from runtime.policy.eviction import EVICTIONS, Rates
from runtime.replay import Situation, drawn_reload_s, eviction_of, replay
from tests.recordings import skewed_recording


def test_without_prices_it_is_the_policy_that_says_the_chance():
    draw, ours, plain = np.random.default_rng(0), EVICTIONS["cost-aware"](2, 6), Rates(2, 6)
    for _ in range(30):
        for layer in range(2):
            ids = draw.permutation(6)[None, :2]
            for each in (ours, plain):
                each.observe(layer, ids, np.ones((1, 2)), 2)
    np.testing.assert_array_equal(ours.worth(np.arange(12), 0), plain.worth(np.arange(12), 0))


def test_what_is_slow_to_have_back_and_small_is_kept():
    policy = CostAware(Rates(1, 4), 4)
    policy.observe(0, np.array([[0, 1, 2, 3]]), np.ones((1, 4)), 4)
    policy.price(np.array([1e-3, 1e-3, 20e-3, 20e-3]), np.array([1e6, 2e6, 2e6, 1e6]))
    assert np.argsort(policy.worth(np.arange(4), 0)).tolist() == [1, 0, 2, 3]


def test_times_are_guessed_until_something_came_from_there():
    times = ReloadTimes({"disk": 1e-3, "peer": 1e-2})
    assert times.seconds(("peer", "int8")) == 1e-2
    times.observe(("peer", "int8"), 0.2)
    times.observe(("peer", "int8"), 0.1)
    assert times.seconds(("peer", "int8")) == pytest.approx(0.19)
    assert times.seconds(("peer", "checkpoint")) == 1e-2


@pytest.mark.parametrize(("in_bytes", "slots"), [(False, 12), (True, 1500)])
def test_where_some_come_from_far_less_time_is_waited(in_bytes, slots):
    """30 % of the experts at a slow peer; sizes mixed where the capacity is in bytes."""
    recording = skewed_recording()
    seconds = drawn_reload_s(recording.num_experts, [(0.7, 1e-3), (0.3, 20e-3)])
    given = Situation(slots, in_bytes=in_bytes, reload_s=seconds)
    took = {
        name: replay(recording, given, eviction_of(recording, name, given)) for name in ("cost-aware", "rates", "lru")
    }
    assert took["cost-aware"].reload_s < 0.8 * took["rates"].reload_s < took["lru"].reload_s


def test_shares_of_experts_are_drawn_to_the_expert():
    seconds = drawn_reload_s(10, [(0.7, 1.0), (0.3, 2.0)])
    assert sorted(seconds.tolist()) == [1.0] * 7 + [2.0] * 3
    assert seconds.tolist() == drawn_reload_s(10, [(0.7, 1.0), (0.3, 2.0)]).tolist()
