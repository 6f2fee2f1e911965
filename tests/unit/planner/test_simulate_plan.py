import json

import numpy as np
import pytest
from click.testing import CliRunner

from planner.inputs import load_inputs
from planner.objective import judge, nearest
from planner.simulate import Arrivals
from planner.simulate.cli import COMMANDS
from planner.simulate.placement import UnlikePlan, placed_by, routing_by, with_trunk_of
from planner.simulate.run import simulate_plan
from planner.solve import solve
from schemas.plan import Segment, TrunkPath, load_plan
from tests.planning import Workspace, write_trace

(simulate,) = COMMANDS


@pytest.fixture
def solved(tmp_path, planner):
    """Topology and plan files, and the plan."""
    topology = Workspace(tmp_path).write()
    plan = tmp_path / "plan.json"
    assert planner("solve", topology, "-o", plan, "--solver", "dancemoe").code == 0
    return topology, plan, load_plan(plan)


def run(*arguments):
    return CliRunner().invoke(simulate, [str(argument) for argument in arguments])


def test_a_plan_becomes_the_arrays_it_was_made_from(solved):
    topology, _, plan = solved
    problem = load_inputs(topology).problem()
    found = solve(problem, "dancemoe")
    np.testing.assert_array_equal(placed_by(plan, problem), found.placed)
    callers = np.unique(problem.trunk_node)
    np.testing.assert_array_equal(routing_by(plan, problem).holder[callers], found.routing.holder[callers])
    np.testing.assert_array_equal(with_trunk_of(plan, problem).trunk_node, problem.trunk_node)


def test_split_routes_and_moved_trunks_are_read(solved):
    topology, _, plan = solved
    problem = load_inputs(topology).problem()
    everywhere = np.ones((problem.num_places, problem.layers, problem.experts), dtype=bool)
    calls = nearest(problem, everywhere, "additive-latency")
    assert judge(problem, calls).remote_call_share == 0
    away = next(route for route in plan.routes if route.ingress == "a")
    twin = next(
        r for r in plan.placement if r.node not in ("a", away.holder)
    ).model_copy(update={"layer": away.layer, "expert": away.expert})  # fmt: skip
    halves = tuple(away.model_copy(update={"holder": node, "share": 0.5}) for node in (away.holder, twin.node))
    others = tuple(route for route in plan.routes if route != away)
    placement = tuple(r for r in plan.placement if (r.key, r.node) != (twin.key, twin.node))
    split = plan.model_copy(update={"placement": (*placement, twin), "routes": (*others, *halves)})
    routing = routing_by(split, problem)
    assert sorted(routing.share[0, :, away.layer, away.expert])[-2:] == [0.5, 0.5]
    moved = TrunkPath(
        ingress="a",
        segments=(Segment(node="a", first_layer=0, last_layer=1), Segment(node="b", first_layer=2, last_layer=3)),
    )
    trunk = with_trunk_of(plan.model_copy(update={"trunk": (moved,)}), problem).trunk_node
    np.testing.assert_array_equal(trunk[0], [0, 0, 1, 1])


def test_a_plan_that_does_not_fit_its_topology_is_refused(solved, tmp_path):
    topology, _, plan = solved
    problem = load_inputs(topology).problem()
    faults = {
        "no room": {"placement": (plan.placement[0].model_copy(update={"node": "elsewhere"}), *plan.placement[1:])},
        "no node of the plan holds": {"placement": tuple(r for r in plan.placement if r.key != (0, 0))},
        "does not hold it": {"routes": (plan.routes[0].model_copy(update={"holder": "elsewhere"}),)},
        "the plan is for": {"model": plan.model.model_copy(update={"experts": 9})},
    }
    for message, change in faults.items():
        with pytest.raises(UnlikePlan, match=message):
            routing_by(plan.model_copy(update=change), problem)
    other = Workspace(tmp_path).write(cluster="another")
    with pytest.raises(UnlikePlan, match="another"):
        simulate_plan(tmp_path / "plan.json", other, {}, Arrivals(tokens=10))


def test_the_command_prints_tables(solved):
    topology, plan, _ = solved
    shown = run(plan, "--topology", topology, "--tokens", 500)
    assert shown.exit_code == 0, shown.output
    for word in ("p95", "queues", "a → b", "500 tokens"):
        assert word in shown.output
    assert run(plan, "--tokens", 500).output == shown.output, "topology.yaml beside the plan is found"


def test_the_command_prints_one_json_document(solved):
    _, plan, _ = solved
    shown = json.loads(run(plan, "--tokens", 600, "--seed", 3, "--json").stdout)
    assert shown["tokens"] == 600
    assert shown["settings"]["seed"] == 3
    assert {node["id"] for node in shown["nodes"]} == {"a", "b", "c"}
    assert shown["latency"]["p50_s"] <= shown["latency"]["p99_s"]
    assert shown["overloaded"] == []


def test_overload_is_told(solved):
    _, plan, _ = solved
    assert "overloaded" in run(plan, "--tokens", 600, "--rate-scale", 1e6).output


def test_another_trace_can_be_replayed(solved, tmp_path):
    topology, plan, _ = solved
    model = load_inputs(topology).model
    write_trace(tmp_path / "other.safetensors", model, workload="a", seed=77)
    usual = run(plan, "--tokens", 600, "--json").stdout
    assert run(plan, "--tokens", 600, "--json", "--trace", f"a={tmp_path / 'other.safetensors'}").stdout != usual


def test_bad_options_are_named(solved, tmp_path):
    _, plan, _ = solved
    assert "WORKLOAD=FILE" in run(plan, "--trace", "a").output
    elsewhere = tmp_path / "sub"
    elsewhere.mkdir()
    moved = elsewhere / "plan.json"
    moved.write_text(plan.read_text())
    assert "give --topology" in run(moved).output
    unknown = run(plan, "--trace", f"zebra={tmp_path / 'a.safetensors'}")
    assert "zebra" in str(unknown.exception)
