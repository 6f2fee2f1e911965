"""What several messages are made of: where a node listens, bytes and experts by tier, a record's name."""

from typing import Annotated

from pydantic import Field

from schemas.base import FrozenModel
from schemas.store import Sha256
from schemas.topology import NodeId

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class TierBytes(FrozenModel):
    """Bytes per tier."""

    device: Count = 0
    host: Count = 0
    disk: Count = 0


class TierCounts(FrozenModel):
    """Experts per tier."""

    device: Count = 0
    host: Count = 0
    disk: Count = 0


class Endpoints(FrozenModel):
    """Where an agent listens: one address, one port per plane."""

    address: str
    expert: Port
    weights: Port
    client: Port
    session: Port


class Peer(FrozenModel):
    """A node and where its agent listens."""

    node: NodeId
    endpoints: Endpoints


class Record(FrozenModel):
    """One expert at rest: its bytes are named by their sha256."""

    layer: Count
    expert: Count
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]
