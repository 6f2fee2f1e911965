"""What several nodes noted, on one clock."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.clocks import clocks, processes
from schemas.tracing import TracePart

NODES = ("a", "b", "c", "d")
seconds = st.floats(-1e4, 1e4)


@settings(max_examples=100, deadline=None)
@given(
    ahead=st.lists(seconds, min_size=4, max_size=4),
    messages=st.lists(
        st.tuples(st.sampled_from(NODES), st.sampled_from(NODES), st.floats(0, 5), st.floats(0, 100)), max_size=20
    ),
)
def test_a_clock_is_within_what_is_said_not_to_be_known(ahead, messages):
    true = {node: each - ahead[0] for node, each in zip(NODES, ahead, strict=True)}
    sent, heard = {}, {}
    for number, (begin, end, delay, at) in enumerate(messages):
        if begin != end:
            sent[begin, end, str(number)] = at + true[begin]
            heard[begin, end, str(number)] = at + delay + true[end]
    found = clocks(NODES, sent, heard)
    assert found["a"].ahead_s == 0
    for node, clock in found.items():
        if clock.error_s is not None:
            assert abs(clock.ahead_s - true[node]) <= clock.error_s + 1e-6
            assert clock.error_s <= sum(delay for _, _, delay, _ in messages)


def test_a_ring_that_goes_one_way_is_enough():
    """a → b → c → a, 10 ms each: nobody answers whom it hears, and the middle is right within the ring's time."""
    true = {"a": 0.0, "b": 7.0, "c": -3.0}
    hops = [("a", "b", 1.00), ("b", "c", 1.01), ("c", "a", 1.02)]
    sent = {(x, y, "m"): at + true[x] for x, y, at in hops}
    heard = {(x, y, "m"): at + 0.01 + true[y] for x, y, at in hops}
    found = clocks(("a", "b", "c"), sent, heard)
    for node, clock in found.items():
        assert clock.ahead_s == pytest.approx(true[node], abs=0.0150001)
        assert clock.error_s == pytest.approx(0.0 if node == "a" else 0.015)


def test_spans_of_all_nodes_stand_side_by_side():
    there = TracePart(
        node="b",
        session="1",
        spans=(("steps", "1 tokens", 107.012, 107.018, {"rows": 2.0}),),
        hops=(("a", "hidden states 4 for segment 1", 107.010, False), ("a", "token 5", 107.018, True)),
    )
    here = TracePart(
        node="a",
        session="1",
        spans=(("steps", "1 tokens", 7.0, 7.005, {}),),
        hops=(("b", "hidden states 4 for segment 1", 7.005, True), ("b", "token 5", 7.023, False)),
    )
    first, second = processes([there, here, TracePart(node="c", session="1", is_silent=True)], "a")
    assert (first.name, first.ahead_s) == ("a", 0.0)
    assert second.name == "b (clock ± 5.00 ms)"
    assert second.ahead_s == pytest.approx(100.0)
    (hop,) = [span for span in second.spans if span.track == "hops"]
    assert hop.name == "from a: hidden states 4 for segment 1"
    assert hop.ended - hop.began == pytest.approx(0.005)
    assert [span.name for span in first.spans if span.track == "hops"] == ["from b: token 5"]


def test_a_node_that_nobody_heard_is_shown_as_unsure():
    lonely = TracePart(node="b", session="1", spans=(("steps", "x", 1.0, 2.0, {}),))
    assert [process.name for process in processes([TracePart(node="a", session="1"), lonely], "a")] == [
        "a",
        "b (clock unsure)",
    ]
    assert processes([], "a") == []
