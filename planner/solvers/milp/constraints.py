"""The constraints of the MILP, one function per family, each yielding named rows.

Letters are FORMULATION's: x[k,p] replica of expert k at place p, a[n,k,p] share of caller n's calls, r required
nodes, M[p] slots of a place, d[n,k] demand, u service seconds, rho limits.
"""

from collections.abc import Iterable, Iterator

import pulp

from planner.solvers.milp.variables import Variables
from planner.solvers.terms import Terms

Row = tuple[pulp.LpConstraint, str]
Term = tuple[pulp.LpVariable, float]


def _row(terms: Iterable[Term], sense: int, rhs: float, name: str) -> Row:
    return pulp.LpConstraint(pulp.LpAffineExpression(list(terms)), sense, name, rhs), name


def coverage(terms: Terms, v: Variables) -> Iterator[Row]:
    """Have at least r nodes hold each expert: sum_p x[k,p] >= r (a node counts once, see `one_tier`).

    Where nodes fail together, r failure domains: sum_d w[k,d] >= r with w[k,d] <= sum_{p of d} x[k,p], w <= 1.
    """
    for k, places in enumerate(v.x):
        if not terms.domain_places:
            yield _row(((x, 1) for x in places.values()), pulp.LpConstraintGE, terms.required, f"coverage_{k}")
            continue
        counted = []
        for d, members in enumerate(terms.domain_places):
            w = pulp.LpVariable(f"w_{k}_{d}", 0, 1)
            counted.append((w, 1.0))
            here = [(places[p], -1.0) for p in members.tolist() if p in places]
            yield _row([(w, 1.0), *here], pulp.LpConstraintLE, 0, f"domain_{k}_{d}")
        yield _row(counted, pulp.LpConstraintGE, terms.required, f"coverage_{k}")


def one_tier(terms: Terms, v: Variables) -> Iterator[Row]:
    """Keep an expert in one tier of a node at most: sum_{p of m} x[k,p] <= 1."""
    for m, places in enumerate(terms.node_places):
        for k, x in enumerate(v.x):
            here = [(x[p], 1) for p in places.tolist() if p in x]
            if len(here) > 1:
                yield _row(here, pulp.LpConstraintLE, 1, f"one_tier_{m}_{k}")


def memory(terms: Terms, v: Variables) -> Iterator[Row]:
    """Fit replicas into the slots of their place: sum_k x[k,p] <= M[p]."""
    for p, slots in enumerate(terms.slots.tolist()):
        here = [(x[p], 1) for x in v.x if p in x]
        if len(here) > slots:
            yield _row(here, pulp.LpConstraintLE, slots, f"memory_{p}")


def pins(terms: Terms, v: Variables) -> Iterator[Row]:
    """Have a pinned expert held by its node: sum_{p of m} x[k,p] >= 1. Bans have no variables."""
    for m, k in terms.pins.tolist():
        here = [(v.x[k][p], 1) for p in terms.node_places[m].tolist() if p in v.x[k]]
        yield _row(here, pulp.LpConstraintGE, 1, f"pin_{m}_{k}")


def assignment(_: Terms, v: Variables) -> Iterator[Row]:
    """Serve every call: sum_p a[n,k,p] = 1."""
    for (n, k), shares in v.a.items():
        yield _row(((a, 1) for a in shares.values()), pulp.LpConstraintEQ, 1, f"assignment_{n}_{k}")


def holders(_: Terms, v: Variables) -> Iterator[Row]:
    """Serve only by holders: a[n,k,p] <= x[k,p], one row each, since the sum of them would be far weaker."""
    for (n, k), shares in v.a.items():
        for p, a in shares.items():
            yield _row(((a, 1), (v.x[k][p], -1)), pulp.LpConstraintLE, 0, f"holder_{n}_{k}_{p}")


def load(terms: Terms, v: Variables) -> Iterator[Row]:
    """Keep the calls that a node serves within its compute: sum_{n,k,p of m} d[n,k] u[p] a[n,k,p] <= rho[m]."""
    for m, limit in zip(terms.load_nodes.tolist(), terms.load_limit.tolist(), strict=True):
        here = [
            (shares[p], terms.demand[n, k] * terms.service_s[p] / limit)
            for (n, k), shares in v.a.items()
            for p in terms.node_places[m].tolist()
            if p in shares
        ]
        yield _row(here, pulp.LpConstraintLE, 1, f"load_{m}")


def link(terms: Terms, v: Variables) -> Iterator[Row]:
    """Keep the calls over a link within its bandwidth: sum over paths that cross it of d[n,k] a[n,k,p] <= rho."""
    for row, (u, limit) in enumerate(zip(terms.links.tolist(), terms.link_limit.tolist(), strict=True)):
        here = [
            (a, terms.demand[n, k] / limit)
            for (n, k), shares in v.a.items()
            for p, a in shares.items()
            if terms.crossing[row, n, p]
        ]
        yield _row(here, pulp.LpConstraintLE, 1, f"link_{u}")


FAMILIES = (coverage, one_tier, memory, pins, assignment, holders, load, link)
