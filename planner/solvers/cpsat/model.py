"""The CP-SAT model of a problem: variables, constraints and an integer objective."""

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from planner.objective import ObjectiveName
from planner.problem import Problem
from planner.solvers.cpsat.constraints import FAMILIES
from planner.solvers.cpsat.scaling import OBJECTIVE_SUM, PARTS, integer_costs
from planner.solvers.cpsat.variables import Variables, make_variables
from planner.solvers.events import Patterns, event_patterns
from planner.solvers.terms import Terms


@dataclass(frozen=True, eq=False)
class Model:
    """A CP-SAT model whose objective is at most `scale` times the real one, for every placement."""

    cp: cp_model.CpModel
    variables: Variables
    scale: float
    shape: tuple[int, int, int]


def build_model(problem: Problem, terms: Terms, objective: ObjectiveName) -> Model:
    """Write the model of a problem."""
    cp = cp_model.CpModel()
    variables = make_variables(cp, terms, PARTS if terms.coupled else 1)
    for family in FAMILIES:
        family(cp, terms, variables)
    shape = (problem.num_places, problem.layers, problem.experts)
    if objective == "latency":
        return Model(cp, variables, _add_waits(cp, terms, variables, event_patterns(problem)), shape)
    costs, scale = integer_costs(terms.demand[:, None, :] * terms.unit[:, :, None], variables.parts)
    weighted = [(a, int(costs[n, p, k])) for (n, k), shares in variables.a.items() for p, a in shares.items()]
    cp.minimize(cp_model.LinearExpr.weighted_sum([a for a, _ in weighted], [cost for _, cost in weighted]))
    return Model(cp, variables, scale * variables.parts, shape)


def _add_waits(cp: cp_model.CpModel, terms: Terms, variables: Variables, patterns: Patterns) -> float:
    """Minimise what patterns wait, level by level of cost; returns the scale. Modifies `cp`.

    With the levels c_0 < c_1 < ... of a caller, y[m,j] says that some expert of pattern m is served beyond level j:
    ``y[m,j] >= sum over p with c[n,p] > c_j of a[n,k,p]``, and m waits ``c_0 + sum_j (c_{j+1} - c_j) y[m,j]``. Rows
    have coefficients 1. Only where one replica serves all calls of a caller.
    """
    levels = [np.unique(row) for row in terms.unit]
    highest = np.array([row[-1] for row in levels])
    scale = OBJECTIVE_SUM / max(float(patterns.weight @ highest[patterns.caller]), 1e-30)
    beyond, weights, least = [], [], 0.0
    for n, experts, weight in zip(patterns.caller.tolist(), patterns.experts.tolist(), patterns.weight, strict=True):
        least += float(weight * levels[n][0]) * scale
        for low, step in zip(levels[n], np.diff(levels[n]), strict=False):
            y = cp.new_bool_var("")
            beyond.append(y)
            weights.append(int(np.floor(weight * step * scale)))
            for k in experts:
                far = [a for p, a in variables.a[n, k].items() if terms.unit[n, p] > low]
                if far:
                    cp.add(cp_model.LinearExpr.sum(far) <= y)
    cp.minimize(cp_model.LinearExpr.weighted_sum(beyond, weights) + int(np.floor(least)))
    return scale


def forbid_subsets(model: Model, placed: list[list[int]]) -> None:
    """Rule out a placement, by places of each expert, and all that hold no more; modifies `model`.

    A placement that no routing brings within load and link limits does not get better by dropping replicas.
    """
    missing = [v for k, places in enumerate(model.variables.x) for p, v in places.items() if p not in placed[k]]
    model.cp.add_bool_or(missing)
