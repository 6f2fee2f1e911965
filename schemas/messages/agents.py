"""What an agent tells the coordinator: who it is, how far it is, what it did. Levels, not edges."""

from typing import Annotated, Final, Literal

from pydantic import Field

from schemas.activation import NodeCounts
from schemas.base import FrozenModel
from schemas.messages.common import Count, Digest, Endpoints, Record, TierBytes, TierCounts
from schemas.model import HeldDtype, ModelSpec
from schemas.outcome import ExitCode
from schemas.precision import PackedLayout, Precision
from schemas.store import RecordLayout, TrunkPart
from schemas.topology import NodeId

PROTOCOL: Final = 5


class PrepareFault(FrozenModel):
    """Why an agent cannot prepare an epoch of a plan."""

    epoch: Count
    plan: Digest
    code: ExitCode
    message: str


class Standing(FrozenModel):
    """How far one agent is.

    Attributes
    ----------
    active
        The epoch that new steps use; 0 before the first plan.
    prepared, prepared_plan
        The epoch whose replicas all are here and verified, and the digest of its plan.
    oldest
        The oldest epoch that a step in flight here still uses; `active` if there is none.
    retired
        Replicas that this epoch does not give are dropped, and calls of older epochs are refused.
    """

    active: Count = 0
    prepared: Count = 0
    prepared_plan: Digest = ""
    oldest: Count = 0
    retired: Count = 0
    fault: PrepareFault | None = None


class QualityUse(FrozenModel):
    """What an agent spent of its quality budget.

    Attributes
    ----------
    budget, rise
        Relative rise of perplexity that is allowed, and what calibration makes of what was given up.
    standing
        ``open``, or why steps are exact: ``off``, ``warming``, ``spent``, or text ``unlike`` the calibration's; without
        a calibration (``uncalibrated``), or with one of another placement (``misplaced``), as `note` says.
    lost_mass
        Mean share of the routers' top-K mass given up by a (token, layer) pair.
    events, spared_events
        (token, layer) pairs, and those that waited for nobody because of what was given up.
    divergence
        Mean sampled KL divergence from exact to substituted predictions, nats; None before the first sample.
    """

    budget: Annotated[float, Field(ge=0)]
    standing: Literal["off", "warming", "open", "spent", "unlike", "uncalibrated", "misplaced"]
    rise: float
    lost_mass: Annotated[float, Field(ge=0)]
    events: Count
    spared_events: Count
    divergence: float | None
    note: str = ""


class CacheUse(FrozenModel):
    """What a node's cache of experts did since it started, for tokens that entered anywhere.

    Attributes
    ----------
    found, loads, load_bytes
        Experts of a layer that were in memory when they were asked for, and those that were read, with their bytes.
    waited_s
        What steps waited for that.
    prefetched, prefetch_hits
        Experts that were read ahead, and those of them that were asked for.
    brought, brought_bytes, guest_hits
        Experts of other nodes that were brought here, with their bytes, and how often such were found in memory.
    """

    found: Count = 0
    loads: Count = 0
    load_bytes: Count = 0
    waited_s: Annotated[float, Field(ge=0)] = 0.0
    prefetched: Count = 0
    prefetch_hits: Count = 0
    brought: Count = 0
    brought_bytes: Count = 0
    guest_hits: Count = 0


class Served(FrozenModel):
    """What an agent counted since it started. Rows are (token, expert) pairs of its own requests.

    Attributes
    ----------
    device_rows, host_rows, disk_rows, remote_rows
        Rows computed here from each tier, and by other nodes.
    calls, call_wait_s
        Expert calls made and the seconds their layers waited for them beyond local work.
    events, remote_events
        (token, layer) pairs that ran here, and those that waited for another node's experts.
    tokens
        That entered here, prompts included.
    steps, step_tokens
        Runs of a segment here, and the tokens in them; a run may serve several sessions.
    hops
        Hidden states and tokens sent to the next node of a path.
    precision, low_rows
        In which every expert is held and executed here; rows computed here in a lower one for want of a better copy.
    """

    tokens: Count = 0
    device_rows: Count = 0
    host_rows: Count = 0
    disk_rows: Count = 0
    remote_rows: Count = 0
    substituted_rows: Count = 0
    calls: Count = 0
    call_wait_s: Annotated[float, Field(ge=0)] = 0.0
    calls_served: Count = 0
    events: Count = 0
    remote_events: Count = 0
    steps: Count = 0
    step_tokens: Count = 0
    hops: Count = 0
    tokens_per_s: Annotated[float, Field(ge=0)] = 0.0
    quality: QualityUse | None = None
    cache: CacheUse | None = None
    precision: Precision = "checkpoint"
    low_rows: Count = 0


class Hello(FrozenModel):
    """An agent introduces itself, after every (re)connection; it can hold experts in one of `precisions`."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL
    node: NodeId
    incarnation: str
    cluster: str = ""
    model: ModelSpec
    dtype: HeldDtype
    endpoints: Endpoints
    memory: TierBytes
    has_store: bool
    standing: Standing
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("checkpoint",)


class Heartbeat(FrozenModel):
    """An agent lives, how far it is, and that its compute threads make progress.

    Attributes
    ----------
    progress, in_flight
        Steps and calls finished since the start, and those under way: a stalled node has some and finishes none.
    moved, to_move
        Bytes obtained and verified for the epoch under preparation, and all it needs.
    is_loading
        The trunk is being loaded for that epoch: bytes stand still meanwhile.
    peers
        The revision of `Peers` that the agent has.
    device, device_note
        What computes here, and why it is not what the agent's config asks for; "" where it is.
    """

    type: Literal["heartbeat"] = "heartbeat"
    node: NodeId
    incarnation: str
    progress: Count
    in_flight: Count = 0
    standing: Standing
    held: TierCounts
    used: TierBytes
    served: Served
    moved: Count = 0
    to_move: Count = 0
    is_loading: bool = False
    peers: Count = 0
    device: str = "cpu"
    device_note: Annotated[str, Field(max_length=1000)] = ""


class Goodbye(FrozenModel):
    """An agent stops in good order: it is not missed, and its node may be started again at once."""

    type: Literal["goodbye"] = "goodbye"
    node: NodeId
    incarnation: str


class PackedCatalogue(FrozenModel):
    """Which records an agent's store has in a low precision, and how they are laid out."""

    layout: PackedLayout
    records: tuple[Record, ...]


class Catalogue(FrozenModel):
    """Which records an agent's store has, and how a record is laid out; each precision of `packed` at most once."""

    type: Literal["catalogue"] = "catalogue"
    node: NodeId
    model: ModelSpec
    layout: RecordLayout
    records: tuple[Record, ...]
    trunk: tuple[TrunkPart, ...] = ()
    packed: tuple[PackedCatalogue, ...] = ()


class LayerUse(FrozenModel):
    """What an agent counted at one of the layers with experts since it started.

    Attributes
    ----------
    tokens
        That ran through the layer here.
    device_rows, host_rows, disk_rows, remote_rows, replaced_rows
        Evaluations for them from each tier, by other nodes, and by another expert than the router chose, or none.
    calls, wait_s
        Calls of other nodes, and what was waited for them beyond local work.
    local_s
        Time in local experts, loads that it waited for included.
    loads, load_bytes, load_wait_s
        Experts read into memory, for tokens of any node, and what was waited for that.
    """

    tokens: Count = 0
    device_rows: Count = 0
    host_rows: Count = 0
    disk_rows: Count = 0
    remote_rows: Count = 0
    replaced_rows: Count = 0
    calls: Count = 0
    wait_s: Annotated[float, Field(ge=0)] = 0.0
    local_s: Annotated[float, Field(ge=0)] = 0.0
    loads: Count = 0
    load_bytes: Count = 0
    load_wait_s: Annotated[float, Field(ge=0)] = 0.0


class NodeLayers(FrozenModel):
    """What an agent counted layer by layer, and its time in everything but experts."""

    node: NodeId
    tokens: Count = 0
    trunk_s: Annotated[float, Field(ge=0)] = 0.0
    layers: tuple[LayerUse, ...] = ()


class Counts(FrozenModel):
    """Routing that an agent counted since it started, and what else it counted layer by layer."""

    type: Literal["counts"] = "counts"
    counts: NodeCounts
    layers: NodeLayers | None = None
