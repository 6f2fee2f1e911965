"""What the planner's command line asks of the coordinator, and the answers."""

from typing import Literal

from schemas.activation import NodeCounts
from schemas.base import FrozenModel
from schemas.messages.agents import CacheUse, NodeLayers, QualityUse
from schemas.messages.common import Count, Digest, TierBytes, TierCounts
from schemas.model import ModelSpec
from schemas.outcome import ExitCode
from schemas.plan import Plan
from schemas.precision import Precision
from schemas.topology import NodeId

NodeState = Literal["up", "stalled", "away", "stopped", "never seen"]
Phase = Literal["idle", "proposed", "preparing", "prepared", "committed", "retiring", "done", "aborted"]


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
    device, device_note
        What computes there, and why it is not what its config asks for; "" where it is.
    precision, low_share
        In which every expert is executed here; share of rows in a lower one, for want of a better copy.
    any_remote_share
        Of (token, layer) pairs that ran here, those that waited for another node's experts.
    ran_tokens, hops_per_token, calls_per_token, call_wait_per_token_s
        Tokens that ran through this node's layers in this epoch (twice, if they passed twice), and of each: what left
        for the next node, expert calls, waits for them. Tokens of a prompt leave together, in chunks.
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
    device: str = "cpu"
    device_note: str = ""
    precision: Precision = "checkpoint"
    low_share: float | None = None
    remote_share: float | None
    any_remote_share: float | None = None
    tokens_per_s: float
    tokens: Count
    last_heartbeat_s: float | None
    progress: Count
    ran_tokens: Count = 0
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
    """The state of the cluster; `layers` are filled in by who asks, from a `CountersReport`."""

    type: Literal["status_report"] = "status_report"
    cluster: str
    epoch: Count
    plan: PlanStatus
    nodes: tuple[NodeStatus, ...]
    layers: tuple[NodeLayers, ...] = ()


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
    layers: tuple[NodeLayers, ...] = ()
