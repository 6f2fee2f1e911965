"""What a client asks of an agent: text, and its budget; and where that agent is, which the coordinator knows."""

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import FrozenModel
from schemas.messages.common import Count, Peer
from schemas.outcome import ExitCode
from schemas.topology import NodeId
from schemas.tracing import TracePart


class LocateRequest(FrozenModel):
    """Ask where a node's agent listens for clients."""

    type: Literal["locate"] = "locate"
    node: NodeId


class Located(FrozenModel):
    """Where a node's agent listens."""

    type: Literal["located"] = "located"
    peer: Peer


class GenerateRequest(FrozenModel):
    """Continue a prompt. Temperature 0 is greedy.

    With `score`, nothing is drawn: the prompt itself is run token by token, in pieces of `max_tokens` and their first
    one's predecessor, as it would be generated, and the answer says how unlikely each token was.
    """

    type: Literal["generate"] = "generate"
    request: Annotated[str, Field(min_length=1, max_length=64)]
    prompt: Annotated[str, Field(max_length=1 << 20)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    combine: Literal["partial", "ordered"] = "partial"
    score: bool = False
    trace: bool = False


class Traced(FrozenModel):
    """A part of what a node noted while the answer was made; all of them come before `Finished`."""

    type: Literal["traced"] = "traced"
    request: str
    part: TracePart


class BudgetRequest(FrozenModel):
    """Let an agent take so many bytes of its device from now on, trunk and KV cache included."""

    type: Literal["budget"] = "budget"
    device: Count


class BudgetChanged(FrozenModel):
    """The device budget in force, and what experts may take of it and do take."""

    type: Literal["budget_changed"] = "budget_changed"
    device: Count
    experts: Count
    used: Count


class Cancel(FrozenModel):
    """The client no longer wants a request's answer."""

    type: Literal["cancel"] = "cancel"
    request: str


class Alive(FrozenModel):
    """The client still reads; sent about every second, so that a lost client frees its session."""

    type: Literal["alive"] = "alive"
    request: str


class Generated(FrozenModel):
    """One more token of an answer and the text that it completed (empty within a character).

    `nll` is the negative log-likelihood of a token that was scored; nats.
    """

    type: Literal["generated"] = "generated"
    request: str
    index: Count
    token: Count
    text: str
    nll: float | None = None


class Finished(FrozenModel):
    """An answer is complete; `text` is what was held back as part of a character."""

    type: Literal["finished"] = "finished"
    request: str
    text: str = ""
    reason: Literal["length", "stop"]
    prompt_tokens: Count
    tokens: Count
    seconds: float
    prefill_s: float


class Failed(FrozenModel):
    """An answer ended early."""

    type: Literal["failed"] = "failed"
    request: str
    code: ExitCode
    message: str
