"""Why no placement is feasible: the smallest enlargement of memory, compute and links that would make one.

Decides by an elastic model: every row that stands for a machine's limit may be exceeded at a price, and what the
optimum exceeds is what is in the way.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import pulp

from planner.errors import Violation
from planner.feasibility import link_violation, load_violation
from planner.problem import Problem
from planner.solvers.milp.constraints import assignment, coverage, holders, link, load, memory, one_tier, pins
from planner.solvers.milp.variables import make_variables
from planner.solvers.terms import exact_terms
from schemas.units import format_bytes

_TIME_S: Final = 20.0
_SEEN: Final = 1e-6


def explain(problem: Problem) -> list[Violation]:
    """Return the limits that are in the way, each by how much."""
    terms = exact_terms(problem, "additive-latency")
    variables = make_variables(terms)
    lp, slack = pulp.LpProblem("elastic", pulp.LpMinimize), {}
    for family in (coverage, one_tier, pins, assignment, holders):
        for row, name in family(terms, variables):
            lp.addConstraint(row, name)
    for family, price in ((memory, 1.0), (load, 1e3), (link, 1e3)):
        for row, name in family(terms, variables):
            slack[name] = (pulp.LpVariable(f"over_{name}", 0), price)
            row.addterm(slack[name][0], -1)
            lp.addConstraint(row, name)
    lp.setObjective(pulp.LpAffineExpression(list(slack.values())))
    lp.solve(pulp.HiGHS(msg=False, timeLimit=_TIME_S, gapRel=0.01))
    over = {name: variable.varValue or 0.0 for name, (variable, _) in slack.items()}
    return list(_told(problem, over)) or [_unexplained()]


def _told(problem: Problem, over: dict[str, float]) -> Iterator[Violation]:
    for name, excess in over.items():
        family, number = name.rsplit("_", 1)
        if excess <= _SEEN:
            continue
        if family == "memory":
            yield _memory(problem, int(number), int(np.ceil(excess - _SEEN)))
        elif family == "load":
            yield load_violation(problem, int(number), float(problem.compute_limit[int(number)]) * (1 + excess))
        else:
            yield link_violation(problem, int(number), float(problem.link_limit[int(number)]) * (1 + excess))


def _memory(problem: Problem, place: int, experts: int) -> Violation:
    name, room = problem.place_name(place), int(problem.capacity_bytes[place])
    missing = experts * problem.expert_bytes
    message = (
        f"{name} has room for {problem.slots[place]} experts, {experts} ({format_bytes(missing)}) too few for what "
        f"pins, bans and replicas put there; enlarge it by {format_bytes(missing)} or lift a pin or ban"
    )
    return Violation("memory", name, room + missing, room, "bytes", message)


def _unexplained() -> Violation:
    message = "pins, bans, replicas and memory together leave no placement; lift a pin or ban, or enlarge a node"
    return Violation("combination", "all nodes", 1, 0, "conflicts", message)
