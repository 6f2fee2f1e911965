"""What a node notes of a traced request, and that it is bounded."""

from contextlib import nullcontext

from agent.tracing import MOST_SESSIONS, Traces
from runtime.timeline import recorder
from schemas.sessions import StepHeader
from schemas.tracing import MOST

ONE, OTHER = "1" * 32, "2" * 32


def step(position, **changes):
    return StepHeader(ONE, 1, position, 1, "hidden", 8, **changes)


def test_only_what_is_traced_is_noted():
    traces = Traces("a")
    assert isinstance(traces.recorded([ONE]), nullcontext)
    traces.begin(ONE, "owner")
    traces.step_sent("b", step(3))
    traces.step_sent("a", step(4))  # to itself
    traces.sent(OTHER, "b", "opened")
    with traces.recorded([OTHER]):
        assert recorder() is None
    with traces.recorded([ONE, OTHER]):
        recorder().add("steps", "1 tokens", 1.0, 2.0, rows=4, ahead=True)
    assert recorder() is None
    assert traces.end(ONE, "somebody else", most_bytes=1 << 18) == []
    (part,) = traces.end(ONE, "owner", most_bytes=1 << 18)
    assert part.is_last
    assert part.spans == (("steps", "1 tokens", 1.0, 2.0, {"rows": 4.0, "ahead": 1.0}),)
    assert [hop[:2] for hop in part.hops] == [("b", "hidden states 3 for segment 1")]
    assert traces.end(ONE, "owner", most_bytes=1 << 18) == []


def test_a_batch_is_noted_for_each_of_its_sessions():
    traces = Traces("a")
    for session in (ONE, OTHER):
        traces.begin(session, "owner")
    with traces.recorded([ONE, OTHER]):
        recorder().add("steps", "2 tokens", 1.0, 2.0)
    for session in (ONE, OTHER):
        assert len(traces.end(session, "owner", most_bytes=1 << 18)[0].spans) == 1


def test_what_is_kept_is_bounded_and_cut_into_messages():
    traces = Traces("a")
    traces.begin(ONE, "owner")
    with traces.recorded([ONE]):
        for index in range(MOST + 5):
            recorder().add("steps", str(index), 0.0, 1.0)
    for index in range(MOST + 2):
        traces.step_sent("b", step(index))
    parts = traces.end(ONE, "owner", most_bytes=20_000)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part.model_dump_json()) <= 20_100 for part in parts)  # the last one is marked afterwards
    assert [name for part in parts for _, name, *_ in part.spans] == [str(index) for index in range(MOST)]
    assert sum(len(part.hops) for part in parts) == MOST
    assert sum(part.missed for part in parts) == 7
    for index in range(MOST_SESSIONS + 1):
        traces.begin(f"{index:032x}", "owner")
    assert traces.end(f"{0:032x}", "owner", most_bytes=1 << 18) == []
    assert traces.end(f"{MOST_SESSIONS:032x}", "owner", most_bytes=1 << 18)
