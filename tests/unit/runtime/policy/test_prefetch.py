"""Loads ahead of time: as many as a layer has idle time for, none where the link is busy, quick or badly guessed for."""

from runtime.policy.prefetch import Slack


def slack(*, load_s, layer_s, waited_s=0.0):
    found = Slack()
    for _ in range(50):
        found.observe_load(load_s)
        found.observe_layer(layer_s, waited_s)
    return found


def test_room_is_idle_time_over_the_time_of_a_load():
    assert slack(load_s=0.01, layer_s=0.035).room == 3
    assert slack(load_s=0.01, layer_s=0.035, waited_s=0.03).room == 0
    assert slack(load_s=0.05, layer_s=0.035).room == 0
    assert slack(load_s=0.0001, layer_s=0.035).room == 0  # quicker than another thread would be


def test_guesses_that_do_not_come_true_end_it_and_are_forgotten():
    found = slack(load_s=0.01, layer_s=0.035)
    found.observe_guesses(10, 0)
    assert found.room == 3  # too few to tell
    found.observe_guesses(90, 20)
    assert found.room == 0
    found.observe_guesses(5000, 4500)
    assert found.room == 3
    assert found.guesses < 4096


def test_low_precision_is_preferred_where_it_is_loaded_sooner():
    slack = Slack()
    assert slack.prefers_low()  # nothing is known yet
    for low_s, prefers in ((1e-3, False), (2e-4, True)):
        for _ in range(200):
            slack.observe_load(5e-4)
            slack.observe_load(low_s, is_low=True)
        asked = [slack.prefers_low() for _ in range(512)]
        assert asked.count(prefers) >= 510
        assert True in asked  # times change
