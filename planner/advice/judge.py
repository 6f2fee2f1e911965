"""Whether newer traces are worth a new plan, and that plan.

Decides nothing of its own: `replay` looks, `replan` decides, `assemble` writes. Must not know files.
"""

from collections.abc import Callable
from dataclasses import dataclass

from planner.advice.replay import Look, batch_size, replay
from planner.assemble import Solved, make_plan, require_same
from planner.inputs import Inputs
from planner.moving import schedule_plan, with_sources
from planner.problem import Problem
from planner.replan import Arrangement, MovingRules
from planner.simulate.network import build_network
from planner.simulate.placement import placed_by, routing_by, with_trunk_of
from planner.worth import Choice, InForce, MovingTerms, movement
from schemas.plan import Plan


@dataclass(frozen=True, eq=False)
class Replanned:
    """Every look that was taken, and the plan of the last that moves; None where none does."""

    looks: tuple[Look, ...]
    plan: Plan | None


def replan_on(
    inputs: Inputs, before: Plan, solve: Callable[[Problem], Solved], *, rules: MovingRules, batch: int
) -> Replanned:
    """Watch the inputs' traces go by under the plan in force.

    Raises
    ------
    ForeignPlan, UnlikePlan
        The plan is of another cluster or model, or of places that the topology does not have.
    InfeasibleProblem
        The topology has no room any more for the trunk where the plan runs it.
    """
    require_same(inputs, before)
    problem = inputs.problem()
    events, there = problem.events, InForce(placed_by(before, problem), with_trunk_of(before, problem))
    now = Arrangement(there.placed, routing_by(before, problem), there.problem.trunk_node)
    looks = tuple(replay(problem, now, events, solve, rules=rules, size=batch_size(events, batch)))
    moves = [look for look in looks if look.decision.move]
    if not moves:
        return Replanned(looks, None)
    last = moves[-1]
    plan = make_plan(inputs, last.candidate, before)
    schedules = schedule_plan(plan, problem, build_network(inputs.topology), before.placement)
    choice = Choice(last.candidate, True, last.decision.reason, last.decision.sure_benefit_s / rules.horizon_s)
    terms = MovingTerms(horizon_s=rules.horizon_s, max_bytes=rules.max_bytes)
    found = movement(choice, there, schedules, terms, last.candidate)
    plan = with_sources(plan, problem, schedules, before.placement)
    summary = plan.summary.model_copy(update={"movement": found})
    return Replanned(looks, plan.model_copy(update={"summary": summary}).sealed())
