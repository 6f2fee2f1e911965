"""The numbers that both exact models are written with, cut to what matters.

Decides which callers, pairs and coupling rows a model needs: demand that is zero needs no assignment, and a load or
link row that no placement can break needs no row. Must not know any solver library. K counts experts (l, e) flat.
"""

from dataclasses import dataclass

import numpy as np

from planner.objective import ObjectiveName, unit_cost
from planner.problem import Bools, Floats, Ints, Problem


@dataclass(frozen=True, eq=False)
class Terms:
    """A problem as an exact model sees it.

    Attributes
    ----------
    demand
        Calls per second, float64 ``[N, K]``.
    unit
        Cost of a call, float64 ``[N, P]``.
    allowed
        Whether an expert may be at a place, bool ``[P, K]``.
    slots
        Experts that fit into a place, int64 ``[P]``.
    node_places
        Places of each node.
    required
        Failure domains that must hold each expert.
    domain_places
        Places of each failure domain, where two nodes share one and it matters; else empty.
    pins
        (node, expert) that must be held, int64 ``[_, 2]``.
    service_s
        Seconds of compute per call at a place, float64 ``[P]``.
    load_nodes, load_limit
        Nodes whose compute may come to bind, and what they have.
    links, link_limit
        Links that may come to bind, and calls per second they can carry.
    crossing
        Whether a call from node n to place p crosses each of `links`, bool ``[len(links), N, P]``.
    """

    demand: Floats
    unit: Floats
    allowed: Bools
    slots: Ints
    node_places: tuple[Ints, ...]
    required: int
    domain_places: tuple[Ints, ...]
    pins: Ints
    service_s: Floats
    load_nodes: Ints
    load_limit: Floats
    links: Ints
    link_limit: Floats
    crossing: Bools

    @property
    def coupled(self) -> bool:
        """Whether calls compete for compute or links, so that the nearest replica may not be the one to call."""
        return len(self.load_nodes) + len(self.links) > 0

    @property
    def num_experts(self) -> int:
        """K."""
        return int(self.demand.shape[1])

    def pairs(self) -> Ints:
        """(node, expert) with demand, int64 ``[_, 2]``."""
        return np.argwhere(self.demand > 0)


def exact_terms(problem: Problem, objective: ObjectiveName) -> Terms:
    """Cut a problem to the terms of its exact model."""
    demand = problem.caller_demand.reshape(problem.num_nodes, -1)
    nodes, count = np.arange(problem.num_nodes), problem.layers * problem.experts
    load_nodes = nodes_that_may_bind(problem)
    links, crossing = _crossing(problem)
    pins = np.argwhere(problem.pinned.reshape(problem.num_nodes, count))
    return Terms(
        demand=demand,
        unit=unit_cost(problem, objective),
        allowed=problem.allowed.reshape(problem.num_places, count),
        slots=problem.slots,
        node_places=tuple(np.flatnonzero(problem.place_node == node) for node in nodes),
        required=problem.required,
        domain_places=_domain_places(problem),
        pins=pins,
        service_s=problem.service_s,
        load_nodes=load_nodes,
        load_limit=problem.compute_limit[load_nodes],
        links=links,
        link_limit=problem.link_limit[links] / problem.call_bytes,
        crossing=crossing,
    )


def _domain_places(problem: Problem) -> tuple[Ints, ...]:
    if not problem.has_shared_domains:
        return ()
    domain = problem.domain[problem.place_node]
    return tuple(np.flatnonzero(domain == one) for one in np.unique(domain))


def nodes_that_may_bind(problem: Problem) -> Ints:
    """Return the nodes whose compute would exceed its limit if they served every call."""
    slowest = np.zeros(problem.num_nodes)
    np.maximum.at(slowest, problem.place_node, problem.service_s)
    return np.flatnonzero(problem.caller_demand.sum() * slowest > problem.compute_limit)


def links_that_may_bind(problem: Problem) -> Ints:
    """Return the links that would exceed their limit if every caller that can cross them always did."""
    link, caller = np.unique(np.stack([problem.hop_link, problem.hop_caller]), axis=1)
    asked = problem.caller_demand.sum(axis=(1, 2))
    most = np.bincount(link, weights=asked[caller], minlength=len(problem.link_limit)) * problem.call_bytes
    return np.flatnonzero(most > problem.link_limit)


def _crossing(problem: Problem) -> tuple[Ints, Bools]:
    links = links_that_may_bind(problem)
    row_of_link = np.full(len(problem.link_limit), -1)
    row_of_link[links] = np.arange(len(links))
    row = row_of_link[problem.hop_link]
    crossing = np.zeros((len(links), problem.num_nodes, problem.num_nodes), dtype=bool)
    crossing[row[row >= 0], problem.hop_caller[row >= 0], problem.hop_holder[row >= 0]] = True
    return links, crossing[:, :, problem.place_node]
