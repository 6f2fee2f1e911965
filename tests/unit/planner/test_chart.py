import xml.etree.ElementTree as ET

from planner.chart import comparison_svg
from planner.solvers.strategies.ignores import IGNORES

SVG = "{http://www.w3.org/2000/svg}"
ROWS = [
    {"strategy": "uniform", "any_remote_share": 0.5, "predicted_latency_s": 0.2, "bytes_per_token": 2048.0},
    {"strategy": "ours", "any_remote_share": 0.25, "predicted_latency_s": 0.1, "bytes_per_token": 4096.0},
    {"strategy": "a < b & c", "any_remote_share": None, "predicted_latency_s": None, "bytes_per_token": None},
]


def drawn(rows=ROWS, **options):
    return ET.fromstring(comparison_svg(rows, title="held-out tokens & more", **options))  # noqa: S314


def texts(svg):
    return [element.text for element in svg.iter(f"{SVG}text")]


def test_bars_are_as_long_as_their_values():
    bars = [(bar.get("class"), float(bar.get("width"))) for bar in drawn().iter(f"{SVG}rect")]
    assert bars == [
        ("bar", 110.0), ("bar best", 55.0),
        ("bar", 110.0), ("bar best", 55.0),
        ("bar best", 55.0), ("bar", 110.0),
    ]  # fmt: skip


def test_every_value_is_written_with_its_unit_and_what_is_missing_is_a_dash():
    shown = texts(drawn())
    assert {"50 %", "25 %", "200 ms", "100 ms", "2 KiB", "4 KiB"} <= set(shown)
    assert shown.count("–") == 3


def test_names_are_escaped():
    assert {"a < b & c", "held-out tokens & more"} <= set(texts(drawn()))


def test_notes_stand_under_their_strategy_and_are_wrapped():
    rows = [{**ROWS[0], "strategy": name} for name in IGNORES]
    shown = texts(drawn(rows, notes=IGNORES))
    assert max(map(len, shown)) <= 50
    for note in IGNORES.values():
        assert note.split()[:3] in [line.split()[:3] for line in shown]


def test_nothing_to_draw_is_still_a_picture():
    svg = drawn([])
    assert list(svg.iter(f"{SVG}rect")) == []
    zero = [{"strategy": "one", "any_remote_share": 0.0, "predicted_latency_s": 0.0, "bytes_per_token": 0.0}]
    assert [bar.get("width") for bar in drawn(zero).iter(f"{SVG}rect")] == ["0.0"] * 3


def test_everything_is_inside_the_picture():
    svg = drawn(notes=IGNORES)
    width, height = float(svg.get("width")), float(svg.get("height"))
    for bar in svg.iter(f"{SVG}rect"):
        assert float(bar.get("x")) + float(bar.get("width")) <= width
        assert float(bar.get("y")) + float(bar.get("height")) <= height
