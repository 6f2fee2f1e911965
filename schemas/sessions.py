"""The session plane: what the nodes of a token's path say to each other.

Decides the vocabulary: small JSON messages (one frame) by which an ingress opens, keeps and closes a session at the
segments of its path, and binary steps (a header and a tensor in one frame: a second one would cost as much as the step
itself) that go from segment to segment. Both travel in the same sockets, so that their order holds. Steps are checked
against limits and their own length before anyone makes a tensor of them. Must not know sockets or tensors.
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from schemas.base import FrozenModel
from schemas.messages import Count, RemoteProtocolError
from schemas.outcome import ExitCode
from schemas.plan import TrunkPath
from schemas.topology import NodeId
from schemas.tracing import TracePart
from schemas.wire import (
    DTYPE_CODE,
    DTYPES,
    ITEMSIZE,
    MAGIC,
    VERSION,
    Combine,
    Limits,
    require,
    unpack_header,
)

MAX_MESSAGE_BYTES: Final = 1 << 20  # a path through thousands of segments is below that
MAX_POSITION: Final = 1 << 26

SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Token = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
StepKind = Literal["ids", "hidden", "token"]
SessionCode = Literal[
    "unknown_session", "stale_epoch", "not_yours", "not_ready", "context_full", "kv_budget", "lost", "refused", "failed"
]

_STEP: Final = 6
_KINDS: Final[tuple[StepKind, ...]] = ("ids", "hidden", "token")
_KIND_CODE: Final = {kind: code for code, kind in enumerate(_KINDS)}
_NO_END: Final = 0
_ENDS: Final[tuple[Literal["", "length", "stop"], ...]] = ("", "length", "stop")

# magic, version, type | session | position, count, hidden size | segment | kind, dtype, end
_STEP_HEADER: Final = struct.Struct("<2sBB16sIIIHBBBxxx")
STEP_HEADER_BYTES: Final = _STEP_HEADER.size
"""Where the tensor of a step begins in its frame."""


class OpenSession(FrozenModel):
    """Reserve a KV cache in every segment that you run of a path; from the path's ingress.

    Attributes
    ----------
    epoch
        Of the ingress; a node that is not there yet says `not_ready`.
    prompt_tokens
        That the first segment gets to run before a token is sampled: the prompt and what was generated before.
    resumed
        How many of these were generated, along another path or at a node that was lost.
    max_tokens
        Of the whole sequence; the answer ends there.
    forced
        All that follows the prompt, instead of tokens that are drawn: how likely each was is told in `Scored`.
    trace
        Note what happens, and tell it when the session is closed, in `SessionTrace`.
    """

    type: Literal["open_session"] = "open_session"
    session: SessionId
    epoch: Count
    path: TrunkPath
    prompt_tokens: Annotated[int, Field(ge=1, le=MAX_POSITION)]
    resumed: Count = 0
    max_tokens: Annotated[int, Field(ge=2, le=MAX_POSITION)]
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    combine: Combine = "partial"
    forced: tuple[Token, ...] = ()
    trace: bool = False

    def forced_at(self, position: int) -> int | None:
        """Return the token that must stand at a position; None where tokens are drawn."""
        return self.forced[position - self.prompt_tokens + self.resumed] if self.forced else None


class Opened(FrozenModel):
    """The session is open at every segment of this node."""

    type: Literal["opened"] = "opened"
    session: SessionId


class CloseSession(FrozenModel):
    """Free the session's KV cache; from its ingress."""

    type: Literal["close_session"] = "close_session"
    session: SessionId


class SessionAlive(FrozenModel):
    """The ingress still wants the session; answered by `SessionStanding`. Without it a segment frees the session."""

    type: Literal["session_alive"] = "session_alive"
    session: SessionId


class SessionStanding(FrozenModel):
    """How far a node's segments are: tokens run, and whether a step of the session is under way or in line there."""

    type: Literal["session_standing"] = "session_standing"
    session: SessionId
    position: Count
    is_busy: bool


class Scored(FrozenModel):
    """How unlikely the token was that comes next, which was forced: its negative log-likelihood in nats."""

    type: Literal["scored"] = "scored"
    session: SessionId
    position: Count
    nll: float


class SessionTrace(FrozenModel):
    """What a node noted of a session that was closed, or a part of it."""

    type: Literal["session_trace"] = "session_trace"
    session: SessionId
    part: TracePart


class SessionFault(FrozenModel):
    """Why a session cannot go on at a node.

    `unknown_session` after a restart, `stale_epoch` where the range is retired, `not_ready` where the epoch is not yet
    active, `lost` where the next node cannot be reached, `not_yours` to whoever is not the session's.
    """

    type: Literal["session_fault"] = "session_fault"
    session: SessionId
    node: NodeId
    code: SessionCode
    message: Annotated[str, Field(max_length=2000)]
    exit_code: ExitCode = ExitCode.FAILED


SessionMessage = (
    OpenSession | Opened | CloseSession | SessionAlive | SessionStanding | Scored | SessionTrace | SessionFault
)

_ADAPTER: Final[TypeAdapter[SessionMessage]] = TypeAdapter(Annotated[SessionMessage, Field(discriminator="type")])


@dataclass(frozen=True, slots=True)
class StepHeader:
    """Tokens on their way to a segment of a path, or a sampled token to the first segment and the ingress.

    Attributes
    ----------
    segment
        Which of the path's segments they are for.
    position, count
        The first token's place in the sequence, and how many.
    kind
        ``ids`` [count] int32 from the ingress, ``hidden`` [count, hidden_size] from the segment before, ``token`` [1]
        int32 from the last segment.
    dtype
        Of hidden states.
    end
        Of a token: why it is the answer's last, or empty.
    """

    session: str
    segment: int
    position: int
    count: int
    kind: StepKind
    hidden_size: int = 0
    dtype: str = "float32"
    end: Literal["", "length", "stop"] = ""


def encode_session(message: SessionMessage) -> bytes:
    """Return a message as one frame of JSON."""
    return message.model_dump_json().encode()


def decode_session(frame: bytes | memoryview) -> SessionMessage:
    """Read a message back; raises `RemoteProtocolError` for anything else."""
    require(len(frame) <= MAX_MESSAGE_BYTES, f"a session message of {len(frame)} bytes, at most {MAX_MESSAGE_BYTES}")
    try:
        return _ADAPTER.validate_json(bytes(frame))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RemoteProtocolError(f"not a session message: {where}: {first['msg']}") from error


def pack_step(header: StepHeader, tensor: bytes | memoryview) -> bytes:
    """Return a step as one frame."""
    packed = _STEP_HEADER.pack(
        MAGIC, VERSION, _STEP, bytes.fromhex(header.session), header.position, header.count, header.hidden_size,
        header.segment, _KIND_CODE[header.kind], DTYPE_CODE[header.dtype], _ENDS.index(header.end),
    )  # fmt: skip
    return b"".join((packed, tensor))


def is_step(frame: bytes | memoryview) -> bool:
    """Whether a frame says that it is binary; messages begin otherwise."""
    return frame[:2] == MAGIC


def session_of_step(frame: bytes | memoryview) -> str | None:
    """Return the session that a header names, without trusting the rest of it; None where it is too short for one."""
    return _STEP_HEADER.unpack_from(frame)[3].hex() if len(frame) >= STEP_HEADER_BYTES else None


def parse_step(frame: bytes | memoryview, limits: Limits) -> StepHeader:
    """Check the frame of a step and return its header; raises `RemoteProtocolError`."""
    fields = unpack_header([frame[:STEP_HEADER_BYTES]], _STEP_HEADER, _STEP, count=1, what="step")
    session, position, count, hidden, segment, kind, dtype, end = fields
    require(kind < len(_KINDS) and dtype < len(DTYPES) and end < len(_ENDS), f"codes {kind}, {dtype} and {end}")
    require(position <= MAX_POSITION, f"position {position}, the limit is {MAX_POSITION}")
    name = _KINDS[kind]
    most = 1 if name == "token" else limits.tokens
    require(1 <= count <= most, f"{count} tokens, the limit is {most}; raise context.tokens in this node's config")
    require(name == "token" or end == _NO_END, "an end without a token")
    wanted = limits.hidden_size if name == "hidden" else 0
    require(hidden == wanted, f"hidden size {hidden}, expected {wanted}")
    size = count * (hidden * ITEMSIZE[DTYPES[dtype]] if name == "hidden" else 4)
    found = len(frame) - STEP_HEADER_BYTES
    require(found == size, f"a tensor of {found} bytes, its shape and dtype need {size}")
    return StepHeader(session.hex(), segment, position, count, name, hidden, DTYPES[dtype], _ENDS[end])
