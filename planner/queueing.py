"""A busy holder answers later: evaluations wait in queues, and the placement is solved again with what they cost.

Decides the queueing term. A holder is taken for an M/M/1 queue (Kleinrock 1975, I, 3.2): at utilisation rho an
evaluation of s seconds takes ``s / (1 - rho)``, so every call to it costs ``s rho / (1 - rho)`` more, also those of its
own tokens. Utilisation depends on who calls whom, so solve, count and solve again until nothing gets better. Costs only
grow by it, so a lower bound without queues stays one with them. Must not know solvers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from planner.assemble import Solved
from planner.objective import Routing, judge, node_load, plan_cost
from planner.problem import Floats, Problem
from planner.solvers.base import with_status

ROUNDS: Final = 3
MOST: Final = 0.98  # utilisation above which a queue has no mean wait; counted as this


def queue_seconds(problem: Problem, utilisation: Floats) -> Floats:
    """Seconds that an evaluation at each place waits for its turn, float64 ``[P]``, by utilisation of nodes ``[N]``."""
    rho = np.minimum(utilisation, MOST)[problem.place_node]
    return np.asarray(problem.service_s * rho / (1 - rho))


def with_queues(problem: Problem, utilisation: Floats) -> Problem:
    """Return the problem with queues in the cost of every call."""
    return replace(problem, cost_s=problem.cost_s + queue_seconds(problem, utilisation)[None, :])


def queued_latency_s(problem: Problem, routing: Routing) -> float:
    """Seconds of a token when holders are as busy as the routing makes them."""
    return judge(with_queues(problem, node_load(problem, routing)), routing).predicted_latency_s


def solve_with_queues(problem: Problem, solve: Callable[[Problem], Solved], rounds: int = ROUNDS) -> Solved:
    """Solve, count queues and solve again; return the best placement with the queues that it causes itself."""
    first = solve(problem)
    best = with_own_queues(problem, first, first.result.bound)
    load = node_load(first.problem, first.routing)
    for _ in range(rounds - 1):
        if not load.any():
            break
        again = solve(with_queues(problem, load))
        found = with_own_queues(problem, again, first.result.bound)
        if _value(found) < _value(best):
            best = found
        following = (
            load + node_load(again.problem, again.routing)
        ) / 2  # half a step, so that two holders do not alternate
        if np.allclose(following, load, rtol=1e-3):
            break
        load = following
    return best


def _value(solved: Solved) -> float:
    return np.inf if solved.result.objective is None else solved.result.objective


def with_own_queues(problem: Problem, solved: Solved, bound: float | None) -> Solved:
    """Return a solve judged with its own queues, under a bound without any."""
    moved = problem.with_trunk(solved.problem.trunk_node)
    queued = with_queues(moved, node_load(moved, solved.routing))
    value = plan_cost(queued, solved.routing, solved.objective_name)
    result = with_status(replace(solved.result, objective=value, bound=bound), solved.asked_gap)
    return replace(solved, problem=queued, result=result, judgement=judge(queued, solved.routing))
