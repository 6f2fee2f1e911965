"""The CP-SAT model of a problem: variables, constraints and an integer objective."""

from dataclasses import dataclass

from ortools.sat.python import cp_model

from planner.problem import Problem
from planner.solvers.cpsat.constraints import FAMILIES
from planner.solvers.cpsat.scaling import PARTS, integer_costs
from planner.solvers.cpsat.variables import Variables, make_variables
from planner.solvers.terms import Terms


@dataclass(frozen=True, eq=False)
class Model:
    """A CP-SAT model whose objective is at most `scale` times the real one, for every placement."""

    cp: cp_model.CpModel
    variables: Variables
    scale: float
    shape: tuple[int, int, int]


def build_model(problem: Problem, terms: Terms) -> Model:
    """Write the model of a problem."""
    cp = cp_model.CpModel()
    variables = make_variables(cp, terms, PARTS if terms.coupled else 1)
    for family in FAMILIES:
        family(cp, terms, variables)
    costs, scale = integer_costs(terms.demand[:, None, :] * terms.unit[:, :, None], variables.parts)
    weighted = [(a, int(costs[n, p, k])) for (n, k), shares in variables.a.items() for p, a in shares.items()]
    cp.minimize(cp_model.LinearExpr.weighted_sum([a for a, _ in weighted], [cost for _, cost in weighted]))
    shape = (problem.num_places, problem.layers, problem.experts)
    return Model(cp, variables, scale * variables.parts, shape)


def forbid_subsets(model: Model, placed: list[list[int]]) -> None:
    """Rule out a placement, by places of each expert, and all that hold no more; modifies `model`.

    A placement that no routing brings within load and link limits does not get better by dropping replicas.
    """
    missing = [v for k, places in enumerate(model.variables.x) for p, v in places.items() if p not in placed[k]]
    model.cp.add_bool_or(missing)
