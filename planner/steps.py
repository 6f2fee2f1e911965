"""The stages of a migration as a plan's steps: where each new replica comes from, and what is dropped.

Decides the order of steps inside a stage and the source of each replica. Flow: records → arrays → `migration`, or
`crossing` where tokens change their paths → steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from planner.crossing import Crowded, Grounds, plan_crossing
from planner.errors import UnsafePlan
from planner.migration import Ground, Stage, plan_stages
from planner.problem import Bools, Ints, Problem
from planner.rooms import Rooms
from schemas.placement import Replica
from schemas.plan import Step
from schemas.topology import TIERS, Tier
from schemas.units import format_bytes

_NOBODY: Final = -1


@dataclass(frozen=True, eq=False)
class Atlas:
    """Names of the places that replicas leave or come to; those the topology no longer has come last.

    Attributes
    ----------
    nodes
        Names by the node numbers of `ground`.
    tiers
        Tier of each place.
    """

    problem: Problem
    nodes: tuple[str, ...]
    tiers: tuple[Tier, ...]
    ground: Ground

    def bytes_at(self, place: int) -> int:
        """Return what an expert takes in a place, and on the way there; as in a checkpoint where nobody knows it."""
        sizes = self.problem.place_bytes
        return int(sizes[place]) if place < len(sizes) else self.problem.expert_bytes

    def place(self, records: Sequence[Replica]) -> Bools:
        """Return records as an array, bool ``[P, K]``."""
        index = {
            (self.nodes[node], tier): place
            for place, (node, tier) in enumerate(zip(self.ground.place_node.tolist(), self.tiers, strict=True))
        }
        array = np.zeros(self.ground.allowed.shape, dtype=bool)
        for replica in records:
            expert = replica.layer * self.problem.experts + replica.expert
            array[index[replica.node, replica.tier], expert] = True
        return array

    def ground_with(self, room: Ints, held: Bools) -> Ground:
        """Return the ground with other room, bytes ``[N, 3]`` of the topology's nodes; `held` is what is there now.

        What a node that the topology no longer has holds may stay there.
        """
        number = {node: position for position, node in enumerate(self.problem.node_ids)}
        slots, fitting = held.sum(axis=1), self.problem.room.slots(room)
        for place, (node, tier) in enumerate(zip(self.ground.place_node.tolist(), self.tiers, strict=True)):
            if (known := number.get(self.nodes[node])) is not None:
                slots[place] = fitting[known, TIERS.index(tier)]
        return replace(self.ground, slots=slots)


def draw_atlas(problem: Problem, before: Sequence[Replica]) -> Atlas:
    """Name all places of the problem, and those where replicas are now; nothing new may go to the latter."""
    known = [
        (problem.node_ids[node], TIERS[tier])
        for node, tier in zip(problem.place_node.tolist(), problem.place_tier.tolist(), strict=True)
    ]
    places = list(dict.fromkeys([*known, *((replica.node, replica.tier) for replica in before)]))
    nodes = tuple(dict.fromkeys([*problem.node_ids, *(node for node, _ in places)]))
    number = {node: position for position, node in enumerate(nodes)}
    count, extra = problem.layers * problem.experts, len(places) - len(known)
    allowed = np.zeros((len(places), count), dtype=bool)
    allowed[: len(known)] = problem.allowed.reshape(-1, count)
    ground = Ground(
        place_node=np.array([number[node] for node, _ in places], dtype=np.int64),
        slots=np.concatenate([problem.slots, np.zeros(extra, dtype=np.int64)]),
        allowed=allowed,
    )
    return Atlas(problem, nodes, tuple(tier for _, tier in places), ground)


class Migration(NamedTuple):
    """The steps of a plan, the stages that they make, and that which switches the trunk; None: it stays as it is."""

    steps: tuple[Step, ...]
    stages: int
    trunk_stage: int | None = None


def migration_steps(
    problem: Problem, before: Sequence[Replica], after: Sequence[Replica], rooms: Rooms | None = None
) -> Migration:
    """Return the steps from one placement to another.

    Parameters
    ----------
    rooms
        Where tokens change their paths meanwhile.

    Raises
    ------
    UnsafePlan
        Naming what does not fit, where that can be told.
    """
    atlas = draw_atlas(problem, before)
    held, target = atlas.place(before), atlas.place(after)
    stages, trunk_stage = _stages(atlas, held, target, rooms)
    steps: list[Step] = []
    for number, stage in enumerate(stages, start=1):
        steps.extend(_stage_steps(atlas, number, stage, held))
        held = stage.after(held)
    return Migration(tuple(steps), len(stages), trunk_stage)


def _stages(atlas: Atlas, held: Bools, target: Bools, rooms: Rooms | None) -> tuple[list[Stage], int | None]:
    keep = atlas.problem.required
    if rooms is None:
        return plan_stages(held, target, atlas.ground, keep=keep), None
    grounds = Grounds(atlas.ground_with(rooms.before, held), atlas.ground_with(rooms.both, held), atlas.ground)
    try:
        stages, switch = plan_crossing(held, target, grounds, keep=keep)
    except Crowded as error:
        raise UnsafePlan(_crowded(atlas, grounds.both, error.excess)) from error
    return stages, switch


def _crowded(atlas: Atlas, both: Ground, excess: Ints) -> Iterator[str]:
    for place in np.flatnonzero(excess).tolist():
        name = atlas.nodes[int(both.place_node[place])]
        missing = format_bytes(int(excess[place]) * atlas.bytes_at(place))
        yield (
            f"node {name} ({atlas.tiers[place]}): while the trunks before and after are both there, it has room for "
            f"{int(both.slots[place])} experts, and {int(excess[place])} more that no other node holds have nowhere to "
            f"go: {missing} missing; enlarge any node's memory by that, or go over a plan in between"
        )


def _stage_steps(atlas: Atlas, number: int, stage: Stage, held: Bools) -> Iterator[Step]:
    experts, ground = atlas.problem.experts, atlas.ground
    sources = _nearest_sources(atlas.problem, ground.nodes(held))
    for expert, place in np.argwhere(stage.replicate.T).tolist():
        node = int(ground.place_node[place])
        source = int(sources[node, expert])
        yield Step(
            stage=number,
            action="replicate",
            layer=expert // experts,
            expert=expert % experts,
            node=atlas.nodes[node],
            tier=atlas.tiers[place],
            bytes=atlas.bytes_at(place),
            source=None if source == _NOBODY else atlas.nodes[source],
        )
    yield Step(stage=number, action="switch")
    for expert, place in np.argwhere(stage.drop.T).tolist():
        yield Step(
            stage=number,
            action="drop",
            layer=expert // experts,
            expert=expert % experts,
            node=atlas.nodes[int(ground.place_node[place])],
            tier=atlas.tiers[place],
            bytes=atlas.bytes_at(place),
        )


def _nearest_sources(problem: Problem, holding: Bools) -> Ints:
    """Node to bring an expert from, the quickest present holder, int64 ``[N, K]``; nobody where none holds it."""
    total = len(holding)
    quickest = np.full((total, total), np.finfo(np.float64).max)  # nodes that left the topology come last
    quickest[: problem.num_nodes, : problem.num_nodes] = problem.transfer_s
    for node in range(problem.num_nodes):
        unlike = ~problem.sends(np.arange(problem.num_nodes), node)
        quickest[: problem.num_nodes][unlike, node] = np.inf  # what is packed otherwise is no use
    sources = np.empty(holding.shape, dtype=np.int64)
    known = np.zeros(holding.shape, dtype=bool)
    for node in range(total):
        seconds = np.where(holding, quickest[:, node][:, None], np.inf)
        sources[node], known[node] = seconds.argmin(axis=0), np.isfinite(seconds).any(axis=0)
    return np.where(known, sources, _NOBODY)
