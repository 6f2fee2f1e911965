"""What the coordinator tells an agent: its peers, and an epoch of a plan from preparation to the end."""

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import FrozenModel
from schemas.messages.common import Count, Digest, Peer, Record
from schemas.outcome import ExitCode
from schemas.plan import TrunkPath
from schemas.precision import PackedLayout, Precision
from schemas.store import RecordLayout, Sha256, TrunkPart
from schemas.topology import Context, NodeId, Tier


class Welcome(FrozenModel):
    """The coordinator knows the agent; `generation` changes whenever the coordinator starts."""

    type: Literal["welcome"] = "welcome"
    cluster: str
    generation: str


class Unknown(FrozenModel):
    """The coordinator has not heard this agent's hello (it restarted): say it again."""

    type: Literal["unknown"] = "unknown"


class Refusal(FrozenModel):
    """A request or a hello is refused, or failed; an agent whose place is `taken` by another one ends.

    `incarnation` is the start of the agent that is meant, where it is known: two that claim one place share a line.
    """

    type: Literal["refusal"] = "refusal"
    code: ExitCode
    message: str
    taken: bool = False
    incarnation: str = ""


class Peers(FrozenModel):
    """Where every node listens now; `revision` grows with every change while a coordinator runs."""

    type: Literal["peers"] = "peers"
    revision: Annotated[int, Field(ge=1)]
    peers: tuple[Peer, ...]


class AssignedReplica(FrozenModel):
    """A replica that a node must have, and the nodes to pull it from, best first.

    Where the node holds it in memory in a low precision and a store has it so, `packed` is what travels.
    """

    record: Record
    tier: Tier
    sources: tuple[NodeId, ...] = ()
    packed: Record | None = None

    @property
    def brought(self) -> Record:
        """The record that travels, and by whose name the node has it."""
        return self.packed or self.record


class Hop(FrozenModel):
    """Who computes an expert for a node, best first, itself included; `shares` of the rows where they are split.

    `sha256` names its record, which the node may cache where it has room.
    """

    layer: Count
    expert: Count
    holders: Annotated[tuple[NodeId, ...], Field(min_length=1)]
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    sha256: Digest = ""


class AssignedTrunkPart(FrozenModel):
    """A part of the trunk that a node must load, and the nodes to pull it from where its own checkpoint lacks it."""

    record: TrunkPart
    sources: tuple[NodeId, ...] = ()


class Assignment(FrozenModel):
    """All that an epoch of a plan means for one node.

    Attributes
    ----------
    ingress
        Tokens enter here.
    replicas
        Everything the node holds in this epoch, sorted.
    routing
        Who computes what is not simply computed here; for a node that runs layers of a path.
    paths
        The paths that lead through this node or begin at it. An ingress without one runs every layer itself.
    trunk
        The parts of the trunk that its segments of `paths` need, as far as a store has them.
    quality_budget
        Relative rise of perplexity that substitution may cost, where a calibration says how.
    context
        What KV caches were planned for at every ingress; None where the plan does not say.
    precision, packed_layout
        In which the node holds every expert in memory; None where the plan does not say. And how packed records that
        travel are laid out.
    """

    cluster: str
    plan: Sha256
    epoch: Annotated[int, Field(ge=1)]
    ingress: bool
    layout: RecordLayout | None = None
    replicas: tuple[AssignedReplica, ...] = ()
    routing: tuple[Hop, ...] = ()
    paths: tuple[TrunkPath, ...] = ()
    trunk: tuple[AssignedTrunkPart, ...] = ()
    quality_budget: Annotated[float, Field(ge=0)] = 0.0
    context: Context | None = None
    precision: Precision | None = None
    packed_layout: PackedLayout | None = None


class Prepare(FrozenModel):
    """Get and verify everything of an epoch, beside what is active; nothing is used before `Commit`."""

    type: Literal["prepare"] = "prepare"
    assignment: Assignment


class Commit(FrozenModel):
    """New steps use this epoch from now on."""

    type: Literal["commit"] = "commit"
    epoch: Count
    plan: Digest


class Retire(FrozenModel):
    """No step of an older epoch is in flight anywhere: drop what this epoch does not give, refuse older calls."""

    type: Literal["retire"] = "retire"
    epoch: Count


class Abort(FrozenModel):
    """Forget a prepared epoch."""

    type: Literal["abort"] = "abort"
    epoch: Count
    plan: Digest


class CatalogueRequest(FrozenModel):
    """Send the catalogue of your store."""

    type: Literal["catalogue_request"] = "catalogue_request"


class CountsRequest(FrozenModel):
    """Send the routing you counted."""

    type: Literal["counts_request"] = "counts_request"
