"""What tokens met at a node, beside what the plan expects."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from planner.control.report import status_view
from planner.control.state import ClusterState
from planner.control.status import AgentView, node_status, plan_status, promises_in_force
from planner.journey import Promise
from schemas import messages as msg
from schemas.topology import Memory
from tests.small_plans import LAYOUT, MODEL, all_on, path, plan_through, replicas
from tests.unit.planner.test_journey import told


def view(node, **served):
    ends = msg.Endpoints(address="127.0.0.1", expert=1, weights=2, client=3, session=4)
    memory, none = msg.TierBytes(), msg.TierCounts()
    hello = msg.Hello(
        node=node, incarnation="i", model=MODEL, dtype=LAYOUT.dtype, endpoints=ends, memory=memory, has_store=True,
        standing=msg.Standing(),
    )  # fmt: skip
    beat = msg.Heartbeat(
        node=node, incarnation="i", progress=1, standing=msg.Standing(active=1), held=none, used=memory,
        served=msg.Served(**served),
    )  # fmt: skip
    return AgentView(hello, beat, heard_at=0.0, progressed_at=0.0)


def test_layers_are_shown_with_what_they_met_and_where_the_time_went():
    layers = (
        msg.LayerUse(tokens=9, device_rows=12, remote_rows=6, calls=5, local_s=0.5, wait_s=0.25),
        msg.LayerUse(tokens=9, device_rows=9, disk_rows=9, loads=8, load_bytes=8 << 20, local_s=1.5, load_wait_s=1.0),
    )
    none = msg.PlanStatus(digest="", phase="idle", epoch=0, target=0, moved=0, to_move=0)
    used = msg.NodeLayers(node="a", tokens=9, trunk_s=2.0, layers=layers)
    report = msg.StatusReport(cluster="c", epoch=0, plan=none, nodes=(), layers=(used,))
    out = io.StringIO()
    Console(file=out, width=160).print(status_view(report))
    head, first, second, times = (line.split() for line in out.getvalue().splitlines()[-4:])
    assert " ".join(head) == "layers at a tokens device disk remote calls loads bytes experts for loads for others for"
    assert first[:7] == ["0", "9", "66.7%", "0.0%", "33.3%", "5", "0"]
    assert second[:9] == ["1", "9", "50.0%", "50.0%", "0.0%", "0", "8", "8", "MiB"]
    assert " ".join(times) == "time of 9 tokens: trunk 2 s, resident experts 1 s, loads 1 s, other nodes 250 ms"


@pytest.fixture
def state():
    plan = plan_through(replicas(all_on("a")), trunk=[path("a", "a", "b")])
    summary = plan.summary.model_copy(update={"paths": (told("a", "a", "b"),)})
    return ClusterState(cluster="c", epoch=1, committed_plan=plan.model_copy(update={"summary": summary}))


def test_counts_per_token_stand_beside_the_plans(state):
    counted = {"tokens": 40, "step_tokens": 40, "hops": 30, "calls": 20, "call_wait_s": 0.8}
    views = {"a": view("a", **counted, events=80, remote_events=20), "b": view("b")}
    expected = promises_in_force(state, views)
    rows = [node_status(node, Memory(), views.get(node), now=0.1, promise=expected.get(node)) for node in "abc"]
    assert (rows[0].hops_per_token, rows[0].calls_per_token) == (0.75, 0.5)
    assert rows[0].call_wait_per_token_s == pytest.approx(0.02)
    assert [row.any_remote_share for row in rows] == [0.25, None, None]
    assert [row.planned_hops_per_token for row in rows] == [1.0, 1.0, None]
    assert (rows[1].hops_per_token, rows[2].hops_per_token) == (None, None)
    report = msg.StatusReport(cluster="c", epoch=1, plan=plan_status(state, views, preparing_s=None), nodes=tuple(rows))
    out = io.StringIO()
    Console(file=out, width=150).print(status_view(report))
    assert out.getvalue().splitlines()[-1].split() == ["a", "0.75", "1.00", "0.50", "0.50", "20", "ms", "10", "ms"]


def test_what_was_counted_under_an_older_epoch_is_left_out():
    before = view("a", tokens=10, step_tokens=10, hops=0, calls=50).from_now()
    assert node_status("a", Memory(), before, now=0.1).calls_per_token is None
    now = replace(before, heartbeat=view("a", tokens=30, step_tokens=30, hops=20, calls=60).heartbeat)
    row = node_status("a", Memory(), now, now=0.1)
    assert (row.hops_per_token, row.calls_per_token, row.tokens) == (1.0, 0.5, 30)


def test_a_plan_promises_nothing_before_its_paths_are_in_force(state):
    assert promises_in_force(state.model_copy(update={"trunk": (path("a", "a", "a"),)}), {}) == {}
    assert promises_in_force(ClusterState(cluster="c"), {}) == {}
    assert promises_in_force(state, {})["a"] == Promise(1.0, 0.5, pytest.approx(0.01))


def test_a_node_says_why_it_spends_no_quality():
    use = msg.QualityUse(
        budget=0.005, standing="misplaced", rise=0.0, lost_mass=0.0, events=0, spared_events=0, divergence=None,
        note="the calibration is of another placement",
    )  # fmt: skip
    row = node_status("a", Memory(), view("a", quality=use), now=0.1)
    plan = msg.PlanStatus(digest="", phase="idle", epoch=0, target=0, moved=0, to_move=0)
    out = io.StringIO()
    Console(file=out, width=150).print(status_view(msg.StatusReport(cluster="c", epoch=0, plan=plan, nodes=(row,))))
    assert "a: the calibration is of another placement" in out.getvalue()
