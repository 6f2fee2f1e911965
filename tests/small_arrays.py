"""Small problems as plain arrays, drawn from a seed, with a brute force over every placement."""

import dataclasses
import itertools

import highspy
import numpy as np

from planner.solvers.decomposition.arrays import EvaluationRows, Makespan, NewCopies, PlacementArrays
from planner.solvers.decomposition.evaluate import admissible, holders_are_feasible


def draw_arrays(seed: int, *, coupled: bool) -> PlacementArrays:
    """A random problem of at most 4 experts and 4 places, small enough to try every placement."""
    rng = np.random.default_rng(seed)
    nodes, layers, per_layer = rng.integers(1, 4), rng.integers(1, 3), rng.integers(1, 3)
    experts = int(layers * per_layer)
    node_of_place = np.sort(np.concatenate([np.arange(nodes), rng.integers(0, nodes, rng.integers(0, 2))]))
    places, required = len(node_of_place), int(rng.integers(1, min(nodes, 2) + 1))
    ingresses = int(rng.integers(1, 4))
    demand = rng.choice([0.0, 1.0, 2.5], (ingresses, experts)) * rng.uniform(0.5, 1.5, (ingresses, experts))
    arrays = PlacementArrays(
        demand=demand,
        cost=rng.choice([0.0, 0.3, 1.0, 2.0], (ingresses, places)) * rng.uniform(0.9, 1.1),
        capacity=rng.uniform(0.5, experts + 2, places) * 7.0,
        expert_bytes=7.0,
        node_of_place=node_of_place,
        layer_of_expert=np.repeat(np.arange(layers), per_layer),
        required=required,
        domain_of_node=rng.integers(0, nodes, nodes) if rng.random() < 0.2 else None,
        allowed=rng.random((experts, places)) < 0.9 if rng.random() < 0.3 else None,
        pinned=rng.random((experts, nodes)) < 0.1 if rng.random() < 0.3 else None,
    )
    if rng.random() < 0.3:
        is_new = rng.random((experts, places)) < 0.6
        limit = int(rng.integers(experts, 2 * experts + 1)) if rng.random() < 0.5 else None
        price = np.where(is_new, rng.uniform(0, 1), 0.0)
        arrays = dataclasses.replace(arrays, new_copies=NewCopies(price, is_new, limit))
    return _couple(arrays, rng) if coupled else arrays


def _couple(arrays: PlacementArrays, rng: np.random.Generator) -> PlacementArrays:
    kind = rng.integers(3)
    if kind != 1:
        weight = rng.choice([0.0, 1.0, 2.0], (int(rng.integers(1, 3)), *arrays.cost.shape))
        arrays = dataclasses.replace(
            arrays, rows=EvaluationRows(weight, arrays.demand.sum() * rng.uniform(0.4, 2.0, len(weight)))
        )
    if kind != 0:
        makespan = Makespan(rng.uniform(0, 2, arrays.num_layers), rng.uniform(0, 2, arrays.num_places))
        arrays = dataclasses.replace(arrays, makespan=makespan)
    return arrays


def brute_force(arrays: PlacementArrays) -> float:
    """Optimum over every placement; inf where none is feasible."""
    rows = np.array(list(itertools.product([False, True], repeat=arrays.num_places)))
    options = [rows[admissible(arrays, rows, np.full(len(rows), expert))] for expert in range(arrays.num_experts)]
    best = np.inf
    for choice in itertools.product(*options):
        holders = np.array(choice)
        if holders_are_feasible(arrays, holders):
            best = min(
                best, _serving_optimum(arrays, holders) if not arrays.is_separable else _nearest(arrays, holders)
            )
    return best


def _nearest(arrays: PlacementArrays, holders: np.ndarray) -> float:
    near = np.where(holders[None], arrays.cost[:, None, :], np.inf).min(axis=2)
    new = 0.0 if arrays.new_copies is None else arrays.new_copies.price[holders].sum()
    return float((arrays.demand * near).sum() + new)


def _serving_optimum(arrays: PlacementArrays, holders: np.ndarray) -> float:
    """Best shares for given holders: a linear program written straight from the formulation."""
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    cells = [
        (i, k, p)
        for i in range(len(arrays.demand))
        for k in range(arrays.num_experts)
        for p in np.flatnonzero(holders[k])
    ]
    share = {
        cell: model.addVariable(0, 1, arrays.demand[cell[0], cell[1]] * arrays.cost[cell[0], cell[2]]) for cell in cells
    }
    for i in range(len(arrays.demand)):
        for k in range(arrays.num_experts):
            model.addConstr(sum(share[i, k, p] for p in np.flatnonzero(holders[k])) == 1)
    if arrays.rows is not None:
        for weight, limit in zip(arrays.rows.weight, arrays.rows.limit, strict=True):
            model.addConstr(
                sum(share[i, k, p] * (arrays.demand[i, k] * weight[i, p]) for i, k, p in cells) + 0 * share[cells[0]]
                <= limit
            )
    if arrays.makespan is not None:
        for layer in range(arrays.num_layers):
            height = model.addVariable(0, highspy.kHighsInf, arrays.makespan.weight[layer])
            for node in range(arrays.num_nodes):
                load = sum(
                    share[i, k, p] * (arrays.demand[i, k] * arrays.makespan.service[p])
                    for i, k, p in cells
                    if arrays.layer_of_expert[k] == layer and arrays.node_of_place[p] == node
                )
                model.addConstr(load - height <= 0)
    model.run()
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return np.inf
    new = 0.0 if arrays.new_copies is None else arrays.new_copies.price[holders].sum()
    return float(model.getInfo().objective_function_value + new)


def permuted(arrays: PlacementArrays, seed: int) -> PlacementArrays:
    rng = np.random.default_rng(seed)
    places, experts = rng.permutation(arrays.num_places), rng.permutation(arrays.num_experts)
    experts = experts[np.argsort(arrays.layer_of_expert[experts], kind="stable")]  # layers stay in order
    new = arrays.new_copies
    return dataclasses.replace(
        arrays,
        demand=arrays.demand[:, experts],
        cost=arrays.cost[:, places],
        capacity=arrays.capacity[places],
        node_of_place=arrays.node_of_place[places],
        allowed=None if arrays.allowed is None else arrays.allowed[np.ix_(experts, places)],
        pinned=None if arrays.pinned is None else arrays.pinned[experts],
        new_copies=None
        if new is None
        else NewCopies(new.price[np.ix_(experts, places)], new.is_new[np.ix_(experts, places)], new.limit),
    )
