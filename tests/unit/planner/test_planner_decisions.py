"""What follows a solve on the command line: moving or staying, prices, comparisons, explanations, replanning."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from planner.demand import share_error, tokens_for
from schemas.plan import load_plan
from tests.planning import EXPERT_BYTES, line, node, write_trace

QUICK = ("--objective", "additive-latency")


@pytest.fixture
def moved(planner, workspace, tmp_path):
    """Solves from a uniform placement with more options; returns what ran and the two plans."""
    path = workspace.write()
    assert planner("solve", path, "-o", "first.json", "--solver", "uniform").code == 0

    def run(*arguments):
        ran = planner("solve", path, "-o", "second.json", "--current", "first.json", *QUICK, *arguments)
        assert ran.code == 0, ran.err
        return ran, load_plan(tmp_path / "first.json"), load_plan(tmp_path / "second.json")

    return run


def test_a_long_horizon_moves_and_says_what_it_takes(moved):
    ran, _, plan = moved("--horizon", "1 h")
    found = plan.summary.movement
    assert found.moved
    assert found.benefit_per_s * 3600 > found.transfer_s
    assert 0 < found.makespan_s <= found.transfer_s
    assert found.sources >= 2
    assert "moves" in ran.out
    assert all(step.source for step in plan.steps if step.action == "replicate")


def test_a_short_horizon_stays_and_says_why(moved):
    ran, first, plan = moved("--horizon", "1 ms")
    assert plan.summary.movement.moved is False
    assert plan.steps == ()
    assert plan.placement == first.placement
    assert "stays: saves" in ran.out


def test_without_a_horizon_it_says_when_moving_pays(moved):
    ran, _, _ = moved()
    assert "pays after" in ran.out


@pytest.mark.parametrize("experts", [0, 3])
def test_a_cap_on_bytes_is_kept(moved, experts):
    _, first, plan = moved("--max-move", f"{experts * EXPERT_BYTES} B")
    had = {(replica.key, replica.node) for replica in first.placement}
    fresh = {(replica.key, replica.node) for replica in plan.placement} - had
    assert len(fresh) <= experts
    assert plan.summary.objective <= first.summary.objective or plan.summary.objective_name != "latency"
    assert plan.summary.bound <= plan.summary.objective


def test_a_gap_out_of_reach_still_writes_the_plan(planner, workspace, tmp_path):
    path = workspace.write()
    ran = planner("solve", path, "--solver", "dancemoe", "--gap", "0.001")
    assert ran.code == 1
    assert "no bound after" in ran.err
    assert load_plan(tmp_path / "plan.json").summary.gap is None
    assert planner("solve", path, "--solver", "milp", "--gap", "0.5", *QUICK).code == 0


def test_survival_is_priced(planner, workspace):
    path = workspace.write(
        nodes=[node("a", device=60, rate=20), node("b", device=40, rate=10), node("c", device=40, rate=5)],
        replicas={"survive": 1},
    )
    ran = planner("solve", path, "--json", *QUICK)
    assert ran.code == 0, ran.err
    survival = json.loads(ran.out)["survival"]
    assert (survival["losses"], survival["replicas"]) == (1, 2)
    assert survival["extra_latency_s"] >= 0


def test_expected_use_of_nodes_and_links_is_told(planner, workspace):
    ran = planner("solve", workspace.write(), "--json", *QUICK)
    document = json.loads(ran.out)
    assert all(0 <= entry["utilisation"] < 1 for entry in document["nodes"])
    assert [link["between"] for link in document["links"]] == [["a", "b"], ["b", "c"]]
    assert any(link["bytes_per_s"] > 0 for link in document["links"])


def test_compare_plots_simulates_and_says_what_is_ignored(planner, workspace, tmp_path):
    ran = planner(
        "compare",
        workspace.write(),
        "--strategies",
        "uniform,eplb,milp",
        "--simulate",
        "--plot",
        "c.svg",
        "--json",
        *QUICK,
    )
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["strategies"]
    assert all(0 < row["simulated_mean_s"] <= row["simulated_p95_s"] for row in rows)
    assert [bool(row["ignores"]) for row in rows] == [True, True, False]
    assert rows[2]["gap"] <= 1e-4
    assert (tmp_path / "c.svg").read_text().startswith("<svg")
    text = planner("compare", workspace.write(), "--strategies", "uniform", *QUICK)
    assert "uniform: ignores demand" in text.out
    assert planner("compare", workspace.write(), "--plot", "c.png").code == 2


def test_compare_lists_pipelines_and_ours_with_and_without_a_moving_trunk(planner, workspace):
    ran = planner(
        "compare", workspace.write(), "--strategies", "dancemoe,pipeline,auto", "--trunk", "both", "--json", *QUICK,
        "--time-limit", "4",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = {row["strategy"]: row for row in json.loads(ran.out)["strategies"]}
    assert list(rows) == ["dancemoe", "pipeline", "auto --trunk stay", "auto --trunk move"]
    assert [rows[name]["hops_per_token"] == 0 for name in rows][:3] == [True, False, True]
    assert rows["pipeline"]["wait_s"] < rows["dancemoe"]["wait_s"] < rows["dancemoe"]["predicted_latency_s"]
    best = min(rows[name]["predicted_latency_s"] for name in ("pipeline", "auto --trunk stay"))
    assert rows["auto --trunk move"]["predicted_latency_s"] <= 1.05 * best  # judged on other events than it placed by


def test_simulate_is_wired_in(planner, workspace):
    planner("solve", workspace.write(), *QUICK)
    ran = planner("simulate", "plan.json", "--tokens", "500", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["latency"]["p95_s"] > 0


def test_explain_takes_a_plan_as_it_is(planner, workspace, tmp_path):
    path = workspace.write()
    assert planner("solve", path, "--solver", "uniform").code == 0
    plan = load_plan(tmp_path / "plan.json")
    ran = planner("explain", tmp_path / "plan.json", "--topology", path, *QUICK, "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert all(node["price_ms_per_mib"] is None for node in document["nodes"])
    assert [node["used_bytes"] for node in document["nodes"]] == [node.bytes for node in plan.summary.nodes]
    layers = [layer["node"] for path in document["paths"] for layer in path["layers"]]
    assert layers == [name for name in ("a", "b", "c") for _ in range(4)]
    best = json.loads(planner("solve", path, *QUICK, "--json").out)["predicted_latency_s"]
    gained = plan.summary.predicted_latency_s - best
    assert min(item["checked_s"] for item in document["what_ifs"]) > 0.9 * gained
    assert planner("explain", path, "--topology", path).code == 2
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace("test", "another", 1))
    assert planner("explain", tmp_path / "plan.json", "--topology", other).code == 2


def test_explain_prices_memory_and_checks_what_ifs(planner, workspace):
    ran = planner("explain", workspace.write(), *QUICK, "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert [entry["id"] for entry in document["nodes"]] == ["a", "b", "c"]
    assert all(entry["binds"] == ["memory"] for entry in document["nodes"])
    memory = [item for item in document["what_ifs"] if "more experts" in item["change"]]
    links = [item for item in document["what_ifs"] if "twice as fast" in item["change"]]
    assert (len(memory), len(links)) == (3, 2)
    for item in memory:
        assert -1e-9 <= item["checked_s"] <= item["estimate_s"] * (1 + 1e-6) + 1e-9
    for item in links:
        assert item["checked_s"] >= item["estimate_s"] - 1e-9
    assert "ms per MiB" in planner("explain", workspace.write(), *QUICK).out


# --- replan: through the command line, as an operator runs it ------------------------------------------------------


def repeated(path, target, order):
    """A trace made of texts of another, in any order, so that it is long enough to judge."""
    arrays = load_file(path)
    rng = np.random.default_rng(order)
    starts = rng.integers(0, len(arrays["sequence"]) - 4, 600)
    rows = (starts[:, None] + np.arange(4)).ravel()
    return {name: np.ascontiguousarray(array[rows]) for name, array in arrays.items()}


@pytest.fixture
def streams(workspace, tmp_path):
    """Writes newer traces: of the same workloads, or with those of a and c exchanged from some share on."""

    def write(shift_at):
        sources = {name: [name, {"a": "c", "c": "a"}.get(name, name)] for name in "abc"}
        for order, (name, (first, second)) in enumerate(sources.items()):
            parts = [repeated(tmp_path / f"{source}.safetensors", None, order) for source in (first, second)]
            total = len(parts[0]["sequence"])
            cut = int(total * shift_at)
            joined = {key: np.concatenate([parts[0][key][:cut], parts[1][key][cut:]]) for key in parts[0]}
            header = {
                "format": "expertmesh-trace-1", "model": "tiny", "workload": name, "created": "2026-01-02",
                "layers": "4", "experts": "8", "top_k": "2",
            }  # fmt: skip
            save_file(joined, tmp_path / f"new-{name}.safetensors", metadata=header)
        return [item for name in "abc" for item in ("--trace", f"new-{name}.safetensors")]

    return write


def replanned(planner, workspace, traces, *arguments):
    path = workspace.write()
    assert planner("solve", path, "-o", "first.json", *QUICK).code == 0
    ran = planner("replan", path, "--current", "first.json", *traces, "--solver", "dancemoe", "--json", *arguments)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_the_same_workload_stays(planner, workspace, streams):
    document = replanned(planner, workspace, streams(1.0), "--batch", "64")
    assert document["move"] is False
    assert document["plan"] is None


def test_a_shift_moves_once_and_writes_a_plan(planner, workspace, streams, tmp_path):
    document = replanned(planner, workspace, streams(0.4), "--batch", "64", "-o", "next.json")
    assert sum(look["move"] for look in document["looks"]) == 1
    plan = load_plan(tmp_path / "next.json")
    assert plan.base_epoch == 1
    assert plan.summary.movement.moved


def test_replan_refuses_what_does_not_belong(planner, workspace, tmp_path):
    path = workspace.write()
    planner("solve", path, "-o", "first.json", *QUICK)
    write_trace(tmp_path / "other.safetensors", workspace.model, workload="elsewhere")
    assert planner("replan", path, "--current", "first.json", "--trace", "other.safetensors").code == 2
    ran = planner("replan", workspace.write(cluster="other"), "--current", "first.json", "--trace", "a.safetensors")
    assert ran.code == 2
    assert "another cluster" in ran.err


# --- bad input -----------------------------------------------------------------------------------------------------


def test_short_traces_are_warned_of_with_the_tokens_they_need(planner, workspace, tmp_path):
    ran = planner("validate", workspace.write())
    assert ran.code == 0
    assert f"±25% needs {tokens_for(0.25, 0.25)} tokens" in ran.err
    write_trace(tmp_path / "a.safetensors", workspace.model, workload="a", tokens=3)
    ran = planner("solve", workspace.write())
    assert ran.code == 2
    assert "3 tokens, too few to plan by: 4 are the least" in ran.err
    assert not (tmp_path / "plan.json").exists()


def test_tokens_for_an_error_are_enough():
    for share in (0.03, 0.25):
        assert share_error(tokens_for(0.1, share), share) <= 0.1 < share_error(tokens_for(0.1, share) - 1, share)


def test_one_node_has_everything_or_is_infeasible(planner, workspace, tmp_path):
    ran = planner("solve", workspace.write(nodes=[node("a", device=40, rate=5)], links=[]))
    assert ran.code == 0, ran.err
    plan = load_plan(tmp_path / "plan.json")
    assert plan.summary.objective == pytest.approx(5 * 4 * 2 * 50e-6)  # compute alone
    assert (plan.summary.any_remote_share, plan.summary.gap) == (0, 0)
    ran = planner("solve", workspace.write(nodes=[node("a", device=20, rate=5)], links=[]))
    assert ran.code == 3
    assert "missing" in ran.err


def test_a_link_declared_in_both_directions_or_not_at_all_is_told(planner, workspace):
    twice = [*line("a", "b", "c"), {"between": ["b", "a"], "latency": "9 ms", "bandwidth": "1 Mbit/s"}]
    ran = planner("solve", workspace.write(links=twice))
    assert ran.code == 2
    assert "declared twice" in ran.err
    ran = planner("solve", workspace.write(links=[]))
    assert ran.code == 2
    assert "no path between" in ran.err


@pytest.mark.parametrize("rate", [".nan", "-1", '"many"'])
def test_rates_that_are_no_rates_are_refused(planner, workspace, rate):
    path = workspace.write()
    path.write_text(path.read_text().replace('"tokens_per_s": 20', f'"tokens_per_s": {rate}'))
    ran = planner("solve", path)
    assert ran.code == 2
    assert "tokens_per_s" in ran.err


def test_a_quality_budget_is_planned_with_and_carried(planner, workspace, tmp_path):
    path = workspace.write(quality={"budget": "0.5 %"})
    found = planner("solve", path, "-o", tmp_path / "plan.json", "--time-limit", "0.5")
    assert found.code == 0, found.err
    plan = load_plan(tmp_path / "plan.json")
    assert plan.quality_budget == 0.005
    share = plan.summary.spared_any_remote_share
    assert share is not None
    assert share <= plan.summary.any_remote_share + 1e-9
    assert "while agents spend the quality budget of 0.5 %" in found.out
