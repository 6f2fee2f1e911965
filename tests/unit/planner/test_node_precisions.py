"""Precisions of nodes: what experts take, what they cost, what is chosen, and what is said where that cannot be."""

import json
import math
import re

import numpy as np
import pytest

from planner.capacity import find_room
from planner.inputs import load_inputs
from planner.objective import nearest
from planner.precision import PrecisionCosts, expected_rise, left_of
from planner.problem import build_problem
from planner.propose import Request, solve_briefly
from planner.solvers.base import SolveLimits
from schemas.calibration import Calibration, PrecisionCost, Setting, Situation
from schemas.checkpoint import read_checkpoint
from schemas.plan import load_plan
from schemas.sizes import sizes_of_checkpoint, sizes_of_spec
from tests.cluster import MODEL
from tests.planning import EXPERT_BYTES, SIZES, line, model_spec, node, random_events, topology_of

FITTING = model_spec(layers=4, experts=8, hidden_size=32, expert_bytes=3 * 32 * 32 * 4)  # D = F = 32, float32
KEPT = sizes_of_spec(FITTING)


def calibration(model, *, int8=2e-4, int4=4e-3):
    """Costs of one row, alike in every layer."""
    setting = Setting(
        budget=0.01, shares=(0.1,) * model.layers, nll=(0.0,) * model.layers, nll_per_mass=(0.0,) * model.layers,
        rise=0.0, low=0.0, high=0.0, divergence=0.0, waits_share=1.0,
    )  # fmt: skip
    costs = tuple(
        PrecisionCost(precision=low, rise=0, low=0, high=0, divergence=0, nll_per_row=(nll,) * model.layers)
        for low, nll in (("int8", int8), ("int4", int4))
    )
    return Calibration(
        model=model.id, layers=model.layers, experts=model.experts, top_k=model.top_k, tokens=1, pieces=8, warmup=0,
        situation=Situation(capacity=1, eviction="lru"), settings=(setting,), precisions=costs,
    )  # fmt: skip


@pytest.fixture
def shop(workspace):
    """Three nodes with room for 1.2 × all experts; and what precisions cost."""
    workspace.model = FITTING
    nodes = []
    for name, share in zip("abc", (0.5, 0.4, 0.3), strict=True):
        memory = {"device": int(share * 32 * FITTING.expert_bytes), "host": 0, "disk": 0}
        nodes.append({**node(name, rate=10), "memory": memory})
    workspace.document["nodes"] = nodes
    (workspace.folder / "c.json").write_text(calibration(FITTING).model_dump_json())
    workspace.document["quality"] = {"budget": "1 %", "calibration": "c.json"}
    return workspace


@pytest.mark.parametrize("dtype", ["checkpoint", "float32"])
def test_experts_are_as_large_as_their_records(dtype):
    from runtime.models import open_model
    from runtime.precision import packed_layout

    checkpoint = read_checkpoint(MODEL)
    layout = open_model(MODEL, dtype).layout
    want = {"checkpoint": layout.bytes, **{low: packed_layout(layout, low).bytes for low in ("int8", "int4")}}
    assert sizes_of_checkpoint(checkpoint, dtype) == want == sizes_of_spec(checkpoint.model_spec.held_as(dtype))


def test_precisions_that_do_not_fit_a_model_have_no_size():
    odd = model_spec(hidden_size=24, expert_bytes=3 * 24 * 32 * 4)
    assert sizes_of_spec(odd) == {"checkpoint": 9216, "int8": 3 * 24 * 32 + 4 * (64 + 24)}


def test_room_is_counted_in_each_node_s_own_bytes():
    nodes = [
        {**node("a", device=10, host=2, rate=1), "precision": "int8"},
        {**node("b", device=10, disk=5), "precision": "int4"},
        node("c", device=10),
    ]
    topology = topology_of(nodes, line("a", "b", "c"))
    assert find_room(topology, model_spec(), SIZES).record_bytes.tolist() == [
        [53, 53, 100], [31, 31, 100], [100, 100, 100],
    ]  # fmt: skip
    problem = build_problem(
        topology, model_spec(), [random_events(np.random.default_rng(0), model_spec())], sizes=SIZES
    )
    assert problem.slots.tolist() == [1000 // 53, 200 // 53, 1000 // 31, 500 // 100, 1000 // 100]
    assert problem.expert_bytes == EXPERT_BYTES


def test_loss_adds_up_over_the_calls_that_are_computed_in_low_precision():
    nodes = [node("a", device=4, rate=1), {**node("b", device=8, rate=1), "precision": "int8"}]
    model = model_spec(layers=2, experts=4, top_k=2)
    events = [random_events(np.random.default_rng(seed), model) for seed in (1, 2)]
    problem = build_problem(topology_of(nodes, line("a", "b")), model, events, sizes=SIZES)
    placed = np.zeros((2, 2, 4), dtype=bool)
    placed[0, 0], placed[1] = True, True  # a has layer 0, b both
    costs = PrecisionCosts({"checkpoint": np.zeros(2), "int8": np.array([1e-3, 3e-3])})
    rise = expected_rise(problem, nearest(problem, placed, "latency"), ("checkpoint", "int8"), costs)
    assert rise == pytest.approx([math.expm1(2 * 3e-3), math.expm1(2 * (1e-3 + 3e-3))])
    assert expected_rise(problem, nearest(problem, placed, "latency"), ("checkpoint", "int4"), costs) is None
    assert left_of(0.01, 0.02) == 0


def test_precisions_are_chosen_within_the_budget(planner, shop, tmp_path):
    ran = planner("solve", shop.write(), "--precision", "auto", "-o", "plan.json", "--time-limit", "6")
    assert ran.code == 0, ran.err
    plan = load_plan(tmp_path / "plan.json")
    told = plan.summary.precision
    assert 0 < told.rise <= told.budget == 0.01
    assert told.considered >= 3
    assert plan.summary.predicted_latency_s < told.exact_latency_s
    assert plan.quality_budget == pytest.approx(1.01 / (1 + told.rise) - 1)
    for held, said in zip(plan.precisions, plan.summary.nodes, strict=True):
        assert (held.node, held.precision, held.expert_bytes) == (said.id, said.precision, KEPT[held.precision])
        assert said.bytes == said.experts * held.expert_bytes <= said.capacity
    assert "of perplexity at most, of a budget of 1 %" in ran.out
    shown = planner("show", "-v", "plan.json").out
    assert "a: in int8 room for" in shown
    again = planner("solve", shop.write(), "--precision", "auto", "-o", "again.json", "--current", "plan.json",
                    "--time-limit", "6")  # fmt: skip
    assert "nothing changes" in again.out, (again.out, again.err)
    for command in (("explain", "plan.json"), ("simulate", "plan.json", "--tokens", "200")):
        assert planner(*command).code == 0


def test_a_budget_too_small_for_all_leaves_some_nodes_exact(planner, shop, tmp_path):
    """Tokens that find everything in int8 lose .16 %; those that call a node in int8 now and then lose less."""
    del shop.document["nodes"][2]["ingress"]
    for each, share in zip(shop.document["nodes"], (0.6, 0.5, 0.1), strict=True):
        each["memory"]["device"] = int(share * 32 * FITTING.expert_bytes)
    shop.document["links"] = line("a", "c", "b")
    options = ("--precision", "auto", "-o", "plan.json", "--quality-budget", "0.1 %", "--time-limit", "6")
    ran = planner("solve", shop.write(), *options)
    assert ran.code == 0, ran.err
    plan = load_plan(tmp_path / "plan.json")
    assert 0 < plan.summary.precision.rise <= 0.001
    assert [each.precision for each in plan.precisions] == ["checkpoint", "checkpoint", "int8"]
    assert re.search(r"of a budget of 0.1 % \(400 µs would cost \+0.16\d* %\)", ran.out)


def test_what_the_topology_says_is_kept(planner, shop, tmp_path):
    shop.document["nodes"][0]["precision"] = "checkpoint"
    shop.document["nodes"][1]["precision"] = "int4"
    ran = planner("solve", shop.write(), "--precision", "int8", "-o", "plan.json", "--quality-budget", "5 %")
    assert ran.code == 0, ran.err
    plan = load_plan(tmp_path / "plan.json")
    assert [each.precision for each in plan.precisions] == ["checkpoint", "int4", "int8"]
    assert plan.summary.precision.considered == 0
    assert "that raises perplexity by" in ran.out


def test_a_topology_that_says_nothing_makes_plans_as_before(planner, shop, tmp_path):
    assert planner("solve", shop.write(quality={}), "-o", "plan.json").code == 0
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.precisions, plan.summary.precision) == (None, None)
    document = json.loads((tmp_path / "plan.json").read_text())
    del document["precisions"], document["summary"]["precision"]
    for each in document["summary"]["nodes"]:
        del each["precision"]
    (tmp_path / "plan.json").write_text(json.dumps(document))  # as older versions wrote it
    assert load_plan(tmp_path / "plan.json").digest == plan.digest


@pytest.mark.parametrize(
    ("quality", "options", "code", "told"),
    [
        ({}, ("--precision", "auto"), 2, "no budget of quality to keep; give --quality-budget '1 %'"),
        ({"budget": "1 %"}, ("--precision", "auto"), 2, "what int8 and int4 cost is not known; give --calibration"),
        ({"budget": "1 %", "calibration": "x.json"}, (), 2, "quality.calibration: there is no file"),
        ({"budget": "1 %", "calibration": "other.json"}, (), 2, "is of tiny, 2 layers × 4 experts, top-2; tiny has 4"),
        ({"budget": "0.1 %", "calibration": "c.json"}, ("--precision", "int4"), 3, "above the budget of 0.1 %"),
        ({"budget": "1 %", "calibration": "c.json"}, ("--precision", "int3"), 2, "'int3' is not one of"),
    ],
)
def test_what_cannot_be_is_told(planner, shop, quality, options, code, told):
    (shop.folder / "other.json").write_text(calibration(model_spec()).model_dump_json())
    ran = planner("solve", shop.write(quality=quality), *options)
    assert ran.code == code
    assert told in ran.err, ran.err


def test_a_precision_that_does_not_fit_the_model_is_an_invalid_topology(planner, workspace):
    workspace.document["nodes"][1]["precision"] = "int4"
    ran = planner("validate", workspace.write())
    assert ran.code == 2
    assert "nodes[1].precision: int4 does not fit this model" in ran.err


def test_unknown_cost_is_a_warning(planner, shop):
    ran = planner("solve", shop.write(quality={}), "--precision", "int8")
    assert ran.code == 0
    assert "warning: what experts in int8 cost in quality is not known" in ran.err
    assert "what that costs in quality is not known" in ran.out


def test_what_nodes_hold_under_the_plan_in_force_is_kept_and_anything_else_is_told(planner, shop, tmp_path):
    assert planner("solve", shop.write(), "--precision", "int8", "-o", "plan.json").code == 0
    for options in ((), ("--precision", "auto", "--time-limit", "5")):
        ran = planner("solve", shop.write(), "--current", "plan.json", "-o", "next.json", *options)
        assert ran.code == 0, ran.err
        assert {each.precision for each in load_plan(tmp_path / "next.json").precisions} == {"int8"}
    ran = planner("solve", shop.write(), "--precision", "checkpoint", "--current", "plan.json")
    assert ran.code == 2
    assert "node a holds experts in int8 under the current plan and is asked to hold them in checkpoint" in ran.err


def test_an_option_s_precision_that_does_not_fit_the_model_is_told(planner, workspace):
    ran = planner("solve", workspace.write(), "--precision", "int4")
    assert ran.code == 2
    assert "int4 does not fit this model" in ran.err


def test_a_plan_in_precisions_that_do_not_fit_another_model_is_of_another_model(planner, shop):
    assert planner("solve", shop.write(), "--precision", "int4", "--quality-budget", "5 %", "-o", "plan.json").code == 0
    shop.model = model_spec(layers=4, experts=8)  # int4 does not fit it
    shop.write(quality={"budget": "1 %", "calibration": "c.json"})
    auto = ("--precision", "auto")
    for command in (("explain", "plan.json"), ("simulate", "plan.json"),
                    ("solve", "topology.yaml", "--current", "plan.json"),
                    ("solve", "topology.yaml", "--current", "plan.json", *auto)):  # fmt: skip
        ran = planner(*command)
        assert ran.code in {0, 2, 4}, (command, ran.err)
        assert "Traceback" not in ran.err
        assert command[0] != "solve" or "model" in ran.err


def test_what_has_room_only_beyond_the_budget_is_told(planner, shop):
    for each in shop.document["nodes"]:
        each["memory"]["device"] //= 2  # .6 of all experts
    ran = planner("solve", shop.write(), "--precision", "auto", "--quality-budget", "0.01 %", "--time-limit", "4")
    assert ran.code == 3
    assert re.search(r"all experts have room in precisions that raise perplexity by 0.\d+ % or more, above the budget "
                     r"of 0.01 %", ran.err), ran.err  # fmt: skip


def test_what_was_not_tried_is_not_said_to_have_no_room(planner, shop):
    assert planner("solve", shop.write(), "--precision", "int8", "-o", "plan.json").code == 0
    ran = planner("solve", shop.write(), "--current", "plan.json", "--precision", "auto", "--time-limit", "4")
    assert ran.code == 0, ran.err
    assert "does not fit" not in ran.out


def test_what_no_solver_has_the_time_for_is_not_taken_for_what_has_no_room(planner, shop):
    """Found on the quickstart: experts had room everywhere, and were said to have none."""
    problem = load_inputs(shop.write()).problem()
    limits = SolveLimits(time_s=1e-4)
    assert solve_briefly(Request(solver="cpsat", limits=limits), problem, limits).placed.any()
    ran = planner("solve", "topology.yaml", "--precision", "auto", "--time-limit", "0.001", "-o", "plan.json")
    assert ran.code == 0, ran.err
    assert "keeps as many bits as it may: the time was over before another way was tried; give more" in ran.out


def test_queues_are_counted_with_chosen_precisions_too(planner, shop):
    for each in shop.document["nodes"]:
        each["ingress"]["tokens_per_s"] = 600
    options = ("--precision", "auto", "--queueing", "--time-limit", "4", "-o", "plan.json")
    ran = planner("solve", shop.write(), *options)
    assert ran.code == 0, ran.err
    summary = load_plan(shop.folder / "plan.json").summary
    assert summary.predicted_latency_s == pytest.approx(summary.queued_latency_s), "what was solved for"
