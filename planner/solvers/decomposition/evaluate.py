"""What a placement costs and whether it keeps every constraint, on plain arrays.

Decides nothing. Must not know how placements are found: every incumbent passes through here.
"""

import numpy as np

from planner.solvers.decomposition.arrays import Bools, Floats, Incumbent, Ints, PlacementArrays, Places, Serving
from planner.solvers.decomposition.holder_sets import num_domains

ROW_SLACK = 1e-6  # relative; HiGHS keeps rows to about 1e-7


def holders_are_feasible(arrays: PlacementArrays, holders: Bools) -> bool:
    """Whether memory, tiers, domains, bans, pins and the limit of new copies are kept by `holders` `[K, P]`."""
    if (holders.sum(axis=0) > arrays.slots).any() or not admissible(arrays, holders, np.arange(len(holders))).all():
        return False
    new = arrays.new_copies
    return new is None or new.limit is None or int((holders & new.is_new).sum()) <= new.limit


def admissible(arrays: PlacementArrays, holders: Bools, experts: Ints) -> Bools:
    """Whether each row of `holders` `[X, P]` is a set that `experts` `[X]` may have: tiers, domains, bans, pins."""
    on_node = np.zeros((len(holders), arrays.num_nodes), dtype=np.int64)
    for place, node in enumerate(arrays.node_of_place):
        on_node[:, node] += holders[:, place]
    fine = (on_node <= 1).all(axis=1) & (num_domains(arrays, holders) >= max(arrays.required, 1))
    if arrays.allowed is not None:
        fine &= ~(holders & ~arrays.allowed[experts]).any(axis=1)
    if arrays.pinned is not None:
        fine &= ~(arrays.pinned[experts] & (on_node == 0)).any(axis=1)
    return np.asarray(fine)


def nearest_places(arrays: PlacementArrays, holders: Bools, costs: Floats) -> Places:
    """Return the cheapest holder `[I, K]` for each ingress at costs `[L', I, P]`; ties go to the lower place."""
    layer = arrays.layer_of_expert if len(costs) > 1 else np.zeros(arrays.num_experts, dtype=np.int64)
    return nearest_holders(costs, layer, holders)[1]


def nearest_holders(costs: Floats, layer: Ints, holders: Bools) -> tuple[Floats, Places]:
    """Return cost and place of the cheapest holder, `[I, X]`, for rows `holders` `[X, P]` of layers `[X]`."""
    best = np.full((costs.shape[1], len(holders)), np.inf)
    place = np.zeros(best.shape, dtype=np.int16)
    for p in range(holders.shape[1]):
        rows = np.flatnonzero(holders[:, p])
        cost = costs[layer[rows], :, p].T
        closer = cost < best[:, rows]
        best[:, rows] = np.where(closer, cost, best[:, rows])
        place[:, rows] = np.where(closer, p, place[:, rows])
    return best, place


def serve_whole(place: Places) -> Serving:
    """Return the serving in which `place` `[I, K]` serves all of each ingress's demand."""
    num_ingress, num_experts = place.shape
    expert = np.repeat(np.arange(num_experts), num_ingress)
    ingress = np.tile(np.arange(num_ingress), num_experts)
    return Serving(ingress, expert, place.T.reshape(-1).astype(np.int64), np.ones(len(expert)))


def objective_of(arrays: PlacementArrays, holders: Bools, serving: Serving) -> float:
    """Σ d a c + price of new copies + Σ weight · heaviest node per layer, s."""
    flow = arrays.demand[serving.ingress, serving.expert] * serving.share
    total = float(flow @ arrays.cost[serving.ingress, serving.place])
    if arrays.new_copies is not None:
        total += float(arrays.new_copies.price[holders].sum())
    if arrays.makespan is not None:
        load = np.zeros((arrays.num_layers, arrays.num_nodes))
        cell = (arrays.layer_of_expert[serving.expert], arrays.node_of_place[serving.place])
        np.add.at(load, cell, flow * arrays.makespan.service[serving.place])
        total += float(arrays.makespan.weight @ load.max(axis=1))
    return total


def rows_are_kept(arrays: PlacementArrays, serving: Serving) -> bool:
    """Whether load and link rows are kept, within rounding."""
    if arrays.rows is None:
        return True
    flow = arrays.demand[serving.ingress, serving.expert] * serving.share
    use = arrays.rows.weight[:, serving.ingress, serving.place] @ flow
    return bool((use <= arrays.rows.limit * (1 + ROW_SLACK) + 1e-12).all())


def worst_cost(arrays: PlacementArrays) -> float:
    """Cost that no placement exceeds, s: a problem whose bound lies above it has none."""
    asked = arrays.demand.sum(axis=1)
    total = float(asked @ arrays.cost.max(axis=1))
    if arrays.new_copies is not None:
        total += float(arrays.new_copies.price.sum())
    if arrays.makespan is not None:
        total += float(arrays.makespan.weight.max() * arrays.makespan.service.max() * asked.sum())
    return total * (1 + 1e-9) + 1e-12


def as_incumbent(arrays: PlacementArrays, holders: Bools, serving: Serving) -> Incumbent | None:
    """Return the placement with its objective; None where it breaks a constraint."""
    if not holders_are_feasible(arrays, holders) or not rows_are_kept(arrays, serving):
        return None
    return Incumbent(holders, serving, objective_of(arrays, holders, serving))


def served_by_nearest(arrays: PlacementArrays, holders: Bools, costs: Floats) -> Incumbent | None:
    """Return the placement where each ingress asks its cheapest holder at `costs` `[L', I, P]`; None if it breaks."""
    if not holders.any(axis=1).all():
        return None
    return as_incumbent(arrays, holders, serve_whole(nearest_places(arrays, holders, costs)))
