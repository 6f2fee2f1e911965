"""What a calibration of a plan says was at hand is what the agents of that plan find at hand."""

import numpy as np
import pytest

from agent.calibrating import layer_runners, planned_at_hand
from agent.routes import at_hand, epoch_routes
from planner.control.stages import assign
from schemas.calibration import layer_mask
from schemas.paths import layers_run
from tests.small_plans import CATALOGUE, KEYS, MODEL, path, plan_through, replicas, route

SPREAD = {key: ["a"] if sum(key) % 2 else ["b"] for key in KEYS} | {(1, 2): ["a", "b"], (0, 1): ["a/disk", "b"]}


def found_at(plan, node):
    """Experts at hand by layer, as an agent of the plan sees it."""
    assignment = assign(plan, epoch=plan.epoch, before=(), after=plan.placement, catalogue=CATALOGUE, stores=("a",))[
        node
    ]
    routing = epoch_routes(assignment, node, layers=MODEL.layers, experts=MODEL.experts).routing
    return at_hand(assignment, routing, sorted(layers_run(node, plan.trunk)))


@pytest.mark.parametrize(
    ("trunk", "routes"),
    [
        ([path("a", "a", "a")], ()),
        ([path("a", "a", "a")], [route("a", (1, 2), "b")]),
        ([path("a", "a", "a")], [route("a", (1, 2), "a", 0.5), route("a", (1, 2), "b", 0.5)]),
        ([path("a", "a", "b")], ()),
        ([path("a", "b", "b"), path("b", "a", "b")], ()),
    ],
)
def test_agents_find_what_was_calibrated(trunk, routes):
    plan = plan_through(replicas(SPREAD), trunk=trunk, routes=routes)
    for node in ("a", "b"):
        if not layers_run(node, plan.trunk):
            continue
        masks = planned_at_hand(plan, node)
        for layer, experts in found_at(plan, node).items():
            assert layer_mask(experts) == layer_mask(np.flatnonzero(masks[layer]).tolist()), (node, layer)


def test_layers_run_where_the_tokens_of_a_node_pass():
    plan = plan_through(replicas(SPREAD), trunk=[path("a", "a", "b"), path("c", "b", "a")])
    assert layer_runners(plan, "c") == ["b", "a"]
    assert layer_runners(plan, "a") == ["a", "a"], "what it runs for any it runs itself"
    assert layer_runners(plan, "nobody") == []


def test_an_assignment_carries_the_plans_budget():
    for quality, budget in ((None, 0.0), (0.005, 0.005)):
        plan = plan_through(replicas(SPREAD)).model_copy(update={"quality_budget": quality}).sealed()
        given = assign(plan, epoch=1, before=(), after=plan.placement, catalogue=CATALOGUE, stores=("a",))
        assert {each.quality_budget for each in given.values()} == {budget}
