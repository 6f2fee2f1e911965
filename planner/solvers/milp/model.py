"""The PuLP model of a problem: variables, constraints and a scaled objective."""

from dataclasses import dataclass

import pulp

from planner.objective import ObjectiveName
from planner.problem import Bools, Floats, Problem
from planner.solvers.events import Patterns, event_patterns
from planner.solvers.milp.constraints import FAMILIES
from planner.solvers.milp.variables import Variables, make_variables
from planner.solvers.terms import Terms


@dataclass(frozen=True, eq=False)
class Model:
    """A PuLP model whose objective is `scale` times the real one, so that solver tolerances are small against it."""

    lp: pulp.LpProblem
    variables: Variables
    scale: float
    shape: tuple[int, int, int]

    def placement(self) -> Bools:
        """Read the solved placement, bool ``[P, L, E]``."""
        return self.variables.placement(self.shape)


def build_model(problem: Problem, terms: Terms, objective: ObjectiveName) -> Model:
    """Write the model of a problem."""
    variables = make_variables(terms)
    lp = pulp.LpProblem("placement", pulp.LpMinimize)
    for family in FAMILIES:
        for row, name in family(terms, variables):
            lp.addConstraint(row, name)
    shape = (problem.num_places, problem.layers, problem.experts)
    heaviest = add_heaviest(lp, problem, terms, variables) if objective == "additive-latency" else []
    if objective == "latency":
        return Model(lp, variables, _add_waits(lp, terms, variables, event_patterns(problem)), shape)
    weights = terms.demand[:, None, :] * terms.unit[:, :, None]  # [N, P, K]
    served = terms.demand[:, None, :] * (problem.balance * terms.service_s)[None, :, None] if heaviest else 0.0
    scale = _scale((weights + served).max(axis=1, initial=0.0))
    cost = [(a, scale * weights[n, p, k]) for (n, k), shares in variables.a.items() for p, a in shares.items()]
    lp.setObjective(pulp.LpAffineExpression([*cost, *((t, scale * weight) for t, weight in heaviest)]))
    return Model(lp, variables, scale, shape)


def add_heaviest(
    lp: pulp.LpProblem, problem: Problem, terms: Terms, v: Variables
) -> list[tuple[pulp.LpVariable, float]]:
    """Return t[l] >= sum_{n,k of l,p of m} d[n,k] u[p] a[n,k,p] for every node m, with its cost. Modifies `lp`."""
    if not problem.balance:
        return []
    found = []
    for layer in range(problem.layers):
        t = pulp.LpVariable(f"t_{layer}", 0)
        for m, places in enumerate(terms.node_places):
            here = [
                (shares[p], -float(terms.demand[n, k] * terms.service_s[p]))
                for (n, k), shares in v.a.items()
                if k // problem.experts == layer
                for p in places.tolist()
                if p in shares
            ]
            row = pulp.LpConstraint(
                pulp.LpAffineExpression([(t, 1.0), *here]), pulp.LpConstraintGE, f"h_{layer}_{m}", 0
            )
            lp.addConstraint(row, f"heaviest_{layer}_{m}")
        found.append((t, problem.balance))
    return found


def _add_waits(lp: pulp.LpProblem, terms: Terms, variables: Variables, patterns: Patterns) -> float:
    """Minimise sum_m w[m] z[m] with z[m] >= sum_p c[n,p] a[n,k,p] for each k of m; returns the scale. Modifies `lp`."""
    highest = terms.unit.max(axis=1, initial=0.0)
    unit = 1 / max(float(highest.max()), 1e-30)  # z in units of the dearest call, so that rows are near 1
    scale = _scale(patterns.weight * highest[patterns.caller])
    cost = []
    for m, (n, experts) in enumerate(zip(patterns.caller.tolist(), patterns.experts.tolist(), strict=True)):
        z = pulp.LpVariable(f"z_{m}", 0)
        cost.append((z, scale * patterns.weight[m] / unit))
        for k in experts:
            served = [(a, -unit * float(terms.unit[n, p])) for p, a in variables.a[n, k].items()]
            row = pulp.LpConstraint(pulp.LpAffineExpression([(z, 1.0), *served]), pulp.LpConstraintGE, f"w_{m}_{k}", 0)
            lp.addConstraint(row, f"wait_{m}_{k}")
    lp.setObjective(pulp.LpAffineExpression(cost))
    return scale


def _scale(highest: Floats) -> float:
    return 1e6 / max(float(highest.sum()), 1e-30)
