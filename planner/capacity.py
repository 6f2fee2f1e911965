"""What is left of each node's memory for experts once trunk and KV cache have their room.

Decides which tier trunk and KV cache take: device where a node has one, else host, at every node where tokens
enter. Must not know which experts go where.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import InfeasibleProblem, Violation
from schemas.model import ModelSpec
from schemas.topology import TIERS, Node, Topology
from schemas.units import format_bytes


@dataclass(frozen=True)
class Budget:
    """Bytes of each node by what they are for.

    Attributes
    ----------
    trunk_bytes, kv_bytes
        Room of trunk and KV cache, int64 ``[N]``.
    expert_bytes
        Room for experts in each tier, int64 ``[N, 3]``.
    """

    trunk_bytes: NDArray[np.int64]
    kv_bytes: NDArray[np.int64]
    expert_bytes: NDArray[np.int64]


def expert_budget(topology: Topology, model: ModelSpec) -> Budget:
    """Subtract trunk and KV cache from every ingress node's memory.

    Raises
    ------
    InfeasibleProblem
        Naming each node whose trunk and KV cache do not fit, and how much is missing.
    """
    context = topology.context
    kv = model.kv_bytes(tokens=context.tokens, sessions=context.sessions)
    runs_trunk = np.array([node.ingress is not None for node in topology.nodes])
    room = np.array([[getattr(node.memory, tier) for tier in TIERS] for node in topology.nodes], dtype=np.int64)
    tier = np.where(room[:, 0] > 0, 0, 1)
    own = np.arange(len(topology.nodes))
    room[own, tier] -= np.where(runs_trunk, model.trunk_bytes + kv, 0)
    if missing := [
        _trunk_violation(topology.nodes[n], model.trunk_bytes, kv, TIERS[tier[n]])
        for n in np.flatnonzero(room[own, tier] < 0)
    ]:
        raise InfeasibleProblem(missing)
    return Budget(np.where(runs_trunk, model.trunk_bytes, 0), np.where(runs_trunk, kv, 0), room)


def _trunk_violation(node: Node, trunk: int, kv: int, tier: str) -> Violation:
    have = getattr(node.memory, tier)
    message = (
        f"node {node.id}: trunk ({format_bytes(trunk)}) and KV cache ({format_bytes(kv)}) need "
        f"{format_bytes(trunk + kv)} of {tier} memory, but {format_bytes(have)} are there: "
        f"{format_bytes(trunk + kv - have)} missing; enlarge {node.id}'s {tier} memory or plan a shorter context"
    )
    return Violation("trunk", node.id, trunk + kv, have, "bytes", message)
