"""Placement problems generated from a seed, at any size.

Demand of each node mixes a popularity that all share with one of its own (both Zipf, shuffled per layer); costs are
symmetric and uniform in 0.5 … 3; memory is uneven and adds up to `fill` times all experts.
"""

import dataclasses

import numpy as np

from planner.solvers.decomposition.arrays import EvaluationRows, Makespan, PlacementArrays


def generate(
    layers: int, experts: int, nodes: int, *, fill: float = 1.3, seed: int = 0, zipf: float = 1.0
) -> PlacementArrays:
    """One tier per node, one expert byte per slot, no rows."""
    rng = np.random.default_rng(seed)
    shape = np.tile(1 / np.arange(1, experts + 1) ** zipf, (layers, 1))
    shared = rng.permuted(shape, axis=1)
    demand = np.empty((nodes, layers * experts))
    for node in range(nodes):
        mixed = 0.5 * shared + 0.5 * rng.permuted(shape, axis=1)
        mixed /= mixed.sum(axis=1, keepdims=True)
        demand[node] = (mixed * rng.uniform(0.5, 2)).reshape(-1)
    cost = rng.uniform(0.5, 3, (nodes, nodes))
    cost = (cost + cost.T) / 2
    np.fill_diagonal(cost, 0)
    share = rng.uniform(0.5, 2, nodes)
    slots = np.minimum(np.floor(share / share.sum() * layers * experts * fill), layers * experts)
    return PlacementArrays(
        demand=demand,
        cost=cost,
        capacity=slots,
        expert_bytes=1.0,
        node_of_place=np.arange(nodes),
        layer_of_expert=np.repeat(np.arange(layers), experts),
    )


def generate_regions(
    layers: int, experts: int, nodes: int, *, regions: int = 10, fill: float = 1.3, seed: int = 0
) -> PlacementArrays:
    """Many nodes in regions: 0.2 … 1 within a region, 2 … 8 more between two; a region's nodes ask for similar experts."""
    rng = np.random.default_rng(seed)
    region = np.arange(nodes) * regions // nodes
    near = rng.uniform(0.1, 0.5, nodes)
    between = rng.uniform(2, 8, (regions, regions))
    between = (between + between.T) / 2
    np.fill_diagonal(between, 0)
    cost = near[:, None] + near[None, :] + between[region[:, None], region[None, :]]
    np.fill_diagonal(cost, 0)
    shape = np.tile(1 / np.arange(1, experts + 1), (layers, 1))
    favourites = np.stack([rng.permuted(shape, axis=1) for _ in range(regions)])
    own = np.stack([rng.permuted(shape, axis=1) for _ in range(nodes)])
    mixed = 0.7 * favourites[region] + 0.3 * own
    demand = mixed / mixed.sum(axis=2, keepdims=True) * rng.uniform(0.5, 2, (nodes, 1, 1))
    share = rng.uniform(0.5, 2, nodes)
    return PlacementArrays(
        demand=demand.reshape(nodes, -1),
        cost=cost,
        capacity=np.floor(share / share.sum() * layers * experts * fill),
        expert_bytes=1.0,
        node_of_place=np.arange(nodes),
        layer_of_expert=np.repeat(np.arange(layers), experts),
    )


def with_load(arrays: PlacementArrays, *, headroom: float = 1.15) -> PlacementArrays:
    """Limit each node's load to its share of memory times all demand times `headroom`."""
    share = arrays.capacity / arrays.capacity.sum()
    limit = share * arrays.demand.sum() * headroom
    weight = np.zeros((arrays.num_nodes, *arrays.cost.shape))
    weight[arrays.node_of_place, :, np.arange(arrays.num_places)] = 1.0
    return dataclasses.replace(arrays, rows=EvaluationRows(weight, limit))


def with_makespan(arrays: PlacementArrays, *, weight: float = 1.0) -> PlacementArrays:
    """Charge the heaviest node of each layer, one second of service per evaluation."""
    makespan = Makespan(np.full(arrays.num_layers, weight), np.ones(arrays.num_places))
    return dataclasses.replace(arrays, makespan=makespan)
