"""Control messages: what agents, the coordinator and the command line say to each other, as JSON.

Decides the vocabulary of the control plane and of the client plane, one frozen model per message, told apart by
`type`. Must not know sockets nor who acts on a message. Agents report *levels* (which epoch is prepared, active,
retired), not edges, so a lost or repeated message changes nothing.
"""

from typing import Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError

from schemas.messages.agents import (
    PROTOCOL,
    CacheUse,
    Catalogue,
    Counts,
    Goodbye,
    Heartbeat,
    Hello,
    LayerUse,
    NodeLayers,
    PackedCatalogue,
    PrepareFault,
    QualityUse,
    Served,
    Standing,
)
from schemas.messages.client import (
    Alive,
    BudgetChanged,
    BudgetRequest,
    Cancel,
    Failed,
    Finished,
    Generated,
    GenerateRequest,
    Located,
    LocateRequest,
    Traced,
)
from schemas.messages.common import (
    Count,
    Digest,
    Endpoints,
    Peer,
    Port,
    Record,
    TierBytes,
    TierCounts,
)
from schemas.messages.control import (
    Abort,
    AssignedReplica,
    AssignedTrunkPart,
    Assignment,
    CatalogueRequest,
    Commit,
    CountsRequest,
    Hop,
    Peers,
    Prepare,
    Refusal,
    Retire,
    Unknown,
    Welcome,
)
from schemas.messages.operator import (
    ApplyProgress,
    ApplyRequest,
    CountersReport,
    CountersRequest,
    NodeState,
    NodeStatus,
    Phase,
    PlanStatus,
    StatusReport,
    StatusRequest,
)

__all__ = [
    "PROTOCOL",
    "Abort",
    "Alive",
    "ApplyProgress",
    "ApplyRequest",
    "AssignedReplica",
    "AssignedTrunkPart",
    "Assignment",
    "BudgetChanged",
    "BudgetRequest",
    "CacheUse",
    "Cancel",
    "Catalogue",
    "CatalogueRequest",
    "Commit",
    "Count",
    "CountersReport",
    "CountersRequest",
    "Counts",
    "CountsRequest",
    "Digest",
    "Endpoints",
    "Failed",
    "Finished",
    "GenerateRequest",
    "Generated",
    "Goodbye",
    "Heartbeat",
    "Hello",
    "Hop",
    "LayerUse",
    "LocateRequest",
    "Located",
    "Message",
    "NodeLayers",
    "NodeState",
    "NodeStatus",
    "PackedCatalogue",
    "Peer",
    "Peers",
    "Phase",
    "PlanStatus",
    "Port",
    "Prepare",
    "PrepareFault",
    "QualityUse",
    "Record",
    "Refusal",
    "RemoteProtocolError",
    "Retire",
    "Served",
    "Standing",
    "StatusReport",
    "StatusRequest",
    "TierBytes",
    "TierCounts",
    "Traced",
    "Unknown",
    "Welcome",
    "decode",
    "encode",
]


class RemoteProtocolError(ValueError):
    """A peer said something that is no message of this protocol."""


Message = (
    Hello | Heartbeat | Goodbye | Catalogue | Counts | Welcome | Unknown | Refusal | Peers
    | Prepare | Commit | Retire | Abort | CatalogueRequest | CountsRequest
    | ApplyRequest | ApplyProgress | StatusRequest | StatusReport | CountersRequest | CountersReport
    | LocateRequest | Located | BudgetRequest | BudgetChanged
    | GenerateRequest | Cancel | Alive | Generated | Traced | Finished | Failed
)  # fmt: skip

_ADAPTER: Final[TypeAdapter[Message]] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode(message: Message) -> bytes:
    """Return a message as one frame of JSON."""
    return message.model_dump_json().encode()


def decode(frame: bytes) -> Message:
    """Read a message back; raises `RemoteProtocolError` for anything else."""
    try:
        return _ADAPTER.validate_json(frame)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RemoteProtocolError(f"not a control message: {where}: {first['msg']}") from error
