"""How long a plan's steps take: its transfers stage by stage, each stage beginning when the one before has ended.

Decides nothing; it reads a plan's steps and asks `transfers` for their schedule. Must not know sockets.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from planner.problem import Problem
from planner.simulate.network import Network
from planner.transfers import Roads, Schedule, build_roads, schedule_transfers
from schemas.placement import Replica
from schemas.plan import Plan, Step


def schedule_plan(
    plan: Plan, problem: Problem, network: Network, before: Sequence[Replica] = (), stores: Sequence[str] = ()
) -> list[Schedule]:
    """Schedule a plan's transfers, one schedule per stage.

    Parameters
    ----------
    before
        Replicas of the plan in force; none where the cluster is empty.
    stores
        Nodes that can send every expert.
    """
    roads = build_roads(problem, network)
    return list(_stages(plan.steps, problem, roads, before=before, stores=stores))


def with_sources(plan: Plan, problem: Problem, schedules: Sequence[Schedule], before: Sequence[Replica]) -> Plan:
    """Return the plan with the sources of a schedule, one per stage, where these hold the replica before the stage.

    A schedule may relay what has only just arrived; such a step keeps the source that it had.
    """
    held: set[tuple[str | None, int | None, int | None]] = {
        (replica.node, replica.layer, replica.expert) for replica in before
    }
    stages = dict(zip(sorted({step.stage for step in plan.steps}), schedules, strict=True))
    steps: list[Step] = []
    for number, schedule in stages.items():
        source = {(one.expert, one.target): problem.node_ids[one.source] for one in schedule.transfers}
        index = {node: position for position, node in enumerate(problem.node_ids)}
        here = [step for step in plan.steps if step.stage == number]
        for step in here:
            named = None
            if step.action == "replicate" and step.layer is not None and step.expert is not None:
                named = source.get((step.layer * problem.experts + step.expert, index.get(step.node or "", -1)))
            known = (named, step.layer, step.expert) in held
            steps.append(step.model_copy(update={"source": named}) if known else step)
        held -= {(step.node, step.layer, step.expert) for step in here if step.action == "drop"}
        held |= {(step.node, step.layer, step.expert) for step in here if step.action == "replicate"}
    return plan.model_copy(update={"steps": tuple(steps)})


def makespan_s(schedules: Sequence[Schedule]) -> float:
    """Seconds until the last transfer of the last stage."""
    return sum(schedule.makespan_s for schedule in schedules)


def _stages(
    steps: Sequence[Step], problem: Problem, roads: Roads, *, before: Sequence[Replica], stores: Sequence[str]
) -> Iterator[Schedule]:
    index = {node: number for number, node in enumerate(problem.node_ids)}
    held = np.zeros((problem.num_nodes, problem.layers * problem.experts), dtype=bool)
    for replica in before:
        if replica.node in index:
            held[index[replica.node], replica.layer * problem.experts + replica.expert] = True
    sending = [index[node] for node in stores]
    for stage in sorted({step.stage for step in steps}):
        wanted, dropped = (
            [
                (step.layer * problem.experts + step.expert, index[step.node])
                for step in steps
                if (step.stage, step.action) == (stage, action)
                and step.layer is not None
                and step.expert is not None
                and step.node in index
            ]
            for action in ("replicate", "drop")
        )
        fresh = [(expert, node) for expert, node in wanted if not held[node, expert]]  # else it only changes its tier
        yield schedule_transfers(fresh, held, roads, problem.memory_bytes, sending)
        for expert, node in wanted:
            held[node, expert] = True
        kept = set(wanted)
        for expert, node in dropped:
            held[node, expert] = (expert, node) in kept
