"""A problem as plain arrays, with its load and link rows apart, written without a table of links × nodes × nodes.

Decides which rows may bind. Must not know how rows are priced.
"""

import numpy as np
from scipy import sparse

from planner.objective import ObjectiveName, unit_cost
from planner.problem import Floats, Ints, Problem
from planner.solvers.decomposition.arrays import PlacementArrays
from planner.solvers.regions.rows import SparseRows
from planner.solvers.terms import links_that_may_bind, nodes_that_may_bind

Entries = tuple[Ints, Ints, Ints, Floats]  # row, caller, place, weight


def callers_of(problem: Problem) -> Ints:
    """Nodes that call at all, `[I]`; the first node where none does."""
    callers = np.flatnonzero(problem.caller_demand.any(axis=(1, 2)))
    return callers if len(callers) else np.arange(1)


def arrays_without_rows(problem: Problem, objective: ObjectiveName) -> PlacementArrays:
    """Flatten a problem, and leave out what calls share: load, links and heaviest nodes."""
    callers = callers_of(problem)
    nodes, node_of_place = np.unique(problem.place_node, return_inverse=True)
    banned = problem.banned.reshape(problem.num_nodes, -1)[problem.place_node].T
    pinned = problem.pinned.reshape(problem.num_nodes, -1)[nodes].T
    return PlacementArrays(
        demand=problem.caller_demand.reshape(problem.num_nodes, -1)[callers],
        cost=unit_cost(problem, objective)[callers],
        capacity=problem.slots.astype(np.float64),  # places differ in what an expert takes there
        expert_bytes=1.0,
        node_of_place=node_of_place,
        layer_of_expert=np.repeat(np.arange(problem.layers), problem.experts),
        required=problem.required,
        domain_of_node=problem.domain[nodes] if problem.has_shared_domains else None,
        allowed=~banned if banned.any() else None,
        pinned=pinned if pinned.any() else None,
    )


def problem_rows(problem: Problem) -> SparseRows | None:
    """Return rows of nodes (s of compute per s), then of links (calls per s); None where none may bind."""
    nodes, links, callers = nodes_that_may_bind(problem), links_that_may_bind(problem), callers_of(problem)
    if len(nodes) + len(links) == 0:
        return None
    parts = (_load(problem, nodes, len(callers)), _crossings(problem, links, callers, first=len(nodes)))
    row, caller, place, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = (len(nodes) + len(links), len(callers) * problem.num_places)
    matrix = sparse.csr_matrix((weight, (row, caller * problem.num_places + place)), shape=shape)
    limit = np.concatenate([problem.compute_limit[nodes], problem.link_limit[links] / problem.call_bytes])
    return SparseRows(matrix, limit)


def _load(problem: Problem, nodes: Ints, callers: int) -> Entries:
    row, place = np.nonzero(nodes[:, None] == problem.place_node)
    caller = np.tile(np.arange(callers), len(row))
    row, place = np.repeat(row, callers), np.repeat(place, callers)
    return row, caller, place, problem.service_s[place]


def _crossings(problem: Problem, links: Ints, callers: Ints, *, first: int) -> Entries:
    row_of_link = np.full(len(problem.link_limit), -1)
    row_of_link[links] = np.arange(len(links))
    index_of_caller = np.full(problem.num_nodes, -1)
    index_of_caller[callers] = np.arange(len(callers))
    row, caller = row_of_link[problem.hop_link], index_of_caller[problem.hop_caller]
    keep = (row >= 0) & (caller >= 0)
    row, caller, holder = row[keep], caller[keep], problem.hop_holder[keep]
    per_node = np.bincount(problem.place_node, minlength=problem.num_nodes)
    count, begin = per_node[holder], np.cumsum(per_node) - per_node  # places lie in order of node
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    place = np.repeat(begin[holder], count) + within
    return first + np.repeat(row, count), np.repeat(caller, count), place, np.ones(len(place))
