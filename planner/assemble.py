"""Puts a solved placement into a plan: replicas, routes, trunk paths, migration steps and a summary.

Decides how arrays become records. Must not know solvers. Flow: Problem + Result + Routing → `Plan`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.errors import PlannerError
from planner.inputs import Inputs
from planner.migration import Ground, Stage, plan_stages
from planner.objective import Judgement, Routing
from planner.problem import Bools, Problem
from planner.solvers.base import Result
from schemas.outcome import ExitCode
from schemas.placement import Replica, Route, sorted_replicas, sorted_routes
from schemas.plan import NodeSummary, Plan, Segment, Step, Summary, TrunkPath
from schemas.topology import TIERS, Tier
from schemas.units import format_bytes

_SHARE_FLOOR = 1e-6  # a smaller share of calls is a solver's rounding


class ForeignPlan(PlannerError):
    """The current plan belongs to another cluster or model."""

    exit_code = ExitCode.INVALID


@dataclass(frozen=True, eq=False)
class Solved:
    """A placement that was re-checked: what was found, who serves whom, what tokens meet."""

    problem: Problem
    result: Result
    placed: Bools
    routing: Routing
    judgement: Judgement
    objective_name: str


def make_plan(inputs: Inputs, solved: Solved, current: Plan | None) -> Plan:
    """Return the sealed plan that leads from `current` (nothing placed where None) to what was solved.

    Raises
    ------
    ForeignPlan
        `current` is of another cluster, model or dtype.
    UnsafePlan
        No order of steps keeps every expert within memory.
    """
    topology, problem = inputs.topology, solved.problem
    if current is not None:
        _require_same(inputs, current)
    placement, routes = placement_records(problem, solved.placed), route_records(problem, solved.routing)
    steps, stages = _steps(problem, placement, routes, current)
    base = 0 if current is None else current.epoch
    plan = Plan(
        cluster=topology.cluster,
        coordinator=topology.coordinator.endpoint,
        base_epoch=base,
        epoch=base + stages,
        model=inputs.model,
        dtype=topology.dtype,
        placement=placement,
        routes=routes,
        trunk=tuple(trunk_paths(problem, inputs.model.moe_layer_indices, inputs.model.num_decoder_layers)),
        steps=steps,
        summary=summarise(solved),
    )
    return plan.sealed()


def _require_same(inputs: Inputs, current: Plan) -> None:
    pairs = {
        "cluster": (current.cluster, inputs.topology.cluster),
        "model": (current.model, inputs.model),
        "dtype": (current.dtype, inputs.topology.dtype),
    }
    for name, (have, want) in pairs.items():
        if have != want:
            shown = (current.model.id, inputs.model.id) if name == "model" else (have, want)
            raise ForeignPlan(
                f"the current plan is of another {name}: it says {shown[0]}, the topology {shown[1]}"
                f"{' with other sizes' if shown[0] == shown[1] else ''}; solve without --current to start afresh"
            )


def placement_records(problem: Problem, placed: Bools) -> tuple[Replica, ...]:
    """Return a placement ``[P, L, E]`` as sorted records."""
    return sorted_replicas(
        Replica(layer=layer, expert=expert, node=problem.node_ids[problem.place_node[place]], tier=problem.tier(place))
        for place, layer, expert in np.argwhere(placed).tolist()
    )


def route_records(problem: Problem, routing: Routing) -> tuple[Route, ...]:
    """Return whom each caller calls for every expert that it does not serve wholly itself."""
    callers = np.unique(problem.trunk_node)
    return sorted_routes(_split_routes(problem, routing, callers))


def _split_routes(problem: Problem, routing: Routing, callers: Sequence[int]) -> Iterator[Route]:
    names = problem.node_ids
    for caller in callers:
        holder = problem.place_node[routing.holder[caller]]
        split = np.zeros(holder.shape, dtype=bool)
        if routing.share is not None:
            per_place = np.where(routing.share[caller] < _SHARE_FLOOR, 0.0, routing.share[caller])
            per_place = per_place / per_place.sum(axis=0)
            split = (per_place > 0).sum(axis=0) > 1
            for place, layer, expert in np.argwhere((per_place > 0) & split).tolist():
                share = float(per_place[place, layer, expert])
                node = names[problem.place_node[place]]
                yield Route(ingress=names[caller], layer=layer, expert=expert, holder=node, share=share)
        for layer, expert in np.argwhere((holder != caller) & ~split).tolist():
            yield Route(ingress=names[caller], layer=layer, expert=expert, holder=names[holder[layer, expert]])


def trunk_paths(problem: Problem, moe_layers: Sequence[int], decoder_layers: int) -> Iterator[TrunkPath]:
    """Yield per ingress which node runs which decoder layers; a layer without experts goes with the next that has."""
    for ingress, nodes in zip(problem.ingress_node.tolist(), problem.trunk_node.tolist(), strict=True):
        changes = [layer for layer in range(1, len(nodes)) if nodes[layer] != nodes[layer - 1]]
        starts = [0, *(moe_layers[layer - 1] + 1 for layer in changes), decoder_layers]
        runners = [nodes[layer] for layer in (0, *changes)]
        segments = tuple(
            Segment(node=problem.node_ids[node], first_layer=first, last_layer=after - 1)
            for node, first, after in zip(runners, starts[:-1], starts[1:], strict=True)
        )
        yield TrunkPath(ingress=problem.node_ids[ingress], segments=segments)


def _steps(
    problem: Problem, placement: tuple[Replica, ...], routes: tuple[Route, ...], current: Plan | None
) -> tuple[tuple[Step, ...], int]:
    """Return the steps from the current plan's placement and their number of stages."""
    before = () if current is None else current.placement
    places = list(
        dict.fromkeys(
            [(problem.node_ids[n], TIERS[t]) for n, t in zip(problem.place_node, problem.place_tier, strict=True)]
            + [(replica.node, replica.tier) for replica in before]
        )
    )
    index = {place: number for number, place in enumerate(places)}
    nodes = [*problem.node_ids, *sorted({node for node, _ in places} - set(problem.node_ids))]
    count = problem.layers * problem.experts
    held, target = np.zeros((len(places), count), dtype=bool), np.zeros((len(places), count), dtype=bool)
    for records, array in ((before, held), (placement, target)):
        for replica in records:
            array[index[replica.node, replica.tier], replica.layer * problem.experts + replica.expert] = True
    extra = len(places) - problem.num_places  # places that the topology no longer has: nothing new goes there
    ground = Ground(
        place_node=np.array([nodes.index(node) for node, _ in places]),
        slots=np.concatenate([problem.slots, np.zeros(extra, dtype=np.int64)]),
        allowed=np.concatenate(
            [problem.allowed.reshape(problem.num_places, count), np.zeros((extra, count), dtype=bool)]
        ),
    )
    stages = plan_stages(held, target, ground, keep=problem.required)
    if not stages and current is not None and current.routes != routes:
        return (Step(stage=1, action="switch"),), 1
    steps: list[Step] = []
    for number, stage in enumerate(stages, start=1):
        steps.extend(_stage_steps(problem, number, stage, held, ground, nodes, [tier for _, tier in places]))
        held = stage.after(held)
    return tuple(steps), len(stages)


def _stage_steps(
    problem: Problem,
    number: int,
    stage: Stage,
    held: Bools,
    ground: Ground,
    nodes: Sequence[str],
    tiers: Sequence[Tier],
) -> Iterator[Step]:
    size = problem.expert_bytes
    sources = _nearest_sources(problem, ground.nodes(held))
    for expert, place in np.argwhere(stage.replicate.T).tolist():
        node = int(ground.place_node[place])
        source = int(sources[node, expert])
        yield Step(
            stage=number, action="replicate", layer=expert // problem.experts, expert=expert % problem.experts,
            node=nodes[node], tier=tiers[place], bytes=size, source=nodes[source] if source >= 0 else None,
        )  # fmt: skip
    yield Step(stage=number, action="switch")
    for expert, place in np.argwhere(stage.drop.T).tolist():
        yield Step(
            stage=number, action="drop", layer=expert // problem.experts, expert=expert % problem.experts,
            node=nodes[ground.place_node[place]], tier=tiers[place], bytes=size,
        )  # fmt: skip


def _nearest_sources(problem: Problem, holding: Bools) -> np.ndarray:
    """Node to bring an expert from, the quickest present holder, int64 ``[N, K]``; -1 where nobody holds it."""
    total = len(holding)
    quickest = np.full((total, total), np.finfo(np.float64).max)  # nodes that left the topology come last
    quickest[: problem.num_nodes, : problem.num_nodes] = problem.transfer_s
    sources = np.empty(holding.shape, dtype=np.int64)
    for node in range(total):
        sources[node] = np.where(holding, quickest[node][:, None], np.inf).argmin(axis=0)
    return np.where(holding.any(axis=0), sources, -1)


def summarise(solved: Solved) -> Summary:
    """Return what the plan promises and how it was found."""
    result, judgement = solved.result, solved.judgement
    if result.objective is None:
        raise AssertionError("only a placement with an objective is summarised")
    return Summary(
        status="optimal" if result.status.value == "optimal" else "feasible",
        solver=result.solver,
        objective_name=solved.objective_name,
        objective=result.objective,
        bound=result.bound,
        gap=result.gap,
        stop_reason=result.stop_reason.value,
        seconds=round(result.seconds, 6),
        remote_call_share=judgement.remote_call_share,
        any_remote_share=judgement.any_remote_share,
        predicted_latency_s=judgement.predicted_latency_s,
        nodes=tuple(_node_summary(solved, node) for node in range(solved.problem.num_nodes)),
    )


def _node_summary(solved: Solved, node: int) -> NodeSummary:
    problem, judgement = solved.problem, solved.judgement
    here = problem.place_node == node
    experts = int(solved.placed[here].sum())
    ingress = np.flatnonzero(problem.ingress_node == node)
    shares = (
        {
            "remote_call_share": float(judgement.remote_calls[ingress[0]]),
            "any_remote_share": float(judgement.any_remote[ingress[0]]),
            "predicted_latency_s": float(judgement.latency_s[ingress[0]]),
        }
        if len(ingress)
        else {}
    )
    return NodeSummary(
        id=problem.node_ids[node],
        experts=experts,
        bytes=experts * problem.expert_bytes,
        capacity=int(problem.capacity_bytes[here].sum()),
        trunk_bytes=int(problem.trunk_bytes[node]),
        kv_bytes=int(problem.kv_bytes[node]),
        why=_why(solved, node),
        **shares,
    )


def _why(solved: Solved, node: int) -> str:
    """Say in a sentence what the node's replicas are for and what keeps it from holding more."""
    problem = solved.problem
    held = problem.held(solved.placed)
    here = held[node]
    if not here.any():
        return "no room for experts" if problem.node_slots[node] == 0 else "nobody gains from replicas here"
    used = problem.caller_demand[node] > 0
    own, only = int((here & used).sum()), int((here & ~used).sum())
    last = int((here & (held.sum(axis=0) == problem.required)).sum())
    free = int(problem.node_slots[node] - here.sum())
    room = "full" if free == 0 else f"{format_bytes(free * problem.expert_bytes)} left"
    return f"{own} experts its own tokens ask for, {only} kept for others, {last} that no other node could drop; {room}"
