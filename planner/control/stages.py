"""What a plan's stages mean for each node: placements between epochs, and each node's assignment.

Decides which replicas and which part of the trunk a node has in an epoch, whom it calls for the other experts and
from whom it pulls. Pure: plan and catalogue in, assignments out. Must not know sockets, phases or which agents are
alive.

Flow: steps of a stage ──► placement and paths after it ──► per node: replicas with sources, routing, paths, trunk.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from schemas.messages import (
    AssignedReplica,
    AssignedTrunkPart,
    Assignment,
    Catalogue,
    Hop,
    PackedCatalogue,
    Record,
)
from schemas.paths import layers_run, path_nodes
from schemas.placement import Replica, Route, sorted_replicas
from schemas.plan import Plan, Step, TrunkPath
from schemas.precision import PackedLayout, Precision
from schemas.topology import TIERS, Tier

Placement = tuple[Replica, ...]
Paths = tuple[TrunkPath, ...]
Key = tuple[int, int]


class InconsistentPlan(ValueError):
    """Steps that do not lead to the plan's own placement, or that lose an expert; the message says which."""


def num_stages(plan: Plan) -> int:
    """Epochs between the plan's base and its own."""
    return plan.epoch - plan.base_epoch


def plan_nodes(plan: Plan) -> frozenset[str]:
    """Nodes that hold a replica at the end of a plan, or for a while on the way there, or lie on a token's path."""
    on_the_way = {step.node for step in plan.steps if step.action == "replicate" and step.node is not None}
    return frozenset({r.node for r in plan.placement} | path_nodes(plan.trunk) | on_the_way)


def paths_of(plan: Plan, epoch: int, before: Paths) -> Paths:
    """Return the paths in force in an epoch of a plan; `before` are those of the plan before."""
    return plan.trunk if epoch - plan.base_epoch >= (plan.trunk_stage or 1) else before


def require_whole_paths(plan: Plan) -> None:
    """Raise `InconsistentPlan` where a path is no way through all decoder layers, or is never in force."""
    if plan.trunk_stage is not None and plan.trunk_stage > num_stages(plan):
        raise InconsistentPlan(f"its paths begin with stage {plan.trunk_stage}, but it has {num_stages(plan)}")
    for path in plan.trunk:
        following = 0
        for segment in path.segments:
            if segment.first_layer != following or segment.last_layer < following:
                raise InconsistentPlan(
                    f"the path of {path.ingress} goes on with layers {segment.first_layer} … {segment.last_layer} on "
                    f"{segment.node} where layer {following} is next"
                )
            following = segment.last_layer + 1
        if following != plan.model.num_decoder_layers:
            raise InconsistentPlan(
                f"the path of {path.ingress} has {following} layers, the model {plan.model.num_decoder_layers}"
            )


def stage_placements(current: Placement, plan: Plan) -> list[Placement]:
    """Return the placement after each stage, checked to cover every expert and to end as the plan says.

    Raises
    ------
    InconsistentPlan
        The steps start from another placement, lose an expert's last replica, or do not reach the plan's placement.
    """
    by_stage: dict[int, list[Step]] = defaultdict(list)
    for step in plan.steps:
        by_stage[step.stage].append(step)
    if extra := sorted(stage for stage in by_stage if stage > num_stages(plan)):
        raise InconsistentPlan(f"stage {extra[0]} lies beyond epoch {plan.epoch}, which is stage {num_stages(plan)}")
    placements = []
    for stage in range(1, num_stages(plan) + 1):
        current = _after(current, by_stage[stage])
        _require_cover(current, plan, stage)
        placements.append(current)
    if current != sorted_replicas(plan.placement):
        odd = sorted(set(map(_text, current)) ^ set(map(_text, plan.placement)))
        raise InconsistentPlan(f"its steps do not lead to its placement: they differ in {', '.join(odd[:3])}")
    return placements


def _text(replica: Replica) -> str:
    return f"layer {replica.layer} expert {replica.expert} on {replica.node} ({replica.tier})"


def _after(placement: Placement, steps: Iterable[Step]) -> Placement:
    held: dict[tuple[int, int, str], set[Tier]] = defaultdict(set)
    for replica in placement:
        held[replica.layer, replica.expert, replica.node].add(replica.tier)
    for step in steps:
        if step.action == "switch":
            continue
        if step.layer is None or step.expert is None or step.node is None:
            raise InconsistentPlan(f"a {step.action} step of stage {step.stage} names no layer, expert or node")
        tiers = held[step.layer, step.expert, step.node]
        if step.action == "replicate":
            tiers.add(step.tier or "device")
        else:
            tiers.discard(step.tier or next(iter(tiers), "device"))
    doubled = [key for key, tiers in held.items() if len(tiers) > 1]
    if doubled:
        layer, expert, node = doubled[0]
        raise InconsistentPlan(f"layer {layer} expert {expert} would stay on {node} in two tiers")
    return sorted_replicas(
        Replica(layer=layer, expert=expert, node=node, tier=next(iter(tiers)))
        for (layer, expert, node), tiers in held.items()
        if tiers
    )


def _require_cover(placement: Placement, plan: Plan, stage: int) -> None:
    held = {replica.key for replica in placement}
    wanted = {(layer, expert) for layer in range(plan.model.layers) for expert in range(plan.model.experts)}
    if lost := sorted(wanted - held):
        layer, expert = lost[0]
        raise InconsistentPlan(
            f"after stage {stage} no node holds layer {layer} expert {expert} (and {len(lost) - 1} more)"
        )
    if foreign := sorted(held - wanted):
        raise InconsistentPlan(f"it places layer {foreign[0][0]} expert {foreign[0][1]}, which the model has not")


def assign(
    plan: Plan,
    *,
    epoch: int,
    before: Placement,
    after: Placement,
    catalogue: Catalogue,
    stores: Iterable[str],
    others: Iterable[str] = (),
    paths_before: Paths = (),
) -> Mapping[str, Assignment]:
    """Return every node's assignment for one epoch of a plan, those included that leave.

    Nodes that leave a path, or the plan, are told whom to call too: they have answers to finish.

    Parameters
    ----------
    before, after
        Placements of the epoch before and of this one: whoever held an expert before can be pulled from.
    stores
        Nodes with a store, asked after the holders.
    others
        Further nodes, which may have had a part in an older epoch.
    paths_before
        In force in the epoch before.
    """
    records = {(record.layer, record.expert): record for record in catalogue.records}
    missing = sorted({replica.key for replica in after} - records.keys())
    if missing:
        raise InconsistentPlan(f"no store has layer {missing[0][0]} expert {missing[0][1]}; run agent prepare again")
    lows = {each.node: each.precision for each in plan.precisions or ()}
    travel = _Travel(lows, {each.layout.precision: each for each in catalogue.packed})
    hints = {(s.layer, s.expert, s.node): s.source for s in plan.steps if s.action == "replicate" and s.source}
    holders_before, holders_after = _holders(before), _holders(after)
    paths, planned, stored = paths_of(plan, epoch, paths_before), plan_nodes(plan), sorted(stores)
    ingresses, on_path = {path.ingress for path in paths}, path_nodes((*paths, *paths_before))
    routes, final = _routes(plan.routes), epoch == plan.epoch
    nodes = {replica.node for replica in (*before, *after)} | planned | on_path | set(others)
    held: dict[str, list[AssignedReplica]] = {node: [] for node in nodes}
    for replica in after:
        hint = hints.get((replica.layer, replica.expert, replica.node))
        kind = travel.kind(replica.node, replica.tier)
        alike = [r.node for r in holders_before.get(replica.key, []) if travel.kind(r.node, r.tier) == kind]
        candidates = [*([hint] if hint in alike else []), *alike, *stored]
        packed = travel.record(kind, replica.key)
        held[replica.node].append(_assigned(replica, records[replica.key], packed, candidates))
    return {
        node: Assignment(
            cluster=plan.cluster,
            plan=plan.digest,
            epoch=epoch,
            ingress=node in ingresses,
            layout=catalogue.layout,
            replicas=tuple(held[node]),
            routing=_routing(node, holders_after, routes, records, final=final, travel=travel)
            if node in on_path or node not in planned
            else (),
            paths=tuple(path for path in paths if node in path_nodes((path,))),
            trunk=tuple(_trunk_parts(node, paths, catalogue, stored)),
            quality_budget=plan.quality_budget or 0.0,
            context=plan.context,
            precision=lows.get(node),
            packed_layout=travel.layout(node),
        )
        for node in sorted(nodes)
    }


def _trunk_parts(node: str, paths: Paths, catalogue: Catalogue, stores: list[str]) -> Iterator[AssignedTrunkPart]:
    """Yield the parts that a node's layers need: of each its own, the embedding at the first, the head at the last."""
    layers = layers_run(node, paths)
    sources = tuple(store for store in stores if store != node)
    for part in catalogue.trunk:  # the embedding counts as of the first layer, the head as of the last
        if part.layer in layers:
            yield AssignedTrunkPart(record=part, sources=sources)


def _assigned(replica: Replica, record: Record, packed: Record | None, candidates: list[str]) -> AssignedReplica:
    sources = tuple(dict.fromkeys(node for node in candidates if node != replica.node))
    return AssignedReplica(record=record, tier=replica.tier, sources=sources, packed=packed)


@dataclass(frozen=True)
class _Travel:
    """In which precision records come to nodes: to memory in the node's, where a store has them so.

    Attributes
    ----------
    lows
        In which nodes hold experts, where the plan says.
    packed
        What the store has, by precision.
    """

    lows: Mapping[str, Precision]
    packed: Mapping[Precision, PackedCatalogue]

    def kind(self, node: str, tier: Tier) -> Precision:
        """Return the precision of a replica's record."""
        low = self.lows.get(node, "checkpoint")
        return low if tier != "disk" and low in self.packed else "checkpoint"

    def record(self, kind: Precision, key: Key) -> Record | None:
        """Return the packed record of an expert; None in the checkpoint's precision."""
        return self.records[kind][key] if kind in self.packed else None

    @cached_property
    def records(self) -> Mapping[Precision, Mapping[Key, Record]]:
        """Packed records by precision and expert."""
        return {low: {(r.layer, r.expert): r for r in each.records} for low, each in self.packed.items()}

    def layout(self, node: str) -> PackedLayout | None:
        """Return how the packed records are laid out that come to a node; None where none do."""
        kind = self.kind(node, "device")
        return self.packed[kind].layout if kind in self.packed else None


def travelling_bytes(step: Step, plan: Plan, catalogue: Catalogue | None) -> int:
    """Return what a step brings over the network, or from a store: what the plan says, if the store has it so."""
    lows = {each.node: each.precision for each in plan.precisions or ()}
    packed = {each.layout.precision for each in catalogue.packed} if catalogue is not None else None
    low = lows.get(step.node or "", "checkpoint")
    is_whole = packed is not None and low != "checkpoint" and low not in packed
    return plan.model.expert_bytes if is_whole and step.tier != "disk" else step.bytes


def _holders(placement: Placement) -> dict[Key, list[Replica]]:
    """Replicas of each expert, those in the faster tier first."""
    holders: dict[Key, list[Replica]] = defaultdict(list)
    for replica in sorted(placement, key=lambda r: (r.layer, r.expert, TIERS.index(r.tier), r.node)):
        holders[replica.key].append(replica)
    return holders


def _routes(routes: Iterable[Route]) -> Mapping[tuple[str, int, int], list[Route]]:
    """Group routes by (ingress, layer, expert), the largest share first."""
    grouped: dict[tuple[str, int, int], list[Route]] = defaultdict(list)
    for route in routes:
        grouped[route.ingress, route.layer, route.expert].append(route)
    for entries in grouped.values():
        entries.sort(key=lambda route: (-route.share, route.holder))
    return grouped


def _routing(
    node: str,
    holders: Mapping[Key, list[Replica]],
    routes: Mapping[tuple[str, int, int], list[Route]],
    records: Mapping[Key, Record],
    *,
    final: bool,
    travel: _Travel,
) -> tuple[Hop, ...]:
    """Who computes each expert for `node`, where that is not simply itself.

    The plan's holders come first, then others to fall back on, `node` itself among them. Shares hold in the `final`
    epoch alone: before that, whoever has most of them and is a holder already gets every call. A record is named, to be
    cached, where a holder has it in the checkpoint's precision.
    """
    hops = []
    for (layer, expert), replicas in sorted(holders.items()):
        holding = [replica.node for replica in replicas]
        chosen = [r for r in routes.get((node, layer, expert), []) if r.holder in holding][: None if final else 1]
        if all(r.holder == node for r in chosen) and node in holding:
            continue
        names = tuple(dict.fromkeys([*(r.holder for r in chosen), *holding]))
        split = tuple(r.share for r in chosen) if len(chosen) > 1 else ()
        is_whole = any(r.node != node and travel.kind(r.node, r.tier) == "checkpoint" for r in replicas)
        name = records[layer, expert].sha256 if is_whole else ""
        hops.append(Hop(layer=layer, expert=expert, holders=names, shares=split, sha256=name))
    return tuple(hops)
