"""The PuLP model of a problem: variables, constraints and a scaled objective."""

from dataclasses import dataclass

import pulp

from planner.problem import Bools, Problem
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


def build_model(problem: Problem, terms: Terms) -> Model:
    """Write the model of a problem."""
    variables = make_variables(terms)
    weights = terms.demand[:, None, :] * terms.unit[:, :, None]  # [N, P, K]
    scale = 1e6 / max(float(weights.max(axis=1, initial=0.0).sum()), 1e-30)
    lp = pulp.LpProblem("placement", pulp.LpMinimize)
    cost = [(a, scale * weights[n, p, k]) for (n, k), shares in variables.a.items() for p, a in shares.items()]
    lp.setObjective(pulp.LpAffineExpression(cost))
    for family in FAMILIES:
        for row, name in family(terms, variables):
            lp.addConstraint(row, name)
    return Model(lp, variables, scale, (problem.num_places, problem.layers, problem.experts))
