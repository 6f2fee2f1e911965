"""`planner solve --tail`: the slowest tokens on the command line."""

import json

import pytest


@pytest.mark.parametrize("solver", ["auto", "decomposition"])
def test_the_mean_keeps_its_limit_and_the_bound_is_that_of_the_mean(planner, workspace, solver):
    path = workspace.write()
    options = ("--json", "--solver", solver, "--time-limit", "3")
    plain = json.loads(planner("solve", path, *options).out)
    tailed = json.loads(planner("solve", path, *options, "--tail", "0.1").out)
    assert tailed["bound"] <= plain["objective"] * (1 + 1e-9)
    assert tailed["objective"] <= 1.02 * plain["objective"] * (1 + 1e-9)
    assert tailed["solver"].endswith("for the slowest 0.1 of tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solver", "dancemoe"), "dancemoe places on its own"),
        (("--objective", "remote-calls"), "--tail is about the waits of recorded tokens"),
        (("--tail", "0.9"), "0.9"),
    ],
)
def test_where_it_means_nothing_it_is_refused(planner, workspace, arguments, message):
    ran = planner("solve", workspace.write(), "--tail", "0.05", *arguments)
    assert ran.code == 2
    assert message in ran.err
