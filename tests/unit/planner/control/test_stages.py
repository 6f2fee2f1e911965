"""What a plan's stages mean for each node."""

import pytest

from planner.control.stages import InconsistentPlan, assign, stage_placements
from tests.small_plans import CATALOGUE, all_on, plan_through, replicas, route

KEY = (0, 1)


def assignments(plan, *, epoch=None, before=(), after=None, stores=("a",)):
    return assign(
        plan,
        epoch=plan.epoch if epoch is None else epoch,
        before=before,
        after=plan.placement if after is None else after,
        catalogue=CATALOGUE,
        stores=stores,
    )


def hops(assignment):
    return {(hop.layer, hop.expert): (hop.holders, hop.shares) for hop in assignment.routing}


def test_an_explicit_route_wins_over_a_replica_of_the_ingress_which_is_what_is_left_if_the_holder_dies():
    placed = replicas(all_on("a") | {KEY: ["a/disk", "b"]})
    (given,) = (assignments(plan_through(placed, routes=[route("a", KEY, "b")]))["a"],)
    assert hops(given) == {KEY: (("b", "a"), ())}


def test_without_a_route_a_node_uses_what_it_holds():
    placed = replicas(all_on("a") | {KEY: ["a/disk", "b"]})
    assert hops(assignments(plan_through(placed))["a"]) == {}
    to_itself = plan_through(placed, routes=[route("a", KEY, "a")])
    assert hops(assignments(to_itself)["a"]) == {}


def test_an_ingress_may_have_a_share_of_its_own_calls():
    placed = replicas(all_on("a") | {KEY: ["a", "b"]})
    plan = plan_through(placed, routes=[route("a", KEY, "a", 0.25), route("a", KEY, "b", 0.75)])
    assert hops(assignments(plan)["a"]) == {KEY: (("b", "a"), (0.75, 0.25))}


def test_before_the_last_stage_the_largest_share_that_is_there_gets_every_call():
    first = replicas(all_on("a") | {KEY: ["b", "c"]})
    last = replicas(all_on("a") | {KEY: ["b", "c", "d"]})
    routes = [route("a", KEY, "b", 0.2), route("a", KEY, "c", 0.3), route("a", KEY, "d", 0.5)]
    plan = plan_through(first, last, routes=routes)
    assert hops(assignments(plan, epoch=1, after=first)["a"]) == {KEY: (("c", "b"), ())}
    assert hops(assignments(plan, before=first)["a"]) == {KEY: (("d", "c", "b"), (0.5, 0.3, 0.2))}


def test_sources_are_the_holders_before_then_stores_never_the_node_itself():
    before, after = replicas(all_on("a", "b")), replicas(all_on("b", "c"))
    given = assignments(plan_through(after, before=before), before=before, stores=("d", "c"))
    assert {r.sources for r in given["c"].replicas} == {("a", "b", "d")}
    assert given["a"].replicas == ()  # it leaves, and is told so


def test_every_node_of_the_plan_is_part_of_every_stage():
    """A node whose first replica comes in a later stage was told nothing, and the stage before waited for it."""
    first, last = replicas(all_on("a")), replicas(all_on("a") | {KEY: ["late"]})
    plan = plan_through(first, last)
    assert set(assignments(plan, epoch=1, after=first)) == {"a", "late"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": ()}, "no node holds layer 0 expert 0"),
        ({"epoch": 1, "base_epoch": 1}, "stage"),
        ({"placement": replicas(all_on("b"))}, "do not lead to its placement"),
    ],
)
def test_plans_that_contradict_themselves(change, text):
    plan = plan_through(replicas(all_on("a"))).model_copy(update=change)
    with pytest.raises(InconsistentPlan, match=text):
        stage_placements((), plan)


def test_a_tier_changes_within_a_stage_but_an_expert_does_not_stay_in_two():
    on_disk, on_device = replicas(all_on("a"), tier="disk"), replicas(all_on("a"))
    plan = plan_through(on_device, before=on_disk)
    assert stage_placements(on_disk, plan) == [on_device]
    kept = plan.model_copy(update={"steps": tuple(s for s in plan.steps if s.action != "drop")})
    with pytest.raises(InconsistentPlan, match="would stay on a in two tiers"):
        stage_placements(on_disk, kept)
