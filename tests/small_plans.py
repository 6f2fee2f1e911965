"""A model of six tiny experts, the catalogue of its store, and plans for it made by hand."""

from collections.abc import Iterable, Mapping, Sequence

from schemas import messages as msg
from schemas.model import ModelSpec
from schemas.placement import Replica, Route, sorted_replicas, sorted_routes
from schemas.plan import Plan, Segment, Step, Summary, TrunkPath
from schemas.store import ExpertForm, Part, RecordLayout, TrunkPart
from schemas.topology import Tier

BYTES = 16
MODEL = ModelSpec(id="m", layers=2, experts=3, top_k=1, hidden_size=1, itemsize=4, expert_bytes=BYTES)
LAYOUT = RecordLayout(
    form=ExpertForm(kind="swiglu"),
    dtype="float32",
    bytes=BYTES,
    parts=(Part(name="gate_up_proj", shape=(2, 1), offset=0), Part(name="down_proj", shape=(2, 1), offset=8)),
)
KEYS = [(layer, expert) for layer in range(2) for expert in range(3)]
CATALOGUE = msg.Catalogue(
    node="a",
    model=MODEL,
    layout=LAYOUT,
    records=tuple(
        msg.Record(layer=layer, expert=expert, sha256=f"{layer}{expert}".rjust(64, "0"), bytes=BYTES)
        for layer, expert in KEYS
    ),
)
TRUNK_PARTS = tuple(
    TrunkPart(part=part, layer=layer, sha256=f"{part[0]}{layer}".encode().hex().rjust(64, "0"), bytes=8)  # type: ignore[arg-type]
    for part, layer in (("embedding", 0), ("layer", 0), ("layer", 1), ("head", 1))
)
Placed = Mapping[tuple[int, int], Iterable[str]]


def replicas(placed: Placed, tier: Tier = "device") -> tuple[Replica, ...]:
    """Replicas of ``{(layer, expert): nodes}``; a node may be written as ``node/tier``."""
    pairs = [(key, *name.partition("/")[::2]) for key, nodes in placed.items() for name in nodes]
    return sorted_replicas(
        Replica(layer=key[0], expert=key[1], node=node, tier=own or tier)  # type: ignore[arg-type]
        for key, node, own in pairs
    )


def all_on(*nodes: str) -> dict[tuple[int, int], list[str]]:
    """Every expert on each of these nodes."""
    return {key: list(nodes) for key in KEYS}


def plan_through(
    *stages: Sequence[Replica],
    before: Sequence[Replica] = (),
    base_epoch: int = 0,
    ingresses: Iterable[str] = ("a",),
    routes: Iterable[Route] = (),
    trunk: Sequence[TrunkPath] | None = None,
    trunk_stage: int | None = None,
) -> Plan:
    """A plan that goes through these placements, one stage each."""
    steps: list[Step] = []
    held = set(before)
    for stage, after in enumerate(stages, start=1):
        changes = [("replicate", r) for r in after if r not in held]
        changes += [("drop", r) for r in sorted_replicas(held - set(after))]
        steps += (
            Step(stage=stage, action=action, layer=r.layer, expert=r.expert, node=r.node, tier=r.tier, bytes=BYTES)  # type: ignore[arg-type]
            for action, r in changes
        )
        steps.append(Step(stage=stage, action="switch"))
        held = set(after)
    return Plan(
        cluster="test",
        coordinator="127.0.0.1:7400",
        base_epoch=base_epoch,
        epoch=base_epoch + len(stages),
        model=MODEL,
        dtype="float32",
        placement=sorted_replicas(stages[-1]),
        routes=sorted_routes(routes),
        trunk=tuple(path(node, node, node) for node in ingresses) if trunk is None else tuple(trunk),
        trunk_stage=trunk_stage,
        steps=tuple(steps),
        summary=Summary(status="feasible", solver="hand", objective_name="none", objective=0.0, seconds=0.0),
    ).sealed()


def path(ingress: str, *nodes: str) -> TrunkPath:
    """The path of tokens of an ingress, with the node that runs each decoder layer."""
    segments: list[Segment] = []
    for layer, node in enumerate(nodes):
        if segments and segments[-1].node == node:
            segments[-1] = segments[-1].model_copy(update={"last_layer": layer})
        else:
            segments.append(Segment(node=node, first_layer=layer, last_layer=layer))
    return TrunkPath(ingress=ingress, segments=tuple(segments))


def route(ingress: str, key: tuple[int, int], holder: str, share: float = 1.0) -> Route:
    return Route(ingress=ingress, layer=key[0], expert=key[1], holder=holder, share=share)
