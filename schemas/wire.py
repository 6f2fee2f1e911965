"""Binary frames of the fast planes (expert calls and weights; steps of sessions: `schemas.sessions`), and every socket.

Decides what a header says and which frames may follow it. Everything a peer claims is held against limits and
against the frames that are really there *before* anyone makes a tensor of it: dtype from an allow-list, dimensions
in range, ``prod(shape) × itemsize`` is what follows the header. No addresses, offsets into memory or pickles travel
here. A call and its answer are one frame each, header and tensors: every further frame costs some 10 µs at each end,
more than to copy what a token needs. Must not know sockets or tensors: frames are bytes-like objects.

Flow of a call: ``pack_call`` ──► ``parse_call`` ──► ``pack_answer`` ──► ``parse_answer``.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from pydantic import ValidationError

from schemas.base import FrozenModel
from schemas.messages import RemoteProtocolError

VERSION: Final = 2
MAGIC: Final = b"XM"
CHUNK_BYTES: Final = 1 << 20
WINDOW: Final = 8  # chunks asked for ahead: credit, so that a puller decides how much is under way
MAX_FAULT_BYTES: Final = 4096

Combine = Literal["partial", "ordered"]
Plane = Literal["control", "expert", "weights", "session"]
Buffer = bytes | memoryview
Frames = Sequence[Buffer]

_CALL: Final = 1
_ANSWER: Final = 2
_FAULT: Final = 3
_CHUNK_REQUEST: Final = 4
_CHUNK: Final = 5
DTYPES: Final = ("float32", "float16", "bfloat16")
ITEMSIZE: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_CODE: Final = {name: code for code, name in enumerate(DTYPES)}
_COMBINES: Final[tuple[Combine, ...]] = ("partial", "ordered")
_COMBINE_CODE: Final = {name: code for code, name in enumerate(_COMBINES)}

# magic, version, type | epoch, request id | layer, combine, dtype, dtype of weights, tokens, rows, hidden size
_PREFIX: Final = struct.Struct("<2sBB")
_CALL_HEADER: Final = struct.Struct("<2sBBQQHBBBxxxIII")
# … | epoch, request id | dtype, rows, hidden size
_ANSWER_HEADER: Final = struct.Struct("<2sBBQQBxxxII")
ANSWER_HEADER_BYTES: Final = _ANSWER_HEADER.size
"""Where the rows of an answer begin in its frame."""
_FAULT_HEADER: Final = struct.Struct("<2sBBQQ")
# … | request id, offset, length, sha256
_CHUNK_REQUEST_HEADER: Final = struct.Struct("<2sBBQQI32s")
# … | request id, offset, total bytes of the record, crc32 of the chunk
_CHUNK_HEADER: Final = struct.Struct("<2sBBQQQI")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may ask of a model: dimensions beyond these are refused unread."""

    layers: int
    experts: int
    top_k: int
    hidden_size: int
    tokens: int

    @property
    def call_bytes(self) -> int:
        """The largest frame that a legal call or answer can have, with room for the headers."""
        rows = self.tokens * self.top_k
        call = self.tokens * self.hidden_size * 4 + rows * 12
        return max(rows * self.hidden_size * 4, call, MAX_FAULT_BYTES) + 4096


@dataclass(frozen=True, slots=True)
class CallHeader:
    """An expert call: `tokens` hidden states [T', D] and `rows` (token, expert, weight) triples [R]."""

    epoch: int
    request: int
    layer: int
    combine: Combine
    dtype: str
    weight_dtype: str
    tokens: int
    rows: int
    hidden_size: int


@dataclass(frozen=True, slots=True)
class AnswerHeader:
    """The answer to a call: [rows, hidden_size], one row per token (partial) or per call row (ordered)."""

    epoch: int
    request: int
    dtype: str
    rows: int
    hidden_size: int


class CallFault(FrozenModel):
    """Why a holder could not answer a call; for `stale_epoch` with the epochs it serves."""

    code: Literal["stale_epoch", "unknown_epoch", "not_held", "refused", "failed"]
    message: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class FaultHeader:
    """A fault instead of an answer."""

    epoch: int
    request: int
    fault: CallFault


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Ask for `length` bytes of a record from `offset`."""

    request: int
    sha256: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a record of `total` bytes."""

    request: int
    offset: int
    total: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class ChunkFault:
    """The holder has no such record (any more), or cannot read it."""

    request: int
    fault: CallFault


def pack_call(header: CallHeader, token: Buffer, expert: Buffer, weight: Buffer, hidden: Buffer) -> bytes:
    """Return a call as one frame: token [R] and expert [R] int32, weight [R], hidden [T', D] behind its header."""
    packed = _CALL_HEADER.pack(
        MAGIC, VERSION, _CALL, header.epoch, header.request, header.layer, _COMBINE_CODE[header.combine],
        DTYPE_CODE[header.dtype], DTYPE_CODE[header.weight_dtype], header.tokens, header.rows, header.hidden_size,
    )  # fmt: skip
    return b"".join((packed, token, expert, weight, hidden))


def call_places(header: CallHeader) -> tuple[int, int, int, int, int]:
    """Return where in a call's frame token, expert, weight and hidden begin, and where it ends."""
    token = _CALL_HEADER.size
    weight = token + 8 * header.rows
    hidden = weight + header.rows * ITEMSIZE[header.weight_dtype]
    end = hidden + header.tokens * header.hidden_size * ITEMSIZE[header.dtype]
    return token, token + 4 * header.rows, weight, hidden, end


def parse_call(frame: Buffer, limits: Limits) -> CallHeader:
    """Check the frame of a call and return its header; raises `RemoteProtocolError`."""
    fields = unpack_header([frame[: _CALL_HEADER.size]], _CALL_HEADER, _CALL, count=1, what="expert call")
    epoch, request, layer, combine, dtype, weight_dtype, tokens, rows, hidden = fields
    require(layer < limits.layers, f"layer {layer} of a model with {limits.layers}")
    require(combine < len(_COMBINES), f"combine code {combine}")
    require(dtype < len(DTYPES) and weight_dtype < len(DTYPES), f"dtype codes {dtype} and {weight_dtype}")
    require(hidden == limits.hidden_size, f"hidden size {hidden}, the model has {limits.hidden_size}")
    require(1 <= tokens <= limits.tokens, f"{tokens} tokens, the limit is {limits.tokens}")
    require(tokens <= rows <= tokens * limits.top_k, f"{rows} rows for {tokens} tokens, top-k is {limits.top_k}")
    name, weight_name = DTYPES[dtype], DTYPES[weight_dtype]
    header = CallHeader(epoch, request, layer, _COMBINES[combine], name, weight_name, tokens, rows, hidden)
    _require_length(frame, call_places(header)[-1])
    return header


def pack_answer(header: AnswerHeader, rows: Buffer) -> bytes:
    """Return an answer as one frame: its rows [rows, hidden_size] behind its header."""
    packed = _ANSWER_HEADER.pack(
        MAGIC, VERSION, _ANSWER, header.epoch, header.request, DTYPE_CODE[header.dtype], header.rows,
        header.hidden_size,
    )  # fmt: skip
    return b"".join((packed, rows))


def pack_fault(epoch: int, request: int, fault: CallFault) -> bytes:
    """Return a fault as one frame."""
    return _FAULT_HEADER.pack(MAGIC, VERSION, _FAULT, epoch, request) + _fault_body(fault)


def parse_answer(frame: Buffer, limits: Limits) -> AnswerHeader | FaultHeader:
    """Check the frame of an answer or a fault; raises `RemoteProtocolError`."""
    if _type_of([frame]) == _FAULT:
        return FaultHeader(*_parse_fault(frame))
    head = [frame[:ANSWER_HEADER_BYTES]]
    epoch, request, dtype, rows, hidden = unpack_header(head, _ANSWER_HEADER, _ANSWER, count=1, what="answer")
    require(dtype < len(DTYPES), f"dtype code {dtype}")
    require(hidden == limits.hidden_size, f"hidden size {hidden}, the model has {limits.hidden_size}")
    require(1 <= rows <= limits.tokens * limits.top_k, f"{rows} rows, the limit is {limits.tokens * limits.top_k}")
    _require_length(frame, ANSWER_HEADER_BYTES + rows * hidden * ITEMSIZE[DTYPES[dtype]])
    return AnswerHeader(epoch, request, DTYPES[dtype], rows, hidden)


def pack_chunk_request(ask: ChunkRequest) -> list[bytes]:
    """Return the frame of a chunk request."""
    return [
        _CHUNK_REQUEST_HEADER.pack(
            MAGIC, VERSION, _CHUNK_REQUEST, ask.request, ask.offset, ask.length, bytes.fromhex(ask.sha256)
        )
    ]


def parse_chunk_request(frames: Frames) -> ChunkRequest:
    """Check a chunk request; raises `RemoteProtocolError`."""
    fields = unpack_header(frames, _CHUNK_REQUEST_HEADER, _CHUNK_REQUEST, count=1, what="chunk request")
    request, offset, length, name = fields
    require(1 <= length <= CHUNK_BYTES, f"{length} bytes asked for, a chunk has at most {CHUNK_BYTES}")
    return ChunkRequest(request, name.hex(), offset, length)


def pack_chunk(chunk: Chunk) -> list[bytes | memoryview]:
    """Return the frames of a chunk, with its checksum."""
    header = _CHUNK_HEADER.pack(
        MAGIC, VERSION, _CHUNK, chunk.request, chunk.offset, chunk.total, zlib.crc32(chunk.data)
    )
    return [header, chunk.data]


def pack_chunk_fault(request: int, fault: CallFault) -> list[bytes]:
    """Return the frames of a fault on the weights plane."""
    return [pack_fault(0, request, fault)]


def parse_chunk(frames: Frames) -> Chunk | ChunkFault:
    """Check a chunk (checksum included) or a fault; raises `RemoteProtocolError`."""
    if _type_of(frames) == _FAULT:
        require(len(frames) == 1, f"{len(frames)} frames, a fault has 1")
        return ChunkFault(*_parse_fault(frames[0])[1:])
    request, offset, total, checksum = unpack_header(frames, _CHUNK_HEADER, _CHUNK, count=2, what="chunk")
    size = len(frames[1])
    require(1 <= size <= CHUNK_BYTES and offset + size <= total, f"{size} bytes at {offset} of {total}")
    require(zlib.crc32(frames[1]) == checksum, f"checksum of the chunk at {offset} differs: damaged on the way")
    return Chunk(request, offset, total, frames[1])


def _fault_body(fault: CallFault) -> bytes:
    body = fault.model_dump_json().encode()
    if len(body) <= MAX_FAULT_BYTES:
        return body
    return fault.model_copy(update={"message": fault.message[:500] + " …"}).model_dump_json().encode()


def _parse_fault(frame: Buffer) -> tuple[int, int, CallFault]:
    """Return epoch, request and what is wrong."""
    size = _FAULT_HEADER.size
    epoch, request = unpack_header([frame[:size]], _FAULT_HEADER, _FAULT, count=1, what="fault")
    require(len(frame) - size <= MAX_FAULT_BYTES, f"a fault of {len(frame)} bytes, the limit is {MAX_FAULT_BYTES}")
    try:
        return epoch, request, CallFault.model_validate_json(bytes(frame[size:]))
    except ValidationError as error:
        raise RemoteProtocolError("a fault that is no fault of this protocol") from error


def _type_of(frames: Frames) -> int:
    return _PREFIX.unpack_from(frames[0])[2] if frames and len(frames[0]) >= _PREFIX.size else 0


def unpack_header(frames: Frames, layout: struct.Struct, kind: int, *, count: int, what: str) -> tuple[Any, ...]:
    """Return the fields of frame 0 behind its prefix, checked to be a `kind` of this version with `count` frames."""
    require(len(frames) == count, f"{len(frames)} frames, {what} has {count}")
    require(len(frames[0]) == layout.size, f"a header of {len(frames[0])} bytes, {what} has {layout.size}")
    magic, version, found, *fields = layout.unpack(frames[0])
    require(magic == MAGIC, f"magic bytes {magic!r}")
    require(version == VERSION, f"protocol version {version}, this is {VERSION}; install the same version everywhere")
    require(found == kind, f"message type {found}, expected {kind} ({what})")
    return tuple(fields)


def require(true: bool, otherwise: str) -> None:
    """Refuse a frame unless something is true; raises `RemoteProtocolError`."""
    if not true:
        _refuse(otherwise)


def _require_length(frame: Buffer, size: int) -> None:
    if len(frame) != size:
        _refuse(f"{len(frame)} bytes, its shape and dtype need {size}")


def _refuse(problem: str) -> NoReturn:
    raise RemoteProtocolError(f"refused a frame: {problem}")


@dataclass(frozen=True, slots=True)
class SocketOption:
    """A ZeroMQ option by name; the reason is what happens without it."""

    name: str
    value: int
    reason: str


_CONTROL_BYTES: Final = 64 << 20

_EVERY: Final = (
    SocketOption("LINGER", 0, "the default waits for ever at exit; whoever must flush closes with SHUTDOWN_LINGER_MS"),
    SocketOption("HEARTBEAT_IVL", 300, "a dead peer is noticed only by its node's TCP"),
    SocketOption("HEARTBEAT_TIMEOUT", 900, "a partition is never seen on this end"),
    SocketOption("HEARTBEAT_TTL", 900, "a partition is never seen on the other end"),
    SocketOption("HANDSHAKE_IVL", 3000, "a peer that never finishes its greeting holds a connection for 30 s"),
    SocketOption("RECONNECT_IVL", 50, "a restarted peer is found again late"),
    SocketOption("RECONNECT_IVL_MAX", 2000, "no back-off: a peer that refuses is hammered"),
    SocketOption("IPV6", 1, "::1 is not found"),
)
ROUTER_OPTIONS: Final = (
    *_EVERY,
    SocketOption("ROUTER_MANDATORY", 1, "answers to unknown peers vanish silently"),
    SocketOption("ROUTER_HANDOVER", 1, "a restarted agent with its old identity is ignored"),
)
DEALER_OPTIONS: Final = (*_EVERY, SocketOption("IMMEDIATE", 1, "a thousand messages queue to a peer that is away"))
SHUTDOWN_LINGER_MS: Final = 1000


def plane_options(plane: Plane, frame_bytes: int = 0) -> tuple[SocketOption, ...]:
    """Return what limits the memory that a peer can make us use, per plane.

    `frame_bytes` is the largest frame of the expert and session planes, which follows from the model.
    """
    largest = {
        "control": _CONTROL_BYTES, "expert": frame_bytes, "weights": CHUNK_BYTES + 4096, "session": frame_bytes
    }[plane]  # fmt: skip
    queued = {"control": 1000, "expert": 256, "weights": 2 * WINDOW, "session": 256}[plane]
    return (
        SocketOption("MAXMSGSIZE", largest, "a peer decides how much memory is allocated"),
        SocketOption("SNDHWM", queued, "a thousand large messages queue per peer"),
        SocketOption("RCVHWM", queued, "a thousand large messages queue per peer"),
    )
