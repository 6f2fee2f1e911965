"""The command line: what it writes, prints and ends with, for good input and every kind of bad."""

import json

import pytest
import yaml

from planner.solvers.choose import SOLVERS
from schemas.plan import load_plan
from tests.planning import EXAMPLES, EXPERT_BYTES, line, node, write_trace


def test_solve_writes_a_sealed_plan_beside_a_short_summary(planner, workspace, tmp_path):
    ran = planner("solve", workspace.write())
    assert ran.code == 0, ran.err
    assert "epoch 0 → 1 makes" in ran.out.splitlines()[0]
    assert "\x1b" not in ran.out + ran.err
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.base_epoch, plan.epoch, plan.cluster) == (0, 1, "test")
    assert {replica.key for replica in plan.placement} == {(layer, k) for layer in range(4) for k in range(8)}
    assert [path.ingress for path in plan.trunk] == ["a", "b", "c"]
    assert all(path.segments[0].node == path.ingress for path in plan.trunk)
    assert plan.summary.status == "optimal"
    held = {(replica.layer, replica.expert, replica.node) for replica in plan.placement}
    assert len(held) == len(plan.placement)
    for route in plan.routes:
        assert (route.layer, route.expert, route.ingress) not in held
        assert (route.layer, route.expert, route.holder) in held
    assert len(plan.routes) == 3 * 32 - len(held)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solve_json_has_every_documented_field_and_writes_nothing(planner, workspace, tmp_path, solver):
    ran = planner("solve", workspace.write(), "--json", "--solver", solver)
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    wanted = {
        "status", "solver", "objective", "bound", "gap", "seconds", "remote_call_share", "any_remote_share",
        "predicted_latency_s", "nodes", "plan",
    }  # fmt: skip
    assert wanted <= document.keys()
    assert document["solver"] == {"auto": "milp", "decomposition": "latency"}.get(solver, solver)
    assert {"id", "experts", "bytes", "capacity"} <= document["nodes"][0].keys()
    for entry in document["nodes"]:
        assert entry["bytes"] == entry["experts"] * EXPERT_BYTES <= entry["capacity"]
    assert document["plan"]["digest"]
    exact = solver in {"auto", "milp", "milp:cbc", "cpsat"}
    if solver == "decomposition":
        assert document["gap"] < 0.2
    else:
        assert document["status"] == ("optimal" if exact else "feasible")
        assert (document["gap"] is not None and document["gap"] <= 1e-4) if exact else document["gap"] is None
    assert not (tmp_path / "plan.json").exists()


def test_exact_solvers_print_the_same_objective(planner, workspace):
    path = workspace.write(replicas={"minimum": 1, "survive": 0})
    values = [json.loads(planner("solve", path, "--json", "--solver", s).out)["objective"] for s in ("milp", "cpsat")]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_solving_again_from_the_plan_changes_nothing(planner, workspace, tmp_path):
    path = workspace.write()
    planner("solve", path, "-o", "first.json")
    ran = planner("solve", path, "-o", "second.json", "--current", "first.json")
    assert "nothing changes" in ran.out
    second = load_plan(tmp_path / "second.json")
    assert (second.base_epoch, second.epoch, second.steps) == (1, 1, ())


def test_another_context_alone_is_an_epoch_of_its_own(planner, workspace, tmp_path):
    assert planner("solve", workspace.write()).code == 0
    tokens = load_plan(tmp_path / "plan.json").context.tokens
    path = workspace.write(context={"tokens": tokens // 2})
    ran = planner("solve", path, "--current", tmp_path / "plan.json", "-o", tmp_path / "next.json")
    assert ran.code == 0, ran.err
    following = load_plan(tmp_path / "next.json")
    assert [step.action for step in following.steps] == ["switch"]
    assert (following.epoch, following.context.tokens) == (2, tokens // 2)


def test_solving_from_another_placement_moves_what_differs(planner, workspace, tmp_path):
    path = workspace.write()
    planner("solve", path, "-o", "first.json", "--solver", "uniform")
    ran = planner("solve", path, "-o", "second.json", "--current", "first.json")
    assert ran.code == 0, ran.err
    first, second = load_plan(tmp_path / "first.json"), load_plan(tmp_path / "second.json")
    assert second.base_epoch == 1
    assert second.epoch == 1 + max(step.stage for step in second.steps)
    kept = set(first.placement) & set(second.placement)
    made = [step for step in second.steps if step.action == "replicate"]
    assert len(made) < len(second.placement)
    assert len(made) >= len(second.placement) - len(kept)
    assert all(step.source is not None for step in made)
    ran = planner("diff", "first.json", "second.json", "-v")
    assert ran.code == 0
    assert "added" in ran.out
    assert json.loads(planner("diff", "first.json", "second.json", "--json").out)["kept"] == len(kept)
    assert planner("diff", "first.json", "first.json").out == "same placement\n"


def test_show_says_what_changes_first_and_lists_all_on_demand(planner, workspace):
    planner("solve", workspace.write(), "--solver", "uniform")
    short, long = planner("show", "plan.json"), planner("show", "plan.json", "-vv")
    assert short.out.splitlines()[0].startswith("test: epoch 0 → 1 makes")
    assert len(short.out.splitlines()) < 15
    assert "stage 1: replicate layer 0 expert" in long.out
    assert "from a store" in long.out
    assert json.loads(planner("show", "plan.json", "--json").out)["format"] == "expertmesh-plan-1"


def test_compare_judges_on_the_end_of_each_trace(planner, workspace):
    ran = planner("compare", workspace.write(), "--json", "--strategies", "uniform,dancemoe,milp")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    rows = {row["strategy"]: row for row in document["strategies"]}
    assert list(rows) == ["uniform", "dancemoe", "milp"]
    keys = {"remote_call_share", "any_remote_share", "predicted_latency_s", "bytes_per_token", "seconds"}
    assert all(keys <= row.keys() for row in rows.values())
    assert rows["milp"]["remote_call_share"] < rows["uniform"]["remote_call_share"]
    assert "last 30 %" in document["judged_on"]
    assert "54 tokens" in document["judged_on"]


def test_compare_takes_held_out_traces_by_workload(planner, workspace, tmp_path):
    path = workspace.write()
    write_trace(tmp_path / "late.safetensors", workspace.model, workload="b", tokens=10)
    named = planner("compare", path, "--json", "--strategies", "uniform", "--holdout", "a=late.safetensors")
    by_header = planner("compare", path, "--strategies", "uniform", "--holdout", "late.safetensors")
    assert (named.code, by_header.code) == (0, 0)
    assert "46 tokens" in json.loads(named.out)["judged_on"]  # 10 given, 18 kept apart of each other trace
    assert "uniform" in by_header.out
    write_trace(tmp_path / "other.safetensors", workspace.model, workload="elsewhere")
    ran = planner("compare", path, "--holdout", "other.safetensors")
    assert ran.code == 2
    assert "'elsewhere' enters at no node" in ran.err


def test_counters_replace_the_demand_of_their_node(planner, workspace, tmp_path):
    path = workspace.write()
    only = [[30 if expert < 2 else 0 for expert in range(8)] for _ in range(4)]
    document = {
        "cluster": "test", "model": "tiny", "layers": 4, "experts": 8, "top_k": 2,
        "nodes": [{"node": "c", "tokens": 30, "counts": only}],
    }  # fmt: skip
    (tmp_path / "counters.json").write_text(json.dumps(document))
    counted = json.loads(planner("solve", path, "--json", "--counters", "counters.json").out)
    shares = {entry["id"]: entry["remote_call_share"] for entry in counted["nodes"]}
    assert shares["c"] == 0.0  # it needs eight experts only, and has room for more
    document["cluster"], document["layers"] = "other", 3
    (tmp_path / "counters.json").write_text(json.dumps(document))
    ran = planner("solve", path, "--counters", "counters.json")
    assert ran.code == 2
    assert "counted on cluster 'other'" in ran.err
    assert "layers" in ran.err


def test_validate_tells_the_room_for_experts(planner, workspace):
    ran = planner("validate", workspace.write())
    assert ran.code == 0, ran.err
    assert "valid; 3 nodes, 2 links, 4 layers × 8 experts, 180 recorded tokens" in ran.out
    assert json.loads(planner("validate", workspace.write(), "--json").out)["status"] == "valid"


@pytest.mark.parametrize("name", ["topology", "plan", "model", "trace", "counters"])
def test_schema_is_printed(planner, name):
    assert json.loads(planner("schema", name).out)["properties"]


def test_commands_of_the_control_plane_are_there(planner):
    listed = planner("--help").out
    assert all(command in listed for command in ("solve", "compare", "validate", "show", "diff", "serve", "apply"))


# --- bad input: exit 2, one message, nothing written ---------------------------------------------------------------

SPOILED = {
    "unknown key": ({"trunks": {}}, "unknown key"),
    "no unit": ({"links": line("a", "b", "c", latency=2)}, "has no unit"),
    "negative": ({"nodes": [node("a", device=-1, rate=1)]}, "outside 0 B"),
    "unknown node": ({"links": line("a", "b", "x")}, "no node 'x'"),
    "disconnected": ({"links": line("a", "b")}, "no path between a, b and c"),
    "no trace": ({"workloads": {"a": "a.safetensors"}}, "has no trace"),
    "trace not there": ({"workloads": {"a": "x", "b": "b", "c": "c"}}, "x"),
    "no model": ({"model": "nowhere"}, "neither a checkpoint directory nor a model spec file"),
    "pin outside": ({"pins": [{"layer": 9, "expert": 0, "node": "a"}]}, "layer 9 expert 0 is not in tiny"),
    "pin and ban": (
        {"pins": [{"layer": 0, "expert": 0, "node": "a"}, {"layer": 0, "expert": 0, "node": "a", "ban": True}]},
        "both pinned to and banned from",
    ),
    "no demand": ({"nodes": [node("a", device=99, rate=0)], "links": []}, "tokens_per_s is 0 at every ingress"),
}


@pytest.mark.parametrize(("changes", "message"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_topology_is_one_message(planner, workspace, tmp_path, changes, message):
    ran = planner("solve", workspace.write(**changes))
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert not (tmp_path / "plan.json").exists()


def test_a_context_that_the_model_has_no_positions_for_is_refused(planner, tmp_path):
    document = yaml.safe_load((EXAMPLES / "quickstart" / "topology.yaml").read_text())
    document |= {"model": str(EXAMPLES / "models" / "tinymoe-demo"), "context": {"tokens": 4096}}
    (tmp_path / "topology.yaml").write_text(yaml.safe_dump(document))
    ran = planner("solve", tmp_path / "topology.yaml")
    assert ran.code == 2
    assert "context.tokens: 4096 tokens are above the 2048" in " ".join(ran.err.split())
    assert "plan for 2048 at most" in " ".join(ran.err.split())
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(("name", "value"), [("layers", 3), ("experts", 9), ("top_k", 1)])
def test_a_trace_of_another_model_is_refused(planner, workspace, tmp_path, name, value):
    other = workspace.model.model_copy(update={name: value})
    write_trace(tmp_path / "b.safetensors", other)
    ran = planner("solve", workspace.write())
    assert ran.code == 2
    assert f"with {name} {value}, but model 'tiny' has {getattr(workspace.model, name)}" in ran.err
    assert "b.safetensors" in ran.err


def test_a_truncated_trace_is_refused(planner, workspace, tmp_path):
    whole = (tmp_path / "b.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        (tmp_path / "b.safetensors").write_bytes(whole[:length])
        ran = planner("solve", workspace.write())
        assert ran.code == 2
        assert "b.safetensors" in ran.err


def test_an_edited_plan_is_refused(planner, workspace, tmp_path):
    path = workspace.write()
    planner("solve", path, "--solver", "uniform")
    plan = tmp_path / "plan.json"
    plan.write_text(plan.read_text().replace('"expert": 3', '"expert": 4', 1))
    for arguments in (("show", plan), ("diff", plan, plan), ("solve", path, "--current", plan)):
        ran = planner(*arguments)
        assert ran.code == 2
        assert "altered after it was written" in ran.err


def test_a_current_plan_of_another_cluster_or_model_is_refused(planner, workspace):
    planner("solve", workspace.write(), "-o", "first.json", "--solver", "uniform")
    ran = planner("solve", workspace.write(cluster="other"), "--current", "first.json")
    assert ran.code == 2
    assert "another cluster" in ran.err
    workspace.model = workspace.model.model_copy(update={"expert_bytes": 50})
    ran = planner("solve", workspace.write(), "--current", "first.json")
    assert ran.code == 2
    assert "another model" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solver", "quantum"), "'milp'"),
        (("--solver", "pipeline", "--trunk", "stay"), "--trunk stay: pipeline runs the trunk"),
        (("--horizon", "1 h"), "--current"),
        (("--current", "plan.json", "--horizon", "1"), "--current"),
        (("--objective", "speed"), "additive-latency"),
        (("--gap", "2"), "--gap"),
        (("--time-limit", "0"), "--time-limit"),
        (("--output", "no/such/plan.json"), "no directory"),
        (("--current", "nowhere.json"), "nowhere.json"),
    ],
)
def test_wrong_usage_is_told(planner, workspace, arguments, message):
    ran = planner("solve", workspace.write(), *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert ran.out == ""


def test_compare_lists_the_strategies_there_are(planner, workspace):
    ran = planner("compare", workspace.write(), "--strategies", "uniform,quantum")
    assert ran.code == 2
    assert "dancemoe" in ran.err


# --- infeasible: exit 3, which constraint, by how much, what would fix it -----------------------------------------

INFEASIBLE = {
    "memory": (
        {"nodes": [node("a", device=10, rate=1), node("b", device=4)], "links": line("a", "b")},
        ["room for 11", "21 experts", "enlarge a's device memory by 2.051 KiB"],
    ),
    "trunk": (
        {"nodes": [node("a", device=2, rate=1), node("b", device=90)], "links": line("a", "b")},
        ["node a: trunk (200 B) and KV cache (64 B)", "64 B missing", "enlarge a's device memory"],
    ),
    "replicas": ({"replicas": {"minimum": 3}}, ["3 replicas of all experts", "fewer replicas"]),
    "pins": (
        {
            "nodes": [node("a", device=60, rate=1), node("b", device=2)],
            "links": line("a", "b"),
            "pins": [{"layer": 0, "expert": expert, "node": "b"} for expert in range(4)],
        },
        ["4 experts are pinned to b, which has room for 2", "200 B"],
    ),
    "bans": (
        {
            "nodes": [node("a", device=60, rate=1), node("b", device=2)],
            "links": line("a", "b"),
            "pins": [{"layer": 1, "expert": expert, "node": "a", "ban": True} for expert in range(4)],
        },
        ["b (device) has room for 2 experts, 2 (200 B) too few", "lift a pin or ban"],
    ),
    "load": (
        {
            "nodes": [node("a", device=60, rate=1000, expert_us=200), node("b", device=2)],
            "links": line("a", "b"),
            "limits": {"compute": "50 %"},
        },
        ["compute of node a would be used to", "above the limit of 50.0%", "tokens_per_s"],
    ),
    "link": (
        {
            "nodes": [node("a", device=20, rate=1000, expert_us=1), node("b", device=40, expert_us=1)],
            "links": line("a", "b", bandwidth="100 kbit/s"),
        },
        ["link a - b would carry", "above its limit of 100 kbit/s", "limits.link"],
    ),
}


@pytest.mark.parametrize(("changes", "messages"), INFEASIBLE.values(), ids=INFEASIBLE)
def test_infeasible_says_what_is_missing_where(planner, workspace, tmp_path, changes, messages):
    path = workspace.write(**changes)
    ran = planner("solve", path)
    assert ran.code == 3, ran.err
    for message in messages:
        assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert not (tmp_path / "plan.json").exists()
    ran = planner("solve", path, "--json", "--solver", "cpsat", "--objective", "additive-latency")
    assert ran.code == 3
    document = json.loads(ran.out)
    assert document["status"] == "infeasible"
    assert {"constraint", "subject", "value", "limit", "unit", "message"} <= document["violations"][0].keys()


def test_validate_says_what_cannot_fit(planner, workspace):
    ran = planner("validate", workspace.write(replicas={"minimum": 3}), "--json")
    assert ran.code == 3
    assert json.loads(ran.out)["violations"][0]["constraint"] == "replicas"


def test_no_safe_order_of_steps_is_refused(planner, workspace, tmp_path):
    """Two full nodes that shall swap all they hold, without a slot to spare anywhere."""
    nodes = [node("a", device=16 + 3, rate=5), node("b", device=16)]
    pins = [[{"layer": layer, "expert": 0, "node": name} for layer in range(4)] for name in "ab"]
    planner("solve", workspace.write(nodes=nodes, links=line("a", "b"), pins=pins[0]), "-o", "first.json")
    ran = planner("solve", workspace.write(nodes=nodes, links=line("a", "b"), pins=pins[1]), "--current", "first.json")
    assert ran.code == 4, ran.out
    assert "no safe order of steps" in ran.err
    assert not (tmp_path / "plan.json").exists()
