"""Control messages: what agents, the coordinator and the command line say to each other, as JSON.

Decides the vocabulary of the control plane and of the client plane, one frozen model per message, told apart by
`type`. Must not know sockets nor who acts on a message. Agents report *levels* (which epoch is prepared, active,
retired), not edges, so a lost or repeated message changes nothing.
"""

from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from schemas.activation import NodeCounts
from schemas.base import FrozenModel
from schemas.model import HeldDtype, ModelSpec
from schemas.outcome import ExitCode
from schemas.plan import Plan, TrunkPath
from schemas.store import RecordLayout, Sha256, TrunkPart
from schemas.topology import NodeId, Tier

PROTOCOL: Final = 2

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
NodeState = Literal["up", "stalled", "away", "stopped", "never seen"]
Phase = Literal["idle", "proposed", "preparing", "prepared", "committed", "retiring", "done", "aborted"]


class RemoteProtocolError(ValueError):
    """A peer said something that is no message of this protocol."""


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
        ``open``, or why steps are exact: ``off``, ``warming``, ``spent``, or text ``unlike`` the calibration's.
    lost_mass
        Mean share of the routers' top-K mass given up by a (token, layer) pair.
    events, spared_events
        (token, layer) pairs, and those that waited for nobody because of what was given up.
    divergence
        Mean sampled KL divergence from exact to substituted predictions, nats; None before the first sample.
    """

    budget: Annotated[float, Field(ge=0)]
    standing: Literal["off", "warming", "open", "spent", "unlike"]
    rise: float
    lost_mass: Annotated[float, Field(ge=0)]
    events: Count
    spared_events: Count
    divergence: float | None


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
    """

    found: Count = 0
    loads: Count = 0
    load_bytes: Count = 0
    waited_s: Annotated[float, Field(ge=0)] = 0.0
    prefetched: Count = 0
    prefetch_hits: Count = 0


class Served(FrozenModel):
    """What an agent counted since it started. Rows are (token, expert) pairs of its own requests.

    Attributes
    ----------
    device_rows, host_rows, disk_rows, remote_rows
        Rows computed here from each tier, and by other nodes.
    calls, call_wait_s
        Expert calls made and the seconds their layers waited for them beyond local work.
    tokens
        That entered here, prompts included.
    steps, step_tokens
        Runs of a segment here, and the tokens in them; a run may serve several sessions.
    hops
        Hidden states and tokens sent to the next node of a path.
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
    steps: Count = 0
    step_tokens: Count = 0
    hops: Count = 0
    tokens_per_s: Annotated[float, Field(ge=0)] = 0.0
    quality: QualityUse | None = None
    cache: CacheUse | None = None


class Hello(FrozenModel):
    """An agent introduces itself, after every (re)connection."""

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


class Goodbye(FrozenModel):
    """An agent stops in good order: it is not missed, and its node may be started again at once."""

    type: Literal["goodbye"] = "goodbye"
    node: NodeId
    incarnation: str


class Record(FrozenModel):
    """One expert at rest: its bytes are named by their sha256."""

    layer: Count
    expert: Count
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]


class Catalogue(FrozenModel):
    """Which records an agent's store has, and how a record is laid out."""

    type: Literal["catalogue"] = "catalogue"
    node: NodeId
    model: ModelSpec
    layout: RecordLayout
    records: tuple[Record, ...]
    trunk: tuple[TrunkPart, ...] = ()


class Counts(FrozenModel):
    """Routing that an agent counted since it started."""

    type: Literal["counts"] = "counts"
    counts: NodeCounts


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
    """A replica that a node must have, and the nodes to pull it from, best first."""

    record: Record
    tier: Tier
    sources: tuple[NodeId, ...] = ()


class Hop(FrozenModel):
    """Who computes an expert for a node, best first, itself included; `shares` of the rows where they are split."""

    layer: Count
    expert: Count
    holders: Annotated[tuple[NodeId, ...], Field(min_length=1)]
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()


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


class ApplyRequest(FrozenModel):
    """Bring the cluster to a plan; answered by `ApplyProgress` until `final`."""

    type: Literal["apply"] = "apply"
    plan: Plan
    dry_run: bool = False


class ApplyProgress(FrozenModel):
    """How far a plan is: `epoch` is active of `target`; bytes moved for the stage under way."""

    type: Literal["apply_progress"] = "apply_progress"
    phase: Phase
    epoch: Count
    target: Count
    moved: Count = 0
    to_move: Count = 0
    waiting_for: tuple[NodeId, ...] = ()
    message: str = ""
    code: ExitCode = ExitCode.DONE
    final: bool = False


class StatusRequest(FrozenModel):
    """Ask for the state of the cluster."""

    type: Literal["status"] = "status"


class NodeStatus(FrozenModel):
    """One node, as `planner status` shows it. Shares are None where nothing was counted yet.

    Attributes
    ----------
    state
        ``stalled``: heartbeats come, but nothing that is under way makes progress. ``away``: heartbeats stopped.
        ``stopped``: its agent said goodbye.
    hops_per_token, calls_per_token, call_wait_per_token_s
        Of the tokens that ran through this node's layers in this epoch: what left for the next node, expert calls,
        waits for them. Tokens of a prompt leave together, in chunks.
    planned_hops_per_token, planned_calls_per_token, planned_wait_per_token_s
        What the plan in force expects of a token that is generated; None where it tells nothing of paths.
    """

    id: NodeId
    state: NodeState
    epoch: Count
    experts: TierCounts
    memory_used: TierBytes
    memory_allowed: TierBytes
    hit_rate: float | None
    substitution_share: float | None
    quality: QualityUse | None = None
    cache: CacheUse | None = None
    remote_share: float | None
    tokens_per_s: float
    tokens: Count
    last_heartbeat_s: float | None
    progress: Count
    hops_per_token: float | None = None
    calls_per_token: float | None = None
    call_wait_per_token_s: float | None = None
    planned_hops_per_token: float | None = None
    planned_calls_per_token: float | None = None
    planned_wait_per_token_s: float | None = None


class PlanStatus(FrozenModel):
    """The plan under way or reached. `eta_s` only where a rate was measured."""

    digest: Digest
    phase: Phase
    epoch: Count
    target: Count
    moved: Count
    to_move: Count
    eta_s: float | None = None
    message: str = ""


class StatusReport(FrozenModel):
    """The state of the cluster."""

    type: Literal["status_report"] = "status_report"
    cluster: str
    epoch: Count
    plan: PlanStatus
    nodes: tuple[NodeStatus, ...]


class CountersRequest(FrozenModel):
    """Ask for routing counted by all agents."""

    type: Literal["counters"] = "counters"


class CountersReport(FrozenModel):
    """Routing counted by the agents that answered."""

    type: Literal["counters_report"] = "counters_report"
    cluster: str
    model: ModelSpec
    nodes: tuple[NodeCounts, ...]
    missing: tuple[NodeId, ...] = ()


class LocateRequest(FrozenModel):
    """Ask where a node's agent listens for clients."""

    type: Literal["locate"] = "locate"
    node: NodeId


class Located(FrozenModel):
    """Where a node's agent listens."""

    type: Literal["located"] = "located"
    peer: Peer


class GenerateRequest(FrozenModel):
    """Continue a prompt. Temperature 0 is greedy."""

    type: Literal["generate"] = "generate"
    request: Annotated[str, Field(min_length=1, max_length=64)]
    prompt: Annotated[str, Field(max_length=1 << 20)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    combine: Literal["partial", "ordered"] = "partial"


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
    """One more token of an answer and the text that it completed (empty within a character)."""

    type: Literal["generated"] = "generated"
    request: str
    index: Count
    token: Count
    text: str


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


Message = (
    Hello | Heartbeat | Goodbye | Catalogue | Counts | Welcome | Unknown | Refusal | Peers
    | Prepare | Commit | Retire | Abort | CatalogueRequest | CountsRequest
    | ApplyRequest | ApplyProgress | StatusRequest | StatusReport | CountersRequest | CountersReport
    | LocateRequest | Located | BudgetRequest | BudgetChanged
    | GenerateRequest | Cancel | Alive | Generated | Finished | Failed
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
