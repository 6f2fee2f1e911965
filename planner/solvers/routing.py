"""Which replica serves which caller, exactly, for a placement that is already decided.

Every call goes to the cheapest replica; only where that overloads a node or a link, a small linear programme splits
calls between replicas. All solvers share this, so that a placement has one objective value. Must not know how
placements are found.
"""

import numpy as np
import pulp

from planner.feasibility import shares_of
from planner.objective import ObjectiveName, Routing, link_load, nearest, node_load, placement_cost
from planner.problem import Bools, Problem
from planner.solvers.milp.constraints import assignment, link, load
from planner.solvers.milp.model import add_heaviest
from planner.solvers.milp.variables import Variables
from planner.solvers.regions.of_problem import arrays_without_rows, callers_of, problem_rows
from planner.solvers.regions.serve import serve
from planner.solvers.terms import Terms, exact_terms

MOST_SHARES = 60_000  # shares up to which calls are split exactly


def route(problem: Problem, placed: Bools, objective: ObjectiveName) -> Routing | None:
    """Return the cheapest routing within load and link limits; None where there is none.

    Where calls must be split, `latency` splits them by what is cheapest added up: a valid routing, maybe not the best.
    """
    simple = nearest(problem, placed, objective)
    balanced = objective == "additive-latency" and problem.balance > 0
    if not balanced and _fits(problem, simple):
        return simple
    terms = exact_terms(problem, objective)
    if not balanced and not terms.coupled:
        return simple
    if not balanced and _num_shares(terms, placed) > MOST_SHARES:
        return _whole(problem, placed, objective, simple)
    return _split(problem, terms, placed, simple, balanced=balanced)


def routed_cost(problem: Problem, placed: Bools, objective: ObjectiveName) -> float | None:
    """Objective of a placement under its cheapest routing; None where no routing keeps the limits."""
    routing = route(problem, placed, objective)
    return None if routing is None else placement_cost(problem, routing, objective)


def _fits(problem: Problem, routing: Routing) -> bool:
    return bool(
        (node_load(problem, routing) <= problem.compute_limit).all()
        and (link_load(problem, routing) <= problem.link_limit).all()
    )


def _num_shares(terms: Terms, placed: Bools) -> int:
    """Count the shares of a routing that may split every call."""
    holders = placed.reshape(len(placed), -1).sum(axis=0)
    return int(((terms.demand > 0) * holders).sum())


def _whole(problem: Problem, placed: Bools, objective: ObjectiveName, simple: Routing) -> Routing | None:
    """Route every call whole, steered by prices of compute and links: for what is too large to split exactly."""
    holders = placed.reshape(problem.num_places, -1).T
    place = serve(arrays_without_rows(problem, objective), problem_rows(problem), holders).place
    if place is None:
        return None
    holder = simple.holder.copy()
    holder[callers_of(problem)] = place.reshape(-1, problem.layers, problem.experts)
    return Routing(holder)


def _split(problem: Problem, terms: Terms, placed: Bools, simple: Routing, *, balanced: bool) -> Routing | None:
    holders = placed.reshape(problem.num_places, -1)
    a = {
        (int(n), int(k)): {int(p): pulp.LpVariable(f"a_{n}_{k}_{p}", 0, 1) for p in np.flatnonzero(holders[:, k])}
        for n, k in terms.pairs()
    }
    variables = Variables([], a)
    lp = pulp.LpProblem("routing", pulp.LpMinimize)
    heaviest = add_heaviest(lp, problem, terms, variables) if balanced else []
    weights = [(v, terms.demand[n, k] * terms.unit[n, p]) for (n, k), at in a.items() for p, v in at.items()]
    most = sum(weight for _, weight in weights)
    if balanced:
        most += problem.balance * float(terms.demand.sum() * terms.service_s.max())
    scale = 1e6 / max(most, 1e-30)
    lp.setObjective(pulp.LpAffineExpression([(v, weight * scale) for v, weight in [*weights, *heaviest]]))
    for family in (assignment, load, link):
        for row, name in family(terms, variables):
            lp.addConstraint(row, name)
    if lp.solve(pulp.HiGHS(msg=False)) != pulp.LpStatusOptimal:
        return None
    share = shares_of(simple, problem.num_places).reshape(problem.num_nodes, problem.num_places, -1)
    for (n, k), at in a.items():
        values = np.array([max(v.varValue or 0.0, 0.0) for v in at.values()])
        share[n, :, k] = 0.0
        share[n, list(at), k] = values / values.sum()
    share = share.reshape(problem.num_nodes, *placed.shape)
    return Routing(holder=share.argmax(axis=1), share=share)
