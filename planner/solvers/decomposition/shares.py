"""Holder sets and shares in one exact model: for small problems, and for the best shares of given holders.

Decides nothing but how sets and shares become rows of a HiGHS model; it is exact over the sets that it is given. Must
not know where they come from. Used where load or link rows or heaviest nodes make an ingress split its demand.
"""

from dataclasses import dataclass

import highspy
import numpy as np

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays, Serving
from planner.solvers.decomposition.core import ModelLimits, ModelResult, run_model
from planner.solvers.decomposition.highs import INF, add_columns, add_rows, join, new_model, set_binary
from planner.solvers.decomposition.prices import Coupling


@dataclass(frozen=True)
class SetOptions:
    """Sets that each expert may choose from, in order of expert.

    Parameters
    ----------
    expert
        `[C]`, index; every expert has at least one option.
    held
        `[C, P]`, holders.
    """

    expert: Ints
    held: Bools

    @property
    def reachable(self) -> Bools:
        """Whether an expert may be at a place at all, `[K, P]`."""
        some = np.zeros((int(self.expert[-1]) + 1, self.held.shape[1]), dtype=np.bool_)
        np.logical_or.at(some, self.expert, self.held)
        return some


def count_shares(arrays: PlacementArrays, options: SetOptions) -> int:
    """Return how many share variables the model of these options has."""
    return int(((arrays.demand > 0).sum(axis=0) * options.reachable.sum(axis=1)).sum())


def choose_sets_and_shares(
    coupling: Coupling, options: SetOptions, limits: ModelLimits
) -> tuple[tuple[Bools, Serving] | None, ModelResult]:
    """Minimise the formulation over one option per expert and any shares; return holders `[K, P]` and serving."""
    arrays = coupling.arrays
    expert, place = np.nonzero(options.reachable)
    ingress, cell = np.nonzero(arrays.demand[:, expert] > 0)
    cells = (ingress, expert[cell], place[cell])
    unit = coupling.unit
    result = run_model(_build(coupling, options, cells, unit), limits, unit=unit)
    if result.values is None:
        return None, result
    count = len(options.expert)
    best = np.lexsort((-result.values[:count], options.expert))
    winners = best[np.flatnonzero(np.diff(options.expert[best], prepend=-1))]
    held = options.held[winners]
    return (held, _serving(arrays, held, cells, result.values[count : count + len(ingress)])), result


def _build(coupling: Coupling, options: SetOptions, cells: tuple[Ints, Ints, Ints], unit: float) -> highspy.Highs:
    """Binary y per option, share a per (ingress, expert, place) with demand, height h per layer."""
    arrays, (ingress, expert, place) = coupling.arrays, cells
    flow = arrays.demand[ingress, expert]
    new, makespan = arrays.new_copies, arrays.makespan
    price = np.zeros(len(options.expert)) if new is None else (options.held * new.price[options.expert]).sum(axis=1)
    weight = np.zeros(0) if makespan is None else makespan.weight
    cost = np.concatenate([price, flow * arrays.cost[ingress, place], weight]) / unit
    model = new_model()
    add_columns(model, cost, np.zeros(len(cost)), np.full(len(cost), INF))
    if len(options.expert) > int(options.expert[-1]) + 1:
        set_binary(model, len(options.expert))
    _add_sets(model, coupling, options)
    _add_assignment(model, arrays, options, cells)
    _add_rows(model, arrays, cells, flow, len(options.expert))
    return model


def _add_sets(model: highspy.Highs, coupling: Coupling, options: SetOptions) -> None:
    """Σ y = 1 per expert; Σ y over sets with the place ≤ slots; new replicas ≤ their limit."""
    arrays, every = coupling.arrays, np.arange(len(options.expert))
    ones = np.ones(arrays.num_experts)
    add_rows(model, ones, ones, (options.expert, every, np.ones(len(every))))
    column, place = np.nonzero(options.held)
    slots = arrays.slots.astype(float)
    add_rows(model, np.full(len(slots), -INF), slots, (place, column, np.ones(len(place))))
    if arrays.new_copies is not None and arrays.new_copies.limit is not None:
        fresh = (options.held & arrays.new_copies.is_new[options.expert]).sum(axis=1).astype(float)
        limit = np.array([float(arrays.new_copies.limit)])
        add_rows(model, np.array([-INF]), limit, (np.zeros(len(every), dtype=np.int64), every, fresh))


def _add_assignment(
    model: highspy.Highs, arrays: PlacementArrays, options: SetOptions, cells: tuple[Ints, Ints, Ints]
) -> None:
    """Σ_p a = 1 per (ingress, expert); a ≤ Σ y over the expert's sets that have the place."""
    ingress, expert, place = cells
    first, every = len(options.expert), np.arange(len(ingress))
    pairs, row = np.unique(ingress * arrays.num_experts + expert, return_inverse=True)
    ones = np.ones(len(pairs))
    add_rows(model, ones, ones, (row, first + every, np.ones(len(every))))
    column, at = np.nonzero(options.held)
    key = options.expert[column] * arrays.num_places + at
    order = np.argsort(key, kind="stable")
    wanted = expert * arrays.num_places + place
    low, high = (np.searchsorted(key[order], wanted, side=side) for side in ("left", "right"))
    counts = high - low
    rows = np.repeat(every, counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    sets = column[order[np.repeat(low, counts) + within]]
    entries = join((every, first + every, np.ones(len(every))), (rows, sets, -np.ones(len(rows))))
    add_rows(model, np.full(len(every), -INF), np.zeros(len(every)), entries)


def _add_rows(
    model: highspy.Highs, arrays: PlacementArrays, cells: tuple[Ints, Ints, Ints], flow: Floats, first: int
) -> None:
    """Load and link rows; load of a node in a layer − h ≤ 0."""
    ingress, expert, place = cells
    if arrays.rows is not None:
        use = arrays.rows.weight[:, ingress, place] * flow
        size = np.maximum(use.max(axis=1, initial=0.0), 1e-30)
        which, cell = np.nonzero(use)
        used = (which, first + cell, (use / size[:, None])[which, cell])
        add_rows(model, np.full(len(size), -INF), arrays.rows.limit / size, used)
    if arrays.makespan is not None:
        count = arrays.num_layers * arrays.num_nodes
        load = flow * arrays.makespan.service[place]
        row = arrays.layer_of_expert[expert] * arrays.num_nodes + arrays.node_of_place[place]
        every, start = np.arange(count), first + len(flow)
        heights = (every, start + every // arrays.num_nodes, -np.ones(count))
        entries = join((row, first + np.arange(len(flow)), load), heights)
        add_rows(model, np.full(count, -INF), np.zeros(count), entries)


def _serving(arrays: PlacementArrays, held: Bools, cells: tuple[Ints, Ints, Ints], share: Floats) -> Serving:
    """Shares of the solver, cleaned of rounding; demand of zero goes to the lowest holder."""
    ingress, expert, place = cells
    keep = (share > 1e-7) & held[expert, place]
    idle_ingress, idle_expert = np.nonzero(arrays.demand <= 0)
    ingress = np.concatenate([ingress[keep], idle_ingress])
    place = np.concatenate([place[keep], held[idle_expert].argmax(axis=1)])
    expert = np.concatenate([expert[keep], idle_expert])
    share = np.concatenate([share[keep], np.ones(len(idle_expert))])
    total = np.zeros(arrays.demand.shape)
    np.add.at(total, (ingress, expert), share)
    order = np.lexsort((place, ingress, expert))
    return Serving(ingress[order], expert[order], place[order], (share / total[ingress, expert])[order])
