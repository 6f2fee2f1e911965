"""Frames of the fast planes: what goes in comes out, and hostile bytes never get further than the parser."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.messages import RemoteProtocolError, decode
from schemas.wire import (
    ANSWER_HEADER_BYTES,
    CHUNK_BYTES,
    VERSION,
    AnswerHeader,
    CallFault,
    CallHeader,
    Chunk,
    ChunkFault,
    ChunkRequest,
    FaultHeader,
    Limits,
    call_places,
    pack_answer,
    pack_call,
    pack_chunk,
    pack_chunk_fault,
    pack_chunk_request,
    pack_fault,
    parse_answer,
    parse_call,
    parse_chunk,
    parse_chunk_request,
)

LIMITS = Limits(layers=4, experts=16, top_k=2, hidden_size=8, tokens=32)
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
ids = st.integers(0, 2**64 - 1)
dtypes = st.sampled_from(sorted(SIZES))


@st.composite
def calls(draw: st.DrawFn) -> tuple[CallHeader, bytes]:
    tokens = draw(st.integers(1, LIMITS.tokens))
    header = CallHeader(
        epoch=draw(ids),
        request=draw(ids),
        layer=draw(st.integers(0, LIMITS.layers - 1)),
        combine=draw(st.sampled_from(["partial", "ordered"])),
        dtype=draw(dtypes),
        weight_dtype=draw(dtypes),
        tokens=tokens,
        rows=draw(st.integers(tokens, tokens * LIMITS.top_k)),
        hidden_size=LIMITS.hidden_size,
    )
    sizes = (
        tokens * 8 * SIZES[header.dtype],
        header.rows * 4,
        header.rows * 4,
        header.rows * SIZES[header.weight_dtype],
    )
    hidden, token, expert, weight = (bytes([number]) * size for number, size in enumerate(sizes))
    return header, pack_call(header, token, expert, weight, hidden)


@given(calls())
def test_call_round_trip(call: tuple[CallHeader, bytes]) -> None:
    header, frame = call
    assert parse_call(frame, LIMITS) == header
    places = call_places(header)
    assert [set(frame[a:b]) for a, b in pairwise(places)] == [{1}, {2}, {3}, {0}]
    assert places[-1] == len(frame) <= LIMITS.call_bytes


@given(calls(), st.integers(-2000, 2000).filter(bool))
def test_call_of_another_length_is_refused(call: tuple[CallHeader, bytes], more: int) -> None:
    _, frame = call
    with pytest.raises(RemoteProtocolError):
        parse_call(frame + bytes(more) if more > 0 else frame[:more], LIMITS)


@given(calls(), st.data())
def test_call_with_a_flipped_bit_stays_within_limits_or_is_refused(
    call: tuple[CallHeader, bytes], data: st.DataObject
) -> None:
    damaged = bytearray(call[1])
    damaged[data.draw(st.integers(0, call_places(call[0])[0] - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        header = parse_call(bytes(damaged), LIMITS)
    except RemoteProtocolError:
        return
    assert header.layer < LIMITS.layers
    assert call_places(header)[-1] == len(damaged)


@given(ids, ids, dtypes, st.integers(1, LIMITS.tokens * LIMITS.top_k))
def test_answer_round_trip(epoch: int, request: int, dtype: str, rows: int) -> None:
    header = AnswerHeader(epoch, request, dtype, rows, 8)
    frame = pack_answer(header, bytes(rows * 8 * SIZES[dtype]))
    assert parse_answer(frame, LIMITS) == header
    assert len(frame) - ANSWER_HEADER_BYTES == rows * 8 * SIZES[dtype]
    with pytest.raises(RemoteProtocolError, match="its shape and dtype need"):
        parse_answer(frame + b"x", LIMITS)


@given(ids, ids, st.text(max_size=6000), st.integers(0, 2**62))
def test_fault_round_trip(epoch: int, request: int, message: str, current: int) -> None:
    fault = CallFault(code="stale_epoch", message=message, epoch=current)
    header = parse_answer(pack_fault(epoch, request, fault), LIMITS)
    assert isinstance(header, FaultHeader)
    assert (header.epoch, header.request, header.fault.code, header.fault.epoch) == (
        epoch,
        request,
        fault.code,
        current,
    )
    assert fault.message.startswith(header.fault.message[:400])


@given(ids, st.binary(min_size=32, max_size=32), st.integers(0, 2**40), st.integers(1, CHUNK_BYTES))
def test_chunk_request_round_trip(request: int, name: bytes, offset: int, length: int) -> None:
    ask = ChunkRequest(request, name.hex(), offset, length)
    assert parse_chunk_request(pack_chunk_request(ask)) == ask


@given(ids, st.integers(0, 2**40), st.binary(min_size=1, max_size=3000), st.data())
def test_chunk_round_trip_and_damage(request: int, offset: int, data: bytes, draw: st.DataObject) -> None:
    frames = pack_chunk(Chunk(request, offset, offset + len(data) + 5, data))
    assert parse_chunk(frames) == Chunk(request, offset, offset + len(data) + 5, data)
    damaged = bytearray(data)
    damaged[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(RemoteProtocolError, match="checksum"):
        parse_chunk([frames[0], bytes(damaged)])


def test_chunk_fault_round_trip() -> None:
    fault = CallFault(code="not_held", message="has no such record")
    assert parse_chunk(pack_chunk_fault(7, fault)) == ChunkFault(7, fault)


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_hostile_frames_are_refused(frames: list[bytes]) -> None:
    for parse in (
        lambda: parse_call(b"".join(frames), LIMITS),
        lambda: parse_answer(b"".join(frames), LIMITS),
        lambda: parse_chunk(frames),
        lambda: parse_chunk_request(frames),
    ):
        with pytest.raises(RemoteProtocolError):
            parse()


@given(st.integers(1, 5), st.binary(max_size=600))
def test_hostile_bodies_behind_a_right_prefix_are_refused(kind: int, body: bytes) -> None:
    hostile = struct.pack("<2sBB", b"XM", VERSION, kind) + body
    for parse in (parse_call, parse_answer):
        try:
            header = parse(hostile, LIMITS)
        except RemoteProtocolError:
            continue
        if isinstance(header, CallHeader | AnswerHeader):
            assert header.rows * 8 <= LIMITS.tokens * LIMITS.top_k * 8


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_hostile_control_messages_are_refused(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(frame)
