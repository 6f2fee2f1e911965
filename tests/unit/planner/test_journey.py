"""A token's way as legs, and what a node on it may expect."""

import pytest

from planner.journey import legs_of, promises
from schemas.plan import LayerCost, PathSummary


def told(ingress, *nodes, wait_s=0.01):
    """A path with the node of each layer: 1 ms of compute each, 5 ms for every hop."""
    onward = [*nodes[1:], nodes[0]]
    layers = tuple(
        LayerCost(layer=layer, node=node, compute_s=0.001, wait_s=wait_s, hop_s=0.005 * (node != after), calls=0.5)
        for layer, (node, after) in enumerate(zip(nodes, onward, strict=True))
    )
    return PathSummary(ingress=ingress, layers=layers)


def test_a_leg_is_what_a_node_runs_in_a_row():
    legs = legs_of(told("a", "a", "b", "b", "a"))
    assert [(leg.node, leg.first_layer, leg.last_layer, leg.onward, leg.hops) for leg in legs] == [
        ("a", 0, 0, "b", True),
        ("b", 1, 2, "a", True),
        ("a", 3, 3, "a", False),  # the ring closes where it is
    ]
    assert legs[1].total_s == pytest.approx(0.002 + 0.02 + 0.005)
    (only,) = legs_of(told("a", "a", "a"))
    assert (only.onward, only.hops) == ("a", False)


def test_a_node_on_two_paths_expects_their_mean_by_tokens():
    paths = [told("a", "a", "b"), told("b", "b", "b", wait_s=0.0)]
    alike = promises(paths, {})
    assert alike["a"] == (1.0, 0.5, pytest.approx(0.01))
    assert alike["b"] == (0.5, 0.75, pytest.approx(0.005))
    weighed = promises(paths, {"a": 30, "b": 10})
    assert weighed["b"] == (0.75, 0.625, pytest.approx(0.0075))
    assert promises(paths, {"b": 10}).keys() == {"b"}
