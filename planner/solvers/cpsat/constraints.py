"""The constraints of the CP-SAT model, one function per family, each adding its rows to the model.

The letters and the order are those of `milp.constraints`; shares a are counted in parts, B of them to a whole.
"""

import numpy as np
from ortools.sat.python import cp_model

from planner.solvers.cpsat.scaling import integer_row
from planner.solvers.cpsat.variables import Variables
from planner.solvers.terms import Terms

Sum = cp_model.LinearExpr.sum
Weighted = cp_model.LinearExpr.weighted_sum


def coverage(model: cp_model.CpModel, terms: Terms, v: Variables) -> None:
    """Have at least r nodes hold each expert: sum_p x[k,p] >= r (a node counts once, see `one_tier`).

    Where nodes fail together, r failure domains: sum_d w[k,d] >= r with w[k,d] <= sum_{p of d} x[k,p], w Boolean.
    """
    for places in v.x:
        if not terms.domain_places:
            model.add(Sum(list(places.values())) >= terms.required)
            continue
        counted = []
        for members in terms.domain_places:
            counted.append(model.new_bool_var(""))
            model.add_bool_or([counted[-1].negated(), *(places[p] for p in members.tolist() if p in places)])
        model.add(Sum(counted) >= terms.required)


def one_tier(model: cp_model.CpModel, terms: Terms, v: Variables) -> None:
    """Keep an expert in one tier of a node at most: sum_{p of m} x[k,p] <= 1."""
    for places in terms.node_places:
        for x in v.x:
            here = [x[p] for p in places.tolist() if p in x]
            if len(here) > 1:
                model.add_at_most_one(here)


def memory(model: cp_model.CpModel, terms: Terms, v: Variables) -> None:
    """Fit replicas into the slots of their place: sum_k x[k,p] <= M[p]. In slots, so that coefficients are 1."""
    for p, slots in enumerate(terms.slots.tolist()):
        here = [x[p] for x in v.x if p in x]
        if len(here) > slots:
            model.add(Sum(here) <= slots)


def pins(model: cp_model.CpModel, terms: Terms, v: Variables) -> None:
    """Have a pinned expert held by its node: sum_{p of m} x[k,p] >= 1. Bans have no variables."""
    for m, k in terms.pins.tolist():
        model.add_bool_or([v.x[k][p] for p in terms.node_places[m].tolist() if p in v.x[k]])


def assignment(model: cp_model.CpModel, _: Terms, v: Variables) -> None:
    """Serve every call: sum_p a[n,k,p] = B; in parts one less for each further replica, lost by rounding down."""
    for shares in v.a.values():
        if v.parts == 1:
            model.add_exactly_one(list(shares.values()))
        else:
            model.add(Sum(list(shares.values())) >= v.parts - len(shares) + 1)


def holders(model: cp_model.CpModel, _: Terms, v: Variables) -> None:
    """Serve only by holders: a[n,k,p] <= B x[k,p], one row each."""
    for (_caller, k), shares in v.a.items():
        for p, a in shares.items():
            model.add(a <= v.parts * v.x[k][p])


def load(model: cp_model.CpModel, terms: Terms, v: Variables) -> None:
    """Keep the calls that a node serves within its compute: sum_{n,k,p of m} d[n,k] u[p] a[n,k,p] <= B rho[m]."""
    for m, limit in zip(terms.load_nodes.tolist(), terms.load_limit.tolist(), strict=True):
        here = [
            (shares[p], terms.demand[n, k] * terms.service_s[p])
            for (n, k), shares in v.a.items()
            for p in terms.node_places[m].tolist()
            if p in shares
        ]
        _limit(model, here, limit, v.parts)


def link(model: cp_model.CpModel, terms: Terms, v: Variables) -> None:
    """Keep the calls over a link within its bandwidth: sum over paths that cross it of d[n,k] a[n,k,p] <= B rho."""
    for row, limit in enumerate(terms.link_limit.tolist()):
        here = [
            (a, terms.demand[n, k])
            for (n, k), shares in v.a.items()
            for p, a in shares.items()
            if terms.crossing[row, n, p]
        ]
        _limit(model, here, limit, v.parts)


def _limit(model: cp_model.CpModel, terms: list[tuple[cp_model.IntVar, float]], limit: float, parts: int) -> None:
    coefficients, bound = integer_row(np.array([weight for _, weight in terms]), limit, parts)
    model.add(Weighted([variable for variable, _ in terms], coefficients.tolist()) <= bound)


FAMILIES = (coverage, one_tier, memory, pins, assignment, holders, load, link)
