"""From a plan file back to arrays: who holds what, who calls whom, where the trunk of each layer runs.

Decides that plan and topology belong together. Must not know how either was made.
"""

from collections.abc import Sequence

import numpy as np

from planner.errors import PlannerError
from planner.objective import Routing, nearest
from planner.problem import Bools, Problem
from schemas.outcome import ExitCode
from schemas.plan import Plan
from schemas.topology import TIERS


class UnlikePlan(PlannerError):
    """A plan that does not fit the topology it shall be simulated on."""

    exit_code = ExitCode.INVALID

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(
            "\n".join(f"{reason}; simulate a plan on the topology it was solved for" for reason in reasons)
        )


def placed_by(plan: Plan, problem: Problem) -> Bools:
    """Return a plan's placement, bool ``[P, L, E]``.

    Raises
    ------
    UnlikePlan
        Layers, experts, nodes or tiers that the problem does not have.
    """
    if (plan.model.layers, plan.model.experts) != (problem.layers, problem.experts):
        have, want = (f"{m.layers} layers × {m.experts} experts" for m in (plan.model, problem))
        raise UnlikePlan([f"the plan is for {have}, the topology's model has {want}"])
    places = {
        (problem.node_ids[node], TIERS[tier]): place
        for place, (node, tier) in enumerate(zip(problem.place_node, problem.place_tier, strict=True))
    }
    if unknown := sorted({(r.node, r.tier) for r in plan.placement} - places.keys()):
        raise UnlikePlan(
            [f"the plan keeps experts at {node} ({tier}), where there is no room" for node, tier in unknown]
        )
    placed = np.zeros((problem.num_places, problem.layers, problem.experts), dtype=bool)
    for replica in plan.placement:
        placed[places[replica.node, replica.tier], replica.layer, replica.expert] = True
    if not placed.any(axis=0).all():
        layer, expert = np.argwhere(~placed.any(axis=0))[0]
        raise UnlikePlan([f"no node of the plan holds layer {layer} expert {expert}"])
    return placed


def routing_by(plan: Plan, problem: Problem) -> Routing:
    """Return whom each caller calls: the plan's routes, else its own replica, else the nearest."""
    placed = placed_by(plan, problem)
    holder = nearest(problem, placed, "additive-latency").holder
    index = {node: number for number, node in enumerate(problem.node_ids)}
    split: list[tuple[int, int, int, int, float]] = []
    for route in plan.routes:
        at = np.flatnonzero(placed[:, route.layer, route.expert] & (problem.place_node == index.get(route.holder, -1)))
        if not len(at) or route.ingress not in index:
            raise UnlikePlan([f"the plan sends layer {route.layer} expert {route.expert} of {route.ingress} to "
                              f"{route.holder}, which does not hold it"])  # fmt: skip
        caller = index[route.ingress]
        holder[caller, route.layer, route.expert] = at[0]
        if route.share < 1:
            split.append((caller, int(at[0]), route.layer, route.expert, route.share))
    if not split:
        return Routing(holder)
    share = (holder[:, None] == np.arange(problem.num_places)[None, :, None, None]).astype(np.float64)
    for caller, _, layer, expert, _ in split:
        share[caller, :, layer, expert] = 0.0
    for caller, place, layer, expert, part in split:
        share[caller, place, layer, expert] = part
    return Routing(share.argmax(axis=1), share)


def with_trunk_of(plan: Plan, problem: Problem) -> Problem:
    """Return the problem with the trunk where the plan runs it."""
    index = {node: number for number, node in enumerate(problem.node_ids)}
    trunk = problem.trunk_node.copy()
    rows = {node: row for row, node in enumerate(problem.ingress_node.tolist())}
    decoder = np.array(plan.model.moe_layer_indices)
    for path in plan.trunk:
        row = rows.get(index.get(path.ingress, -1))
        if row is not None:
            for segment in path.segments:
                if segment.node not in index:
                    raise UnlikePlan(
                        [f"the plan runs trunk layers on {segment.node}, which the topology does not have"]
                    )
                trunk[row, (decoder >= segment.first_layer) & (decoder <= segment.last_layer)] = index[segment.node]
    return problem.with_trunk(trunk)


def require_cluster(plan: Plan, cluster: str) -> None:
    """Raise `UnlikePlan` where a plan is of another cluster than the topology."""
    if plan.cluster != cluster:
        raise UnlikePlan([f"the plan is of cluster {plan.cluster!r}, the topology of {cluster!r}"])
