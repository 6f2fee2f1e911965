"""A token's way as text, table, picture and page."""

import io
from xml.etree import ElementTree

import pytest
from rich.console import Console

from planner.journey import legs_of
from planner.journey_report import cost_text, leg_table, path_lines, path_table
from planner.page import plan_page
from planner.picture import paths_svg
from schemas.plan import NodeSummary, load_plan, write_plan
from tests.small_plans import all_on, path, plan_through, replicas
from tests.unit.planner.test_journey import told

MOVING, STAYING = told("a", "a", "b", wait_s=0.0), told("b", "b", "b")


def printed(table):
    out = io.StringIO()
    Console(file=out, width=150).print(table)
    return [line.split() for line in out.getvalue().splitlines() if line.strip()]


@pytest.fixture
def plan():
    made = plan_through(replicas(all_on("a", "b")), trunk=[path("a", "a", "b"), path("b", "b", "b")], trunk_stage=1)
    nodes = tuple(NodeSummary(id=node, experts=6, bytes=96, capacity=100, why="because") for node in "ab")
    summary = made.summary.model_copy(update={"paths": (MOVING, STAYING), "nodes": nodes})
    return made.model_copy(update={"summary": summary, "cluster": "a<&b"})


def test_ingresses_with_the_same_way_share_a_line():
    alike = [MOVING, MOVING.model_copy(update={"ingress": "c", "why": "it is near"}), STAYING]
    assert list(path_lines(alike)) == [
        "tokens of a, c: layers 0 on a → 1 on b → back, 12 ms each",
        "tokens of b: every layer where they enter, 22 ms each",
    ]
    lines = list(path_lines(alike, why=True))
    assert lines[1:3] == [f"  a: {cost_text(legs_of(MOVING))}", "  c: it is near"]
    assert cost_text(legs_of(MOVING)) == "12 ms a token: 2 ms of compute, 0 s of waits, 10 ms of hops"


def test_tables_add_up():
    assert printed(leg_table([MOVING]))[2:] == [
        ["a", "0", "a", "0.5", "1", "ms", "0", "s", "5", "ms", "6", "ms"],
        ["a", "1", "b", "0.5", "1", "ms", "0", "s", "5", "ms", "6", "ms"],
    ]
    assert printed(path_table(STAYING))[-1] == ["1", "b", "1", "ms", "10", "ms", "22", "ms"]


def test_a_picture_is_to_scale_and_says_what_each_piece_is():
    root = ElementTree.fromstring(paths_svg([MOVING, STAYING]))  # noqa: S314
    namespace = "{http://www.w3.org/2000/svg}"
    bars = {
        bar.find(f"{namespace}title").text: float(bar.get("width")) for bar in root.iter(f"{namespace}rect") if len(bar)
    }
    assert bars["a, layers 0: 1 ms of compute"] * 20 == pytest.approx(
        bars["b waits 20 ms for experts elsewhere"], rel=0.01
    )
    hops = [hop.find(f"{namespace}title").text for hop in root.iter(f"{namespace}path")]
    assert hops == ["a → b: 5 ms", "b → a: 5 ms"]
    assert ElementTree.fromstring(paths_svg([])).tag == f"{namespace}svg"  # noqa: S314


def test_a_page_has_it_all_and_older_plans_have_one_too(plan):
    page = plan_page(plan)
    for said in (
        "tokens of a: layers 0 on a → 1 on b → back",
        "a: because",
        "<svg",
        "a&lt;&amp;b: epoch 1",
        "Layer by layer",
    ):
        assert said in page
    assert "a<&b" not in page
    older = plan.model_copy(update={"summary": plan.summary.model_copy(update={"paths": None})})
    assert "<svg" not in plan_page(older)


def test_report_and_show_from_the_command_line(planner, plan, tmp_path):
    write_plan(tmp_path / "p.json", plan)
    assert planner("report", "p.json", "-o", "p.html").code == 0
    assert (tmp_path / "p.html").read_text() == plan_page(load_plan(tmp_path / "p.json"))
    assert planner("report", "p.json", "-o", "nowhere/p.html").code == 2
    assert "tokens of a: layers 0 on a → 1 on b → back, 12 ms each" in planner("show", "p.json").out
    assert "a token of a, layer by layer" in planner("show", "p.json", "-v").out
    assert "switch to epoch 1, tokens take their new paths" in planner("show", "p.json", "-vv").out
