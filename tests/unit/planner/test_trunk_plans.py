"""From a trunk that stays to one that moves and back: plans that a coordinator takes, stage by stage, within memory."""

import json
from itertools import pairwise

import pytest

from planner.control.stages import assign, paths_of
from planner.control.state import Accept, ClusterState, judge, placements_ahead
from schemas.messages import Catalogue, Record
from schemas.paths import path_memory
from schemas.plan import load_plan
from schemas.topology import load_topology
from tests.planning import EXAMPLES, EXPERT_BYTES
from tests.small_plans import LAYOUT


@pytest.fixture
def plans(planner, workspace, tmp_path):
    """Where the trunk stays, moves away and comes back, each plan from the one before."""
    path = workspace.write()
    base = ("solve", path, "--objective", "additive-latency", "--time-limit", "5")
    for arguments in (
        ("--solver", "uniform", "-o", "0.json"),
        ("--solver", "pipeline", "--trunk", "move", "--current", "0.json", "-o", "1.json"),
        ("--solver", "dancemoe", "--trunk", "stay", "--current", "1.json", "-o", "2.json"),
    ):
        ran = planner(*base, *arguments)
        assert ran.code == 0, ran.err
    return load_topology(path), [load_plan(tmp_path / f"{number}.json") for number in range(3)]


def catalogue(model):
    keys = ((layer, expert) for layer in range(model.layers) for expert in range(model.experts))
    records = tuple(Record(layer=la, expert=e, sha256=f"{la}{e}".rjust(64, "0"), bytes=EXPERT_BYTES) for la, e in keys)
    return Catalogue(node="a", model=model, layout=LAYOUT, records=records)


def require_room(topology, model, before, after):
    """While an epoch follows another a node has what both assign to it."""
    for node in topology.nodes:
        given = [epoch[node.id] for epoch in (before, after) if node.id in epoch]
        held = {
            (replica.record.layer, replica.record.expert, replica.tier) for each in given for replica in each.replicas
        }
        used = dict.fromkeys(("device", "host", "disk"), 0)
        used["device"] = path_memory(node.id, [p for each in given for p in each.paths], model, topology.context).total
        for _, _, tier in held:
            used[tier] += EXPERT_BYTES
        assert all(used[tier] <= getattr(node.memory, tier) for tier in used), (node.id, used)


def epochs(plan, state):
    """Assignments of each epoch of a plan."""
    placement, paths = state.placement, state.paths
    for epoch, after in enumerate(placements_ahead(plan, placement, state.epoch), start=state.epoch + 1):
        yield assign(
            plan, epoch=epoch, before=placement, after=after, catalogue=catalogue(plan.model), stores=("a",),
            paths_before=paths,
        )  # fmt: skip
        placement, paths = after, paths_of(plan, epoch, paths)


def test_paths_are_found_that_can_be_reached_from_those_in_force(planner, tmp_path):
    """The quickstart's machines are too full for the best paths and those in force at the same time."""
    base = ("solve", EXAMPLES / "quickstart" / "topology.yaml", "--time-limit", "2")
    for options in (("-o", "stay.json"), ("--trunk", "move", "--current", "stay.json", "-o", "move.json")):
        ran = planner(*base, *options)
        assert ran.code == 0, ran.err
    stay, move = (load_plan(tmp_path / f"{name}.json") for name in ("stay", "move"))
    assert move.summary.predicted_latency_s <= stay.summary.predicted_latency_s * (1 + 1e-9)


def test_every_epoch_of_every_plan_fits(plans):
    topology, made = plans
    state = ClusterState(cluster="test")
    last = {}
    for plan in made:
        assert judge(state, plan) == Accept(nothing_to_do=False)
        given = list(epochs(plan, state))
        for before, after in pairwise([last, *given]):
            require_room(topology, plan.model, before, after)
        last = given[-1]
        assert {path for each in last.values() for path in each.paths} == set(plan.trunk)
        state = ClusterState(
            cluster="test", epoch=plan.epoch, placement=plan.placement, committed_plan=plan, plan=plan, phase="done"
        )
    assert [len(path.segments) > 1 for plan in made for path in plan.trunk] == [False] * 3 + [True] * 3 + [False] * 3


def test_a_change_of_paths_is_told_and_simulated(planner, plans):
    _, (_, moved, _) = plans
    assert "tokens take new paths" in planner("show", "1.json").out
    assert "tokens take other paths" in planner("diff", "0.json", "1.json").out
    ran = planner("simulate", "1.json", "--tokens", "300", "--json")
    assert ran.code == 0, ran.err
    latency = json.loads(ran.out)["latency"]
    assert latency["waits"]["hops_s"] == pytest.approx(latency["waits"]["network_s"])
    assert latency["p50_s"] == pytest.approx(moved.summary.predicted_latency_s, rel=0.02)
