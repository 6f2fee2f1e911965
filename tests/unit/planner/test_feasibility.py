"""Each constraint broken on its own is told on its own, with limit and value."""

from dataclasses import replace

import numpy as np
import pytest

from planner.feasibility import violations
from planner.objective import Routing, link_load, nearest, node_load
from tests.planning import line, model_spec, node, problem_of, topology_of


@pytest.fixture
def problem():
    nodes = [node("a", device=6, host=4, rate=10), node("b", device=8, rate=20)]
    return problem_of(topology_of(nodes, line("a", "b")), model_spec())


@pytest.fixture
def placed(problem):
    """Layer 0 in a's device, layer 1 on b."""
    placed = np.zeros((3, 2, 4), dtype=bool)
    placed[0, 0] = placed[2, 1] = True
    return placed


def broken(problem, placed, routing=None):
    return violations(problem, placed, routing or nearest(problem, placed, "additive-latency"))


def test_feasible(problem, placed):
    assert broken(problem, placed) == []


def test_coverage(problem, placed):
    placed[0, 0, 3] = False
    names = [violation.constraint for violation in broken(problem, placed)]
    assert names == ["coverage", "assignment"]


def test_replicas(problem, placed):
    [violation] = broken(replace(problem, required=2), placed)
    assert (violation.constraint, violation.value, violation.limit) == ("replicas", 1, 2)
    assert "7 more experts" in violation.message


def test_one_tier(problem, placed):
    placed[1, 0, 0] = True
    [violation] = broken(problem, placed)
    assert violation.constraint == "one-tier"
    assert "a, layer 0 expert 0 is kept in 2 tiers" in violation.message


def test_memory(problem, placed):
    placed[0, 1] = True
    [violation] = broken(problem, placed)
    assert (violation.constraint, violation.subject) == ("memory", "a (device)")
    assert (violation.value, violation.limit) == (800, 600)


@pytest.mark.parametrize(("name", "layer"), [("pinned", 1), ("banned", 0)])
def test_pins_and_bans(problem, placed, name, layer):
    wanted = np.zeros((2, 2, 4), dtype=bool)
    wanted[0, layer, 2] = True
    [violation] = broken(replace(problem, **{name: wanted}), placed)
    assert violation.constraint == name[:3]
    assert f"layer {layer} expert 2 is {'pinned to' if name == 'pinned' else 'banned from'} a" in violation.message


def test_calls_to_a_node_that_does_not_hold_the_expert(problem, placed):
    routing = nearest(problem, placed, "additive-latency")
    holder = routing.holder.copy()
    holder[0, 0, :] = 2
    assert broken(problem, placed, Routing(holder))[0].constraint == "assignment"


def test_load_and_link(problem, placed):
    routing = nearest(problem, placed, "additive-latency")
    load, link = node_load(problem, routing), link_load(problem, routing)
    assert load == pytest.approx([60 * 50e-6, 60 * 50e-6])  # 30 tokens/s, two experts in each layer
    assert link == pytest.approx([(20 * 2 + 10 * 2) * problem.call_bytes])
    tight = replace(problem, compute_limit=load * [0.5, 1.0], link_limit=link / 2)
    names = {violation.constraint: violation for violation in broken(tight, placed)}
    assert names.keys() == {"load", "link"}
    assert names["load"].subject == "a"
    assert names["link"].value == pytest.approx(2 * names["link"].limit)
