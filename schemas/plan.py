"""plan.json: an immutable proposal to bring a cluster from one epoch to another.

Decides what a plan file says and that it was not altered. Must not know how it was found nor how it is applied.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from schemas.base import FrozenModel, canonical_json
from schemas.files import Fault, load_json, write_atomic
from schemas.model import HeldDtype, ModelSpec
from schemas.placement import Replica, Route
from schemas.precision import Precision
from schemas.topology import Context, NodeId, Tier

_ADDED = frozenset(
    {"links", "movement", "survival", "utilisation", "queued_latency_s", "paths", "input_bytes", "head_bytes",
     "trunk_stage", "quality_budget", "spared_any_remote_share", "context", "precisions", "precision",
     "prompt_tokens", "prompt_s"}
)  # fmt: skip  # optional, not in the first plans
FORMAT: Literal["expertmesh-plan-1"] = "expertmesh-plan-1"


class Segment(FrozenModel):
    """A range of decoder layers, both ends included, whose trunk `node` runs."""

    node: NodeId
    first_layer: Annotated[int, Field(ge=0)]
    last_layer: Annotated[int, Field(ge=0)]


class TrunkPath(FrozenModel):
    """The segments that a token entering at `ingress` passes, in order."""

    ingress: NodeId
    segments: Annotated[tuple[Segment, ...], Field(min_length=1)]


class LayerCost(FrozenModel):
    """What one decoder layer adds to a token of an ingress, in expectation.

    `wait_s` is for experts elsewhere, in `calls` to them; `hop_s` for the way to the next layer's node (after the last:
    to the first's).
    """

    layer: Annotated[int, Field(ge=0)]
    node: NodeId
    compute_s: float
    wait_s: float
    hop_s: float
    calls: float = 0.0


class PathSummary(FrozenModel):
    """A token's way: what it costs by layer, and why it was chosen over running the trunk at the ingress.

    A prompt of `prompt_tokens` is expected to take `prompt_s` until the first token; None: none was planned for.
    """

    ingress: NodeId
    layers: tuple[LayerCost, ...]
    why: str = ""
    prompt_tokens: int | None = None
    prompt_s: float | None = None


class Step(FrozenModel):
    """One ordered change. Steps of a stage become active together, in one epoch.

    `replicate` brings a replica to `node` (from `source`, or from a node with a store where None), `switch` lets
    calls of this stage's epoch use the new placement, `drop` frees what nothing uses any more.
    """

    stage: Annotated[int, Field(ge=1)]
    action: Literal["replicate", "switch", "drop"]
    layer: Annotated[int, Field(ge=0)] | None = None
    expert: Annotated[int, Field(ge=0)] | None = None
    node: NodeId | None = None
    tier: Tier | None = None
    bytes: Annotated[int, Field(ge=0)] = 0
    source: NodeId | None = None


class NodePrecision(FrozenModel):
    """In which precision a node holds every expert in memory, in which each takes `expert_bytes` there."""

    node: NodeId
    precision: Precision
    expert_bytes: Annotated[int, Field(gt=0)]


class NodeSummary(FrozenModel):
    """What one node got: bytes of experts against the capacity left for experts, and why.

    `utilisation` is the expected share of its compute that calls take. `precision` is None where none was asked for.
    """

    id: NodeId
    experts: int
    bytes: int
    capacity: int
    trunk_bytes: int = 0
    kv_bytes: int = 0
    remote_call_share: float | None = None
    any_remote_share: float | None = None
    predicted_latency_s: float | None = None
    why: str = ""
    utilisation: float | None = None
    precision: Precision | None = None


class LinkSummary(FrozenModel):
    """Expected use of one link by calls, both directions together, and as a share of its bandwidth."""

    between: tuple[NodeId, NodeId]
    bytes_per_s: float
    utilisation: float


class Movement(FrozenModel):
    """What coming from the plan in force brings and costs.

    `makespan_s` is the time until the last expert has arrived, `transfer_s` that of all transfers together, which is
    the price of moving; it and `new_bytes` count the trunk of layers that begin to run at a node, too. `benefit_per_s`
    are seconds that tokens wait less, per second; over `horizon_s` they must
    exceed that price. `moved` says whether this plan moves.
    """

    new_bytes: int
    sources: int
    makespan_s: float
    transfer_s: float
    benefit_per_s: float
    horizon_s: float | None = None
    moved: bool
    reason: str


class Survival(FrozenModel):
    """What surviving `losses` nodes costs: seconds that a token waits more than if it were not asked for."""

    losses: int
    replicas: int
    extra_latency_s: float


class PrecisionSummary(FrozenModel):
    """What low precisions cost and bring.

    Attributes
    ----------
    rise
        Relative rise of perplexity for tokens of the ingress that loses most, by the upper ends of what calibration
        measured; None where that is not known.
    budget
        That was to be kept; 0: none was given.
    exact_latency_s
        What a token would take with every node in the checkpoint's precision, where that was found; None: it does not
        fit then, or was not asked for.
    considered
        Assignments of precisions to nodes that were solved for; 0: the topology said which.
    """

    rise: float | None
    budget: float
    exact_latency_s: float | None = None
    considered: Annotated[int, Field(ge=0)] = 0
    why: str = ""


class Summary(FrozenModel):
    """How a plan was found and what it promises; None where a figure is not known.

    `queued_latency_s` is the predicted latency with the queues of busy holders (M/M/1). `spared_any_remote_share` is
    the `any_remote_share` that is expected while agents spend the plan's quality budget; all other figures are of exact
    execution.
    """

    status: Literal["optimal", "feasible"]
    solver: str
    objective_name: str
    objective: float
    bound: float | None = None
    gap: float | None = None
    stop_reason: str = ""
    seconds: float
    remote_call_share: float | None = None
    any_remote_share: float | None = None
    predicted_latency_s: float | None = None
    nodes: tuple[NodeSummary, ...] = ()
    links: tuple[LinkSummary, ...] | None = None
    queued_latency_s: float | None = None
    movement: Movement | None = None
    survival: Survival | None = None
    paths: tuple[PathSummary, ...] | None = None
    spared_any_remote_share: float | None = None
    precision: PrecisionSummary | None = None


class Plan(FrozenModel):
    """Placement, routes and trunk path of `epoch`, and the steps that lead there from `base_epoch`.

    Attributes
    ----------
    trunk_stage
        The stage whose epoch is the first with this `trunk`; until then tokens keep the path of the plan before. None
        means the first, or that the trunk stays as it was.
    quality_budget
        Relative rise of perplexity that agents with a calibration may spend, beyond what low precisions cost; nothing
        where None.
    precisions
        In which every node holds experts; None: agents hold them as they like, and the checkpoint's was counted.
    context
        What KV caches were planned for at every ingress; None where a plan does not say.
    """

    format: Literal["expertmesh-plan-1"] = FORMAT
    cluster: str
    coordinator: str
    base_epoch: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]
    model: ModelSpec
    dtype: HeldDtype
    placement: tuple[Replica, ...]
    routes: tuple[Route, ...] = ()
    trunk: tuple[TrunkPath, ...]
    trunk_stage: Annotated[int, Field(ge=1)] | None = None
    quality_budget: Annotated[float, Field(gt=0, le=1)] | None = None
    precisions: tuple[NodePrecision, ...] | None = None
    context: Context | None = None
    steps: tuple[Step, ...]
    summary: Summary
    digest: str = ""

    def sealed(self) -> Self:
        """Return the plan with the digest of what it says."""
        return self.model_copy(update={"digest": self.computed_digest()})

    def computed_digest(self) -> str:
        """Digest of the plan's canonical JSON without the digest itself, nor fields that older plans do not have."""
        document = self.model_dump(mode="json", exclude={"digest"})
        summary = document["summary"]
        for record in (document, document["model"], summary, *summary["nodes"], *(summary.get("paths") or ())):
            for name in _ADDED & record.keys():
                if record[name] is None:
                    del record[name]
        return hashlib.sha256(canonical_json(document)).hexdigest()

    def canonical_text(self) -> str:
        """Return the plan as a file: indented JSON with sorted keys."""
        return json.dumps(json.loads(canonical_json(self.model_dump(mode="json"))), indent=1) + "\n"


def load_plan(path: Path) -> Plan:
    """Read a plan file; raises `InvalidFile` where it is malformed or was altered."""
    return load_json(path, Plan, _plan_faults)


def write_plan(path: Path, plan: Plan) -> None:
    """Seal a plan and write it, whole or not at all."""
    write_atomic(path, plan.sealed().canonical_text())


def _plan_faults(plan: Plan) -> Iterator[Fault]:
    if plan.digest != plan.computed_digest():
        yield Fault("digest", "the plan was altered after it was written; solve again rather than edit a plan")
