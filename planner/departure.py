"""The plan in force as the place that a new one departs from: which arrangements can be come to from it.

Decides nothing that `steps` does not: a trunk can be come to where it fits beside the one that runs, with room left for
every expert once; an arrangement where there is an order of steps. Must not know how arrangements are found.
"""

from dataclasses import dataclass

import numpy as np

from planner.assemble import Solved, plan_steps
from planner.errors import UnsafePlan
from planner.inputs import Inputs
from planner.problem import Ints, Problem
from schemas.plan import Plan


@dataclass(frozen=True, eq=False)
class Departure:
    """Tells what can be reached from a plan in force.

    Attributes
    ----------
    plan, problem
        What is in force, and the problem with its trunk.
    """

    inputs: Inputs
    plan: Plan
    problem: Problem

    def allows(self, trunk_node: Ints) -> bool:
        """Whether a trunk ``[I, L]`` fits beside the present one, and every expert beside both. Quick."""
        problem, room = self.problem, self.problem.room
        left = room.room_bytes.copy()
        left[np.arange(len(left)), room.trunk_tier] -= sum(room.taken(problem.trunk_node, trunk_node))
        if left.min() < 0:
            return False
        return int(room.slots(left).sum()) >= problem.layers * problem.experts

    def reaches(self, solved: Solved) -> bool:
        """Whether there is an order of steps to an arrangement."""
        try:
            plan_steps(self.inputs, solved, self.plan)
        except UnsafePlan:
            return False
        return True
