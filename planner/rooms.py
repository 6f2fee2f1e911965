"""What is left of each node's memory for experts while tokens change their paths.

Decides what of it a migration may count on: beside the trunks and KV caches of the paths before, and of both. Must not
know which experts go where.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from planner.capacity import Room
from planner.errors import UnsafePlan
from planner.problem import Ints
from schemas.model import ModelSpec
from schemas.paths import path_memory
from schemas.plan import TrunkPath
from schemas.topology import TIERS, Context
from schemas.units import format_bytes


def expert_room(room: Room, model: ModelSpec, paths: Iterable[TrunkPath]) -> Ints:
    """Bytes left for experts, int64 ``[N, 3]``; negative where trunk and KV cache alone do not fit."""
    paths, context = tuple(paths), Context(tokens=room.tokens, sessions=room.sessions)
    left = room.room_bytes.copy()
    taken = [path_memory(node, paths, model, context).total for node in room.node_ids]
    left[np.arange(len(left)), room.trunk_tier] -= np.array(taken, dtype=np.int64)
    return left


@dataclass(frozen=True, eq=False)
class Rooms:
    """Bytes for experts by node and tier, int64 ``[N, 3]`` each: under the paths before, and beside both."""

    before: Ints
    both: Ints

    @classmethod
    def between(cls, room: Room, model: ModelSpec, before: Iterable[TrunkPath], after: Iterable[TrunkPath]) -> Self:
        """Return the rooms of a change of paths.

        Raises
        ------
        UnsafePlan
            Naming each node where the trunks of both do not fit, and how much is missing.
        """
        before = tuple(before)
        both = (*before, *after)
        beside = expert_room(room, model, both)
        if reasons := list(_too_small(room, model, both, beside)):
            raise UnsafePlan(reasons)
        return cls(expert_room(room, model, before), beside)


def _too_small(room: Room, model: ModelSpec, both: tuple[TrunkPath, ...], left: Ints) -> Iterator[str]:
    context = Context(tokens=room.tokens, sessions=room.sessions)
    for number, node in enumerate(room.node_ids):
        missing = -int(left[number].min())
        if missing > 0:
            need, tier = path_memory(node, both, model, context), TIERS[room.trunk_tier[number]]
            yield (
                f"node {node}: while tokens change their paths, the trunks before and after "
                f"({format_bytes(need.trunk_bytes)}) and their KV caches ({format_bytes(need.kv_bytes)}) need "
                f"{format_bytes(need.total)} of {tier} memory, but {format_bytes(need.total - missing)} are there: "
                f"{format_bytes(missing)} missing; enlarge {node}'s {tier} memory, plan a shorter context, or go over "
                "a plan in between"
            )
