"""What a plan's stages mean for each node."""

import pytest

from planner.control.stages import (
    InconsistentPlan,
    assign,
    plan_nodes,
    require_whole_paths,
    stage_placements,
    travelling_bytes,
)
from schemas import messages as msg
from schemas.plan import NodePrecision
from schemas.precision import PackedLayout, PackedPart
from tests.small_plans import BYTES, CATALOGUE, TRUNK_PARTS, all_on, path, plan_through, replicas, route

KEY = (0, 1)


def assignments(plan, *, epoch=None, before=(), after=None, stores=("a",), paths_before=(), packed=()):
    return assign(
        plan,
        epoch=plan.epoch if epoch is None else epoch,
        before=before,
        after=plan.placement if after is None else after,
        catalogue=CATALOGUE.model_copy(update={"trunk": TRUNK_PARTS, "packed": packed}),
        stores=stores,
        paths_before=paths_before,
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


def parts(assignment):
    return [(part.record.part, part.record.layer) for part in assignment.trunk]


def test_each_node_of_a_path_gets_the_parts_of_its_layers_and_whom_to_call():
    placed = replicas(all_on("a", "b") | {KEY: ["c"]})
    plan = plan_through(placed, trunk=[path("a", "a", "b"), path("c", "b", "b")])
    given = assignments(plan, stores=("a", "d"))
    assert {node: parts(each) for node, each in given.items()} == {
        "a": [("embedding", 0), ("layer", 0)],
        "b": [("embedding", 0), ("layer", 0), ("layer", 1), ("head", 1)],
        "c": [],  # its tokens enter there and run elsewhere
    }
    assert {node: [p.ingress for p in each.paths] for node, each in given.items()} == {
        "a": ["a"],
        "b": ["a", "c"],
        "c": ["c"],
    }
    assert [node for node, each in given.items() if each.ingress] == ["a", "c"]
    assert hops(given["a"]) == hops(given["b"]) == {KEY: (("c",), ())}
    assert {part.sources for part in given["a"].trunk} == {("d",)}
    assert {part.sources for part in given["b"].trunk} == {("a", "d")}


def test_a_trunk_that_stays_is_a_path_of_one_segment_with_every_part():
    given = assignments(plan_through(replicas(all_on("a", "b"))))
    assert parts(given["a"]) == [(part.part, part.layer) for part in TRUNK_PARTS]
    assert (parts(given["b"]), given["b"].paths, given["b"].routing) == ([], (), ())


def test_old_paths_are_in_force_until_the_trunk_stage_and_those_who_leave_still_know_whom_to_call():
    first, last = replicas(all_on("a")), replicas(all_on("b"))
    old, new = path("a", "a", "a"), path("b", "b", "b")
    plan = plan_through(first, last, last, trunk=[new], trunk_stage=2, before=first)
    by_epoch = [
        assignments(plan, epoch=epoch, before=first, after=after, paths_before=(paths,))
        for epoch, after, paths in ((1, first, old), (2, last, old), (3, last, new))
    ]
    assert [list(given["a"].paths) for given in by_epoch] == [[old], [], []]
    assert [list(given["b"].paths) for given in by_epoch] == [[], [new], [new]]
    assert [given["a"].ingress for given in by_epoch] == [True, False, False]
    assert [len(given["a"].routing) for given in by_epoch] == [0, 6, 6]  # it left the plan, and has answers to finish


def test_a_node_that_only_runs_layers_is_part_of_the_plan():
    plan = plan_through(replicas(all_on("a")), trunk=[path("a", "a", "b")])
    assert plan_nodes(plan) == {"a", "b"}
    assert parts(assignments(plan)["b"]) == [("layer", 1), ("head", 1)]


@pytest.mark.parametrize(
    ("trunk", "trunk_stage", "text"),
    [
        ([path("a", "a")], None, "the path of a has 1 layers, the model 2"),
        ([path("a", "a", "b", "a")], None, "the path of a has 3 layers, the model 2"),
        ([path("a", "a", "b")], 2, "begin with stage 2, but it has 1"),
    ],
)
def test_paths_that_lead_nowhere(trunk, trunk_stage, text):
    plan = plan_through(replicas(all_on("a")), trunk=trunk, trunk_stage=trunk_stage)
    with pytest.raises(InconsistentPlan, match=text):
        require_whole_paths(plan)


def test_a_path_with_a_layer_left_out():
    whole = path("a", "a", "b")
    gap = whole.model_copy(update={"segments": whole.segments[1:]})
    with pytest.raises(InconsistentPlan, match=r"layers 1 … 1 on b where layer 0 is next"):
        require_whole_paths(plan_through(replicas(all_on("a")), trunk=[gap]))


PARTS = tuple(
    PackedPart(name=name, shape=(1, 1), offset=offset, axis=1, group=1)
    for name, offset in (("gate_up_proj", 0), ("down_proj", 5))
)
INT8 = msg.PackedCatalogue(
    layout=PackedLayout(precision="int8", dtype="float32", bytes=10, parts=PARTS),
    records=tuple(r.model_copy(update={"sha256": "f" * 62 + r.sha256[-2:], "bytes": 10}) for r in CATALOGUE.records),
)


def in_int8(plan, *nodes):
    held = tuple(NodePrecision(node=node, precision="int8", expert_bytes=10) for node in nodes)
    return plan.model_copy(update={"precisions": held}).sealed()


def test_records_travel_packed_between_nodes_that_hold_them_so():
    before = replicas(all_on("a", "b"))
    after = replicas(all_on("a", "b") | {KEY: ["a", "b", "c", "d", "e/disk"]})
    plan = in_int8(plan_through(after, before=before), "b", "c", "e")
    given = assignments(plan, before=before, stores=("s",), packed=(INT8,))
    new = {node: next(r for r in given[node].replicas if (r.record.layer, r.record.expert) == KEY) for node in "cde"}
    assert new["c"].sources == ("b", "s")
    assert (new["c"].brought.bytes, new["c"].brought.sha256[:4]) == (10, "ffff")
    assert new["d"].sources == new["e"].sources == ("a", "s")
    assert new["d"].packed is new["e"].packed is None, "disks hold the checkpoint's"
    assert {node: each.precision for node, each in given.items() if node in "abcde"} == {
        "a": None, "b": "int8", "c": "int8", "d": None, "e": "int8",
    }  # fmt: skip
    assert (given["b"].packed_layout, given["d"].packed_layout) == (INT8.layout, None)
    steps = {s.node: s.model_copy(update={"bytes": 10}) for s in plan.steps if s.action == "replicate"}
    catalogue = CATALOGUE.model_copy(update={"packed": (INT8,)})
    assert [travelling_bytes(steps[n], plan, c) for n in "cd" for c in (catalogue, None)] == [10, 10, 10, 10]


def test_a_store_without_packed_records_sends_whole_ones():
    before, after = replicas(all_on("b")), replicas(all_on("b", "c"))
    plan = in_int8(plan_through(after, before=before), "b", "c")
    given = assignments(plan, before=before, stores=("s",))
    assert {(r.packed, r.sources) for r in given["c"].replicas} == {(None, ("b", "s"))}
    (step, *_) = (s.model_copy(update={"bytes": 10}) for s in plan.steps if s.action == "replicate")
    assert travelling_bytes(step, plan, CATALOGUE) == BYTES


def test_no_record_is_named_that_no_holder_has_in_the_checkpoint_s_precision():
    placed = replicas({key: ["b"] for key in all_on("b")} | {KEY: ["c"]})
    plan = in_int8(plan_through(placed, routes=[route("a", key, "b") for key in all_on("b") if key != KEY]), "b")
    named = {(hop.layer, hop.expert): hop.sha256 for hop in assignments(plan, packed=(INT8,))["a"].routing}
    assert [key for key, name in named.items() if name] == [KEY]
