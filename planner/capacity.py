"""What is left of each node's memory for experts once the trunk that it runs and the KV cache have their room.

Decides which tier trunk and KV cache take: device where a node has one, else host. A node pays for the trunk of every
layer that it runs once, however many ingresses run it there, and for the KV cache of each of them. Must not know which
experts go where.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import InfeasibleProblem, Violation
from schemas.model import ModelSpec
from schemas.sizes import ExpertSizes, sizes_of_spec
from schemas.topology import TIERS, Topology
from schemas.units import format_bytes

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Room:
    """Memory of every node, and what running a trunk takes of it. Axes: N nodes, L layers with experts.

    Attributes
    ----------
    room_bytes
        Memory of each tier, int64 ``[N, 3]``.
    record_bytes
        What one expert takes in each tier, int64 ``[N, 3]``: packed where a node holds experts in a low precision,
        but for records on disk, which are the checkpoint's.
    trunk_tier
        Tier (index into ``TIERS``) that trunk and KV cache take, int64 ``[N]``.
    decoder_first
        First decoder layer of each layer, and the number of decoder layers, int64 ``[L + 1]``: a decoder layer without
        experts goes with the next that has some, or with the last.
    decoder_of
        Decoder layer that has the experts of each layer, int64 ``[L]``.
    layer_bytes
        Trunk of each layer, int64 ``[L]``.
    kv_bytes
        KV cache that the sessions of one ingress take in each layer, int64 ``[L]``.
    input_bytes, head_bytes, both_bytes
        Beside the first layer's trunk, beside the last's, and where one node runs both.
    tokens, sessions
        The context that was planned for.
    """

    node_ids: tuple[str, ...]
    room_bytes: Ints
    record_bytes: Ints
    trunk_tier: Ints
    decoder_first: Ints
    decoder_of: Ints
    layer_bytes: Ints
    kv_bytes: Ints
    input_bytes: int
    head_bytes: int
    both_bytes: int
    tokens: int
    sessions: int

    @property
    def own_bytes(self) -> Ints:
        """Memory of the tier that trunk and KV cache take, int64 ``[N]``."""
        return np.asarray(self.room_bytes[np.arange(len(self.room_bytes)), self.trunk_tier])

    def slots(self, left: Ints) -> Ints:
        """Return how many experts fit into what is left of each tier, int64 ``[N, 3]``."""
        return np.asarray(np.maximum(left, 0) // self.record_bytes)

    def trunk_bytes(self, runs: Bools) -> Ints:
        """Bytes of the trunk of the layers that nodes run, int64 ``[...]`` from bool ``[..., L]``."""
        starts, ends = runs[..., 0], runs[..., -1]
        outside = np.where(
            starts, np.where(ends, self.both_bytes, self.input_bytes), np.where(ends, self.head_bytes, 0)
        )
        return np.asarray(runs @ self.layer_bytes + outside)

    def taken(self, *trunk_node: Ints) -> tuple[Ints, Ints]:
        """Bytes of trunk and of KV cache at each node, int64 ``[N]`` each, from trunk nodes ``[I, L]``.

        Of several trunks that are there at the same time each layer, and its cache of each ingress, counts once.
        """
        nodes = np.arange(len(self.node_ids))[:, None, None]
        runs = np.logical_or.reduce([each[None] == nodes for each in trunk_node])  # [N, I, L]
        return self.trunk_bytes(runs.any(axis=1)), np.asarray(runs.sum(axis=1) @ self.kv_bytes)

    def fits(self, trunk_node: Ints) -> bool:
        """Whether trunk and KV cache fit where they would run."""
        trunk, kv = self.taken(trunk_node)
        return bool((trunk + kv <= self.own_bytes).all())


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


def record_bytes(topology: Topology, sizes: ExpertSizes) -> Ints:
    """Return what one expert takes in each tier of each node, int64 ``[N, 3]``; precisions are known to fit."""
    held = [sizes[node.precision or "checkpoint"] for node in topology.nodes]
    rows = [[sizes["checkpoint"] if tier == "disk" else size for tier in TIERS] for size in held]
    return np.array(rows, dtype=np.int64).reshape(-1, len(TIERS))


def find_room(topology: Topology, model: ModelSpec, sizes: ExpertSizes | None = None) -> Room:
    """Return the memory of a topology, and what trunk, KV cache and experts of a model take.

    Parameters
    ----------
    sizes
        Of one expert by precision; as of a gated network without biases where None.
    """
    context = topology.context
    room = np.array([[getattr(node.memory, tier) for tier in TIERS] for node in topology.nodes], dtype=np.int64)
    first = np.array([0, *(layer + 1 for layer in model.moe_layer_indices[:-1]), model.num_decoder_layers])
    kv = model.kv_bytes_per_token_layer * context.tokens * context.sessions
    return Room(
        node_ids=tuple(node.id for node in topology.nodes),
        room_bytes=room,
        record_bytes=record_bytes(topology, sizes_of_spec(model) if sizes is None else sizes),
        trunk_tier=np.where(room[:, 0] > 0, 0, 1),
        decoder_first=first.astype(np.int64),
        decoder_of=np.array(model.moe_layer_indices, dtype=np.int64),
        layer_bytes=np.diff(first).astype(np.int64) * model.trunk_layer_bytes,
        kv_bytes=np.diff(first).astype(np.int64) * kv,
        input_bytes=model.embedding_bytes if model.input_bytes is None else model.input_bytes,
        head_bytes=model.embedding_bytes if model.head_bytes is None else model.head_bytes,
        both_bytes=model.embedding_bytes,
        tokens=context.tokens,
        sessions=context.sessions,
    )


def expert_budget(room: Room, trunk_node: Ints) -> Budget:
    """Subtract trunk and KV cache from the memory of every node that runs layers, ``trunk_node [I, L]``.

    Raises
    ------
    InfeasibleProblem
        Naming each node whose trunk and KV cache do not fit, how much is missing, and for which context.
    """
    trunk, kv = room.taken(trunk_node)
    if missing := list(_violations(room, trunk_node, trunk, kv)):
        raise InfeasibleProblem(missing)
    left = room.room_bytes.copy()
    left[np.arange(len(left)), room.trunk_tier] -= trunk + kv
    return Budget(trunk, kv, left)


def _violations(room: Room, trunk_node: Ints, trunk: Ints, kv: Ints) -> Iterator[Violation]:
    need = trunk + kv
    for node in np.flatnonzero(need > room.own_bytes):
        name, tier, have = room.node_ids[node], TIERS[room.trunk_tier[node]], int(room.own_bytes[node])
        runs = int((trunk_node == node).any(axis=0).sum())
        part = "trunk" if runs == len(room.layer_bytes) else f"trunk of {runs} layers with experts"
        message = (
            f"node {name}: {part} ({format_bytes(int(trunk[node]))}) and KV cache ({format_bytes(int(kv[node]))}) "
            f"need {format_bytes(int(need[node]))} of {tier} memory, but {format_bytes(have)} are there: "
            f"{format_bytes(int(need[node]) - have)} missing; enlarge {name}'s {tier} memory or plan a shorter context "
            f"than {room.sessions} × {room.tokens} tokens"
        )
        yield Violation("trunk", name, int(need[node]), have, "bytes", message)


def first_trunk(room: Room, ingress_node: Ints, *, experts: int) -> Ints:
    """Choose a trunk that fits, int64 ``[I, L]``.

    At the ingresses where that leaves room for `experts` too, else one path for all over the nodes with most memory.

    Raises
    ------
    InfeasibleProblem
        Where neither fits.
    """
    layers = len(room.layer_bytes)
    stay = np.tile(ingress_node[:, None], (1, layers))
    shared = _shared_path(room, len(ingress_node))
    if room.fits(stay):
        left = room.slots(expert_budget(room, stay).expert_bytes)
        if shared is None or left.sum() >= experts:
            return stay
    if shared is None:
        raise InfeasibleProblem([_no_path(room, len(ingress_node))])
    return np.tile(shared, (len(ingress_node), 1))


def _shared_path(room: Room, ingresses: int) -> Ints | None:
    """Fill nodes with layers, those with most memory first, int64 ``[L]``; None where layers are left over."""
    path = np.full(len(room.layer_bytes), -1, dtype=np.int64)
    layer = 0
    for node in np.argsort(-room.own_bytes, kind="stable").tolist():
        while layer < len(path):
            path[layer] = node
            runs = path == node
            if int(room.trunk_bytes(runs)) + ingresses * int(runs @ room.kv_bytes) > room.own_bytes[node]:
                path[layer] = -1
                break
            layer += 1
    return path if layer == len(path) else None


def _no_path(room: Room, ingresses: int) -> Violation:
    everywhere = np.ones(len(room.layer_bytes), dtype=bool)
    kv = ingresses * int(room.kv_bytes.sum())
    need, have = int(room.trunk_bytes(everywhere)) + kv, int(room.own_bytes.sum())
    largest = room.node_ids[int(room.own_bytes.argmax())]
    message = (
        f"no nodes have room for the trunk ({format_bytes(need - kv)}) and KV cache ({format_bytes(kv)}, "
        f"{room.sessions} × {room.tokens} tokens for each of {ingresses} ingresses) of all layers, one after another: "
        f"{format_bytes(need)} are needed, {format_bytes(have)} are there in the tiers that may hold them; enlarge "
        f"{largest} or plan a shorter context"
    )
    return Violation("trunk", "all nodes", need, have, "bytes", message)
