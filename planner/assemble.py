"""Puts a solved placement into a plan: replicas, routes, trunk paths, migration steps and a summary.

Decides how arrays become records. Must not know solvers. Flow: Problem + Result + Routing → `Plan`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.errors import PlannerError
from planner.inputs import Inputs
from planner.objective import Judgement, ObjectiveName, Routing, link_load, node_load
from planner.precision import expected_rise, left_of
from planner.problem import Bools, Ints, Problem
from planner.rooms import Rooms
from planner.solvers.base import Result
from planner.steps import Migration, migration_steps
from planner.trunk.story import path_summaries
from planner.trunk.trials import Trial
from schemas.outcome import ExitCode
from schemas.placement import Replica, Route, sorted_replicas, sorted_routes
from schemas.plan import (
    LinkSummary,
    NodePrecision,
    NodeSummary,
    Plan,
    PrecisionSummary,
    Segment,
    Step,
    Summary,
    TrunkPath,
)
from schemas.units import format_bytes

_SHARE_FLOOR = 1e-6  # a smaller share of calls is a solver's rounding


class ForeignPlan(PlannerError):
    """The current plan belongs to another cluster or model."""

    exit_code = ExitCode.INVALID


@dataclass(frozen=True, eq=False)
class Solved:
    """A placement that was re-checked: what was found, who serves whom, what tokens meet.

    `problem` has the trunk where it was decided to run; `trials` are the trunks that were tried, where it may move.
    """

    problem: Problem
    result: Result
    placed: Bools
    routing: Routing
    judgement: Judgement
    objective_name: ObjectiveName
    asked_gap: float
    queued_latency_s: float | None = None
    trials: tuple[Trial, ...] = ()
    spared_any_remote_share: float | None = None


def make_plan(inputs: Inputs, solved: Solved, current: Plan | None) -> Plan:
    """Return the sealed plan that leads from `current` (nothing placed where None) to what was solved.

    Replicas come from where the schedule of transfers says, which spreads them over holders and links.

    Raises
    ------
    ForeignPlan
        `current` is of another cluster, model or dtype.
    UnsafePlan
        No order of steps keeps every expert, and the trunks of before and after, within memory.
    """
    topology = inputs.topology
    if current is not None:
        require_same(inputs, current)
    routes = route_records(solved.problem, solved.routing)
    placement, trunk, (steps, stages, trunk_stage) = plan_steps(inputs, solved, current)
    told = precision_summary(inputs, solved)
    budget = topology.quality.budget
    quality = (left_of(budget, told.rise) if told is not None and told.rise is not None else budget) or None
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
        trunk=trunk,
        trunk_stage=trunk_stage,
        quality_budget=quality,
        precisions=tuple(held_in(inputs, solved.problem)) or None,
        context=topology.context,
        steps=steps,
        summary=_with_precisions(summarise(solved), solved.problem, inputs, told),
    )
    if not stages and current is not None and _differ(current, plan):
        plan = plan.model_copy(update={"steps": (Step(stage=1, action="switch"),), "epoch": base + 1})
    return plan.sealed()


def held_in(inputs: Inputs, problem: Problem) -> Iterator[NodePrecision]:
    """Yield in which precision nodes hold experts, those of which that was said, in order of ids."""
    for number, node in sorted(enumerate(inputs.topology.nodes), key=lambda pair: pair[1].id):
        if node.precision is not None:
            size = int(problem.room.record_bytes[number].min())
            yield NodePrecision(node=node.id, precision=node.precision, expert_bytes=size)


def precision_summary(inputs: Inputs, solved: Solved) -> PrecisionSummary | None:
    """Return what the precisions of nodes cost with this placement; None where none are said."""
    if all(node.precision is None for node in inputs.topology.nodes):
        return None
    rise = rise_of(inputs, solved)
    return PrecisionSummary(rise=rise, budget=inputs.topology.quality.budget)


def rise_of(inputs: Inputs, solved: Solved) -> float | None:
    """Rise of perplexity of the ingress that loses most; None where calibration does not tell."""
    held = inputs.precisions
    if set(held) == {"checkpoint"}:
        return 0.0
    if inputs.costs is None:
        return None
    rise = expected_rise(solved.problem, solved.routing, held, inputs.costs)
    return None if rise is None else float(rise.max())


def _with_precisions(summary: Summary, problem: Problem, inputs: Inputs, told: PrecisionSummary | None) -> Summary:
    """Say of each node in which precision it holds experts, and how many of them fit because of that."""
    if told is None:
        return summary
    plain = problem.capacity_bytes // problem.expert_bytes
    nodes = []
    for number, (node, said) in enumerate(zip(inputs.topology.nodes, summary.nodes, strict=True)):
        why, here = said.why, problem.place_node == number
        if node.precision not in {None, "checkpoint"}:
            fit, fewer = int(problem.slots[here].sum()), int(plain[here].sum())
            why = f"in {node.precision} room for {fit} experts, not {fewer}: {why}"
        nodes.append(said.model_copy(update={"precision": node.precision, "why": why}))
    return summary.model_copy(update={"nodes": tuple(nodes), "precision": told})


def plan_steps(
    inputs: Inputs, solved: Solved, current: Plan | None
) -> tuple[tuple[Replica, ...], tuple[TrunkPath, ...], Migration]:
    """Return replicas, paths and the steps that lead to both from `current`; raises `UnsafePlan` as `make_plan`."""
    problem = solved.problem
    placement = placement_records(problem, solved.placed)
    trunk = tuple(trunk_paths(problem, inputs.model.moe_layer_indices, inputs.model.num_decoder_layers))
    rooms = None
    if current is not None and current.trunk != trunk:
        rooms = Rooms.between(problem.room, inputs.model, current.trunk, trunk)
    before = current.placement if current else ()
    return placement, trunk, migration_steps(problem, before, placement, rooms)


def _differ(current: Plan, plan: Plan) -> bool:
    """Whether agents must hear of something beside placement and paths; a plan may not say its context."""
    told = (current.routes, current.quality_budget, current.context or plan.context, current.precisions)
    return told != (plan.routes, plan.quality_budget, plan.context, plan.precisions)


def require_same(inputs: Inputs, current: Plan) -> None:
    """Raise `ForeignPlan` where a plan is of another cluster, model or dtype, or in precisions that cannot change."""
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
    for node in inputs.topology.nodes:
        held = next((each.precision for each in current.precisions or () if each.node == node.id), None)
        if held not in {None, "checkpoint", node.precision}:
            raise ForeignPlan(
                f"node {node.id} holds experts in {held} under the current plan and is asked to hold them "
                f"{'as it likes' if node.precision is None else f'in {node.precision}'}; of that nothing else can be "
                f"made: say precision: {held}, or apply a plan first that gives {node.id} nothing"
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


def _split_routes(problem: Problem, routing: Routing, callers: Ints) -> Iterator[Route]:
    names = problem.node_ids
    for caller in callers.tolist():
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
        links=tuple(_link_summaries(solved)),
        queued_latency_s=solved.queued_latency_s,
        paths=path_summaries(solved.problem, solved.routing, solved.trials),
        spared_any_remote_share=solved.spared_any_remote_share,
    )


def _link_summaries(solved: Solved) -> Iterator[LinkSummary]:
    problem = solved.problem
    load = link_load(problem, solved.routing) + problem.hop_load
    for ends, sent, rate in zip(problem.link_ends.tolist(), load.tolist(), problem.link_rate.tolist(), strict=True):
        first, second = (problem.node_ids[end] for end in ends)
        yield LinkSummary(between=(first, second), bytes_per_s=sent, utilisation=sent / rate)


def _node_summary(solved: Solved, node: int) -> NodeSummary:
    problem, judgement = solved.problem, solved.judgement
    here = problem.place_node == node
    experts = int(solved.placed[here].sum())
    ingress = np.flatnonzero(problem.ingress_node == node)
    shares: dict[str, Any] = (
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
        bytes=int((solved.placed[here].sum(axis=(1, 2)) * problem.place_bytes[here]).sum()),
        capacity=int(problem.capacity_bytes[here].sum()),
        trunk_bytes=int(problem.trunk_bytes[node]),
        kv_bytes=int(problem.kv_bytes[node]),
        why=_why(solved, node),
        utilisation=float(node_load(problem, solved.routing)[node]),
        **shares,
    )


def _why(solved: Solved, node: int) -> str:
    """Say in a sentence what the node's replicas are for and what keeps it from holding more."""
    problem = solved.problem
    held = problem.held(solved.placed)
    here = held[node]
    if not here.any():
        return "no room for experts" if problem.node_slots[node] == 0 else "nobody gains from replicas here"
    here_places = problem.place_node == node
    used = problem.caller_demand[node] > 0
    own, only = int((here & used).sum()), int((here & ~used).sum())
    last = int((here & (held.sum(axis=0) == problem.required)).sum())
    free = int(problem.node_slots[node] - here.sum())
    room = "full" if free == 0 else f"{format_bytes(free * int(problem.place_bytes[here_places].max()))} left"
    room = "nothing is missing" if here.all() else room
    last_text = "held nowhere else" if problem.required == 1 else f"that {problem.required} nodes must hold"
    return f"{own} experts its own tokens ask for, {only} kept for others; {last} {last_text}; {room}"
