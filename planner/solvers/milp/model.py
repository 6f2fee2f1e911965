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
    if objective == "latency":
        return Model(lp, variables, _add_waits(lp, terms, variables, event_patterns(problem)), shape)
    weights = terms.demand[:, None, :] * terms.unit[:, :, None]  # [N, P, K]
    scale = _scale(weights.max(axis=1, initial=0.0))
    cost = [(a, scale * weights[n, p, k]) for (n, k), shares in variables.a.items() for p, a in shares.items()]
    lp.setObjective(pulp.LpAffineExpression(cost))
    return Model(lp, variables, scale, shape)


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
