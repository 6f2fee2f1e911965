"""Why no placement is feasible: the smallest enlargement of memory, compute and links that would make one.

Decides by an elastic model: every row that stands for a machine's limit may be exceeded at a price, and what the
optimum exceeds is what is in the way.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import pulp

from planner.errors import Violation
from planner.feasibility import link_violation, load_violation
from planner.problem import Problem
from planner.solvers.milp.constraints import (
    Row,
    assignment,
    coverage,
    holders,
    link,
    load,
    memory,
    one_tier,
    pins,
)
from planner.solvers.milp.variables import Variables, make_variables
from planner.solvers.terms import Terms, exact_terms
from schemas.units import format_bytes

Family = Callable[[Terms, Variables], Iterator[Row]]

_PLACING: Final = (coverage, one_tier, pins)
_TIME_S: Final = 20.0
_SEEN: Final = 1e-6


def explain(problem: Problem) -> list[Violation]:
    """Return the limits that are in the way, each by how much.

    Memory first: only where pins, bans and replicas fit into it are compute or links to blame.
    """
    over = _least_excess(problem, hard=_PLACING, soft=(memory,))
    if not any(excess > _SEEN for excess in over.values()):
        over = _least_excess(problem, hard=(*_PLACING, memory, assignment, holders), soft=(load, link))
    return list(_told(problem, over)) or [_unexplained()]


def _least_excess(problem: Problem, *, hard: Sequence[Family], soft: Sequence[Family]) -> dict[str, float]:
    """Exceed the soft rows by as little as the hard ones allow; returns the excess by name of row."""
    terms = exact_terms(problem, "additive-latency")
    variables = make_variables(terms)
    lp, over = pulp.LpProblem("elastic", pulp.LpMinimize), {}
    for family in hard:
        for row, name in family(terms, variables):
            lp.addConstraint(row, name)
    for family in soft:
        for row, name in family(terms, variables):
            over[name] = pulp.LpVariable(f"over_{name}", 0)
            row.addInPlace(-over[name])
            lp.addConstraint(row, name)
    lp.setObjective(pulp.LpAffineExpression([(variable, 1) for variable in over.values()]))
    lp.solve(pulp.HiGHS(msg=False, timeLimit=_TIME_S, gapRel=0.01))
    return {name: variable.varValue or 0.0 for name, variable in over.items()}


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
    missing = experts * int(problem.place_bytes[place])
    message = (
        f"{name} has room for {problem.slots[place]} experts, {experts} ({format_bytes(missing)}) too few for what "
        f"pins, bans and replicas put there; enlarge it by {format_bytes(missing)} or lift a pin or ban"
    )
    return Violation("memory", name, room + missing, room, "bytes", message)


def _unexplained() -> Violation:
    message = "pins, bans, replicas and memory together leave no placement; lift a pin or ban, or enlarge a node"
    return Violation("combination", "all nodes", 1, 0, "conflicts", message)
