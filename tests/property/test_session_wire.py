"""Frames of the session plane: what goes in comes out, and hostile bytes never get further than the parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.messages import RemoteProtocolError
from schemas.plan import Segment, TrunkPath
from schemas.sessions import (
    MAX_POSITION,
    STEP_HEADER_BYTES,
    CloseSession,
    Opened,
    OpenSession,
    Scored,
    SessionAlive,
    SessionFault,
    SessionStanding,
    StepHeader,
    decode_session,
    encode_session,
    is_step,
    pack_step,
    parse_step,
)
from schemas.wire import Limits

LIMITS = Limits(layers=4, experts=16, top_k=2, hidden_size=8, tokens=32)
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
PATH = TrunkPath(ingress="a", segments=(Segment(node="b", first_layer=0, last_layer=3),))


@st.composite
def steps(draw: st.DrawFn) -> tuple[StepHeader, bytes]:
    kind = draw(st.sampled_from(["ids", "hidden", "token"]))
    count = 1 if kind == "token" else draw(st.integers(1, LIMITS.tokens))
    header = StepHeader(
        session=draw(ids),
        segment=draw(st.integers(0, 65535)),
        position=draw(st.integers(0, MAX_POSITION)),
        count=count,
        kind=kind,
        hidden_size=LIMITS.hidden_size if kind == "hidden" else 0,
        dtype=draw(st.sampled_from(sorted(SIZES))) if kind == "hidden" else "float32",
        end=draw(st.sampled_from(["", "length", "stop"])) if kind == "token" else "",
    )
    size = count * (LIMITS.hidden_size * SIZES[header.dtype] if kind == "hidden" else 4)
    return header, pack_step(header, bytes(size))


@given(steps())
def test_steps_round_trip(step: tuple[StepHeader, bytes]) -> None:
    header, frame = step
    assert parse_step(frame, LIMITS) == header
    assert is_step(frame)
    assert not is_step(encode_session(Opened(session="0" * 32)))


@given(st.binary(max_size=200))
def test_noise_is_refused(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_step(frame, LIMITS)
    with pytest.raises(RemoteProtocolError):
        decode_session(frame)


@given(steps(), st.data())
def test_a_damaged_step_is_refused_or_is_another_sound_one(step: tuple[StepHeader, bytes], data: st.DataObject) -> None:
    damaged = bytearray(step[1])
    damaged[data.draw(st.integers(0, STEP_HEADER_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    try:
        parsed = parse_step(bytes(damaged), LIMITS)
    except RemoteProtocolError:
        return
    assert len(damaged) - STEP_HEADER_BYTES == parsed.count * (
        8 * SIZES[parsed.dtype] if parsed.kind == "hidden" else 4
    )
    assert parsed.position <= MAX_POSITION


@given(steps(), st.integers(-40, 40).filter(bool))
def test_lengths_must_be_those_of_the_shape(step: tuple[StepHeader, bytes], more: int) -> None:
    _, frame = step
    with pytest.raises(RemoteProtocolError):
        parse_step(frame + bytes(more) if more > 0 else frame[:more], LIMITS)


@given(session=ids, number=st.integers(1, 1000), text=st.text(max_size=200))
def test_messages_round_trip(session: str, number: int, text: str) -> None:
    for message in (
        OpenSession(session=session, epoch=number, path=PATH, prompt_tokens=number, max_tokens=number + 1, seed=number),
        Opened(session=session),
        CloseSession(session=session),
        SessionAlive(session=session),
        SessionStanding(session=session, position=number, is_busy=bool(number % 2)),
        Scored(session=session, position=number, nll=number / 7),
        SessionFault(session=session, node="n", code="lost", message=text),
    ):
        assert decode_session(encode_session(message)) == message


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "close_session"}',
        '{"type": "close_session", "session": "../../etc/passwd"}',
        '{"type": "close_session", "session": "' + "0" * 32 + '", "more": 1}',
        '{"type": "open_session", "session": "' + "0" * 32 + '", "epoch": 1, "path": {}, "prompt_tokens": 1}',
        '{"type": "welcome", "cluster": "c", "generation": "g"}',
        "[]",
    ],
)
def test_messages_that_are_none(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="not a session message"):
        decode_session(text.encode())
