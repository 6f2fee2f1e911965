"""Columns: one way to hold and serve one expert, with its cost and what it uses.

Decides which columns are worth a place in the restricted model. Must not know how that model is solved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.solvers.decomposition.answers import Answer, NearTies
from planner.solvers.decomposition.arrays import Bools, Floats, Ints, Places
from planner.solvers.decomposition.evaluate import nearest_holders
from planner.solvers.decomposition.prices import Coupling


@dataclass(frozen=True)
class Columns:
    """Columns in order of expert, the cheapest (prices included) of each expert first.

    Parameters
    ----------
    expert
        `[C]`, index.
    held
        `[C, P]`, holders.
    place
        `[I, C]`, place that serves each ingress.
    own
        `[C]`, cost without prices, s.
    use
        `[C, θ']`, use of memory, new copies and rows: θ without the heaviest nodes.
    load
        `[C, N]`, seconds of service per second at each node; zero without a makespan.
    reduced_cost
        `[C]`, cost with prices above the least that the expert can cost, s.
    """

    expert: Ints
    held: Bools
    place: Places
    own: Floats
    use: Floats
    load: Floats
    reduced_cost: Floats

    def __len__(self) -> int:
        return len(self.expert)

    def take(self, index: Ints) -> "Columns":
        """Return the columns of `index`, in its order."""
        return Columns(
            self.expert[index],
            self.held[index],
            self.place[:, index],
            self.own[index],
            self.use[index],
            self.load[index],
            self.reduced_cost[index],
        )

    @property
    def first(self) -> Ints:
        """Index of each expert's cheapest column, `[K]`."""
        return np.flatnonzero(np.diff(self.expert, prepend=-1))


def collect(coupling: Coupling, theta: Floats, lower: Floats, ties: NearTies, past: Sequence[Answer]) -> Columns:
    """Make columns of the near ties at θ and of past answers, without repeats.

    `lower` `[K]` is what the reduced costs are counted from.
    """
    experts = np.arange(coupling.arrays.num_experts)
    expert = np.concatenate([ties.expert, *(experts for _ in past)])
    held = np.concatenate([ties.held, *(answer.held for answer in past)])
    place = np.concatenate([_cheapest_places(coupling, theta, ties), *(answer.place for answer in past)], axis=1)
    key = np.concatenate([expert[:, None], held, place.T], axis=1).astype(np.int32)
    _, first = np.unique(key, axis=0, return_index=True)
    columns = _columns(coupling, theta, lower, (expert[first], held[first], place[:, first]))
    return columns.take(np.lexsort((columns.reduced_cost, columns.expert)))


def most_undecided(columns: Columns, known: Bools, *, num_experts: int, per_expert: int) -> Columns:
    """Keep the columns that stay near the best until `num_experts` experts have a choice, `per_expert` at most each.

    Columns with the holders of `known` `[K, P]`, a placement that fits, are kept whatever they cost, so that at least
    it remains.
    """
    rank = np.arange(len(columns)) - columns.first[columns.expert]
    second = np.sort(columns.reduced_cost[rank == 1])
    slack = second[num_experts] if len(second) > num_experts else np.inf
    near = (columns.reduced_cost <= slack) & (rank < per_expert)
    is_known = (columns.held == known[columns.expert]).all(axis=1)
    return columns.take(np.flatnonzero((rank == 0) | near | is_known))


def _cheapest_places(coupling: Coupling, theta: Floats, ties: NearTies) -> Places:
    costs, arrays = coupling.layer_costs(theta), coupling.arrays
    layer = arrays.layer_of_expert[ties.expert] if len(costs) > 1 else np.zeros(len(ties.expert), dtype=np.int64)
    return nearest_holders(costs, layer, ties.held)[1]


def _columns(coupling: Coupling, theta: Floats, lower: Floats, raw: tuple[Ints, Bools, Places]) -> Columns:
    arrays, (expert, held, place) = coupling.arrays, raw
    ingress = np.arange(len(arrays.cost))[:, None]
    demand = arrays.demand[:, expert]
    own = (demand * arrays.cost[ingress, place]).sum(axis=0)
    use, load = np.zeros((len(expert), coupling.heaviest.start)), np.zeros((len(expert), arrays.num_nodes))
    use[:, coupling.memory] = held
    if arrays.new_copies is not None:
        own += (held * arrays.new_copies.price[expert]).sum(axis=1)
        if arrays.new_copies.limit is not None:
            use[:, coupling.copies] = (held & arrays.new_copies.is_new[expert]).sum(axis=1)[:, None]
    if arrays.rows is not None:
        for row, weight in enumerate(arrays.rows.weight):
            use[:, coupling.rows.start + row] = (demand * weight[ingress, place]).sum(axis=0)
    reduced = own + use @ theta[: coupling.heaviest.start] - lower[expert]
    if arrays.makespan is not None:
        service = demand * arrays.makespan.service[place]
        np.add.at(load, (np.arange(len(expert))[None, :], arrays.node_of_place[place]), service)
        price = theta[coupling.heaviest].reshape(arrays.num_layers, arrays.num_nodes)
        reduced += (load * price[arrays.layer_of_expert[expert]]).sum(axis=1)
    return Columns(expert, held, place, own, use, load, np.maximum(reduced, 0.0))
