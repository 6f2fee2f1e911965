"""The placement problem as arrays: everything that solvers, objective and feasibility know.

Decides the axes, once for all: I ingresses, N nodes, P places, L layers, E experts, T tokens, K chosen experts,
U links. A place is a tier of a node with room for experts. Calls start where the trunk of a layer runs, so demand
and cost are counted from there: ``trunk_node`` is data, and `Problem.with_trunk` moves it with all that depends on it.
Must not know any solver, file or topology schema beyond `build_problem`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.capacity import Room, expert_budget, find_room, first_trunk
from planner.cost import (
    call_bytes,
    call_seconds,
    chosen_seconds,
    find_paths,
    hop_bytes,
    hop_seconds,
    service_seconds,
    trunk_seconds,
)
from planner.demand import activation_share
from planner.prompts import Prompts, find_prompts
from schemas.model import ModelSpec
from schemas.sizes import ExpertSizes
from schemas.topology import TIERS, Tier, Topology

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Events = NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Problem:
    """One placement problem.

    Attributes
    ----------
    expert_bytes, call_bytes
        Bytes of one expert in the checkpoint's precision; of one remote call, both directions.
    place_node, place_tier
        Node and tier (index into ``TIERS``) of each place, int64 ``[P]``, ordered by node, then fastest tier first:
        all tiers that a node has, wherever the trunk runs.
    capacity_bytes
        Room for experts beside trunk and KV cache, int64 ``[P]``.
    cost_s
        Seconds that a call from node n to a replica at place p adds to a token, float64 ``[N, P]``.
    service_s
        Seconds of the holder's compute per evaluation, float64 ``[P]``.
    transfer_s, latency_s
        Seconds to bring one expert in the checkpoint's precision from one node to another, and of it those that no
        byte takes, float64 ``[N, N]``.
    compute_limit
        Highest utilisation of a node's compute, float64 ``[N]``.
    link_ends, link_rate, link_limit
        Nodes of each link, int64 ``[U, 2]``; its bytes/s, and those that calls may put on it, float64 ``[U]``.
    hop_caller, hop_holder, hop_link
        One row per link on the path from caller to holder, int64 ``[H]``.
    ingress_node, tokens_per_s
        Node, int64 ``[I]``, and token rate, float64 ``[I]``, of each ingress.
    share
        Share of an ingress's tokens that activate an expert, float64 ``[I, L, E]``.
    trunk_node
        Node that runs the trunk of a layer for tokens of an ingress, int64 ``[I, L]``.
    required
        Failure domains that must hold each expert.
    domain
        Failure domain of each node, int64 ``[N]``; every node its own unless the topology says otherwise.
    pinned, banned
        Experts that a node must, must not hold, bool ``[N, L, E]``.
    events
        Recorded choices of each ingress's workload, int16 ``[T, L, K]`` each.
    trunk_bytes, kv_bytes
        Memory that trunk and KV cache take of each node, int64 ``[N]``.
    room
        Memory of every node before anything is taken, and what a trunk takes.
    hop_s
        Seconds that a token takes from the trunk at one node to the trunk at another, float64 ``[N, N]``; 0 to itself.
    trunk_s, chosen_s
        Seconds that a node computes a decoder layer without its experts, and the chosen experts of a layer,
        float64 ``[N]``.
    hop_bytes
        Bytes of one such hop.
    moves
        Whether the trunk may run elsewhere than `trunk_node` says; else solvers leave it there.
    prompts
        Prompts that count, and what they cost; None where none do.
    balance
        Seconds that `additive-latency` is charged per second of load of the heaviest node of each layer.
    """

    node_ids: tuple[str, ...]
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    call_bytes: int
    place_node: Ints
    place_tier: Ints
    capacity_bytes: Ints
    cost_s: Floats
    service_s: Floats
    transfer_s: Floats
    latency_s: Floats
    compute_limit: Floats
    link_ends: Ints
    link_rate: Floats
    link_limit: Floats
    hop_caller: Ints
    hop_holder: Ints
    hop_link: Ints
    ingress_node: Ints
    tokens_per_s: Floats
    share: Floats
    trunk_node: Ints
    required: int
    domain: Ints
    pinned: Bools
    banned: Bools
    events: tuple[Events, ...]
    trunk_bytes: Ints
    kv_bytes: Ints
    room: Room
    hop_s: Floats
    trunk_s: Floats
    chosen_s: Floats
    hop_bytes: int
    moves: bool = False
    balance: float = 0.0
    prompts: Prompts | None = None

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.node_ids)

    @property
    def num_places(self) -> int:
        """P."""
        return len(self.place_node)

    @cached_property
    def place_bytes(self) -> Ints:
        """Bytes that one expert takes in each place, by its node's precision, int64 ``[P]``."""
        return np.asarray(self.room.record_bytes[self.place_node, self.place_tier])

    @cached_property
    def memory_bytes(self) -> Ints:
        """Bytes that one expert takes in the memory of each node, and on the way there, int64 ``[N]``."""
        return np.asarray(self.room.record_bytes[:, : TIERS.index("disk")].min(axis=1))

    def sends(self, source: Ints, target: int) -> Bools:
        """Whether nodes have experts as another holds them: records travel in one precision, never changed.

        Those of the disk tier, which are the checkpoint's everywhere, are left out of account.
        """
        return np.asarray(self.memory_bytes[source] == self.memory_bytes[target])

    def seconds_to(self, place: int) -> Floats:
        """Seconds to bring one expert to a place from each node, by the bytes that it takes there, float64 ``[N]``."""
        node, share = self.place_node[place], self.place_bytes[place] / self.expert_bytes
        latency = self.latency_s[:, node]
        return np.asarray(latency + (self.transfer_s[:, node] - latency) * share)

    @cached_property
    def slots(self) -> Ints:
        """Experts that fit into each place, int64 ``[P]``."""
        return self.capacity_bytes // self.place_bytes

    @cached_property
    def node_slots(self) -> Ints:
        """Different experts that a node can hold over all of its tiers, int64 ``[N]``."""
        total = np.bincount(self.place_node, weights=self.slots, minlength=self.num_nodes).astype(np.int64)
        return np.minimum(total, self.layers * self.experts)

    @cached_property
    def allowed(self) -> Bools:
        """Whether an expert may be kept at a place, bool ``[P, L, E]``."""
        return ~self.banned[self.place_node] & (self.slots > 0)[:, None, None]

    @cached_property
    def demand(self) -> Floats:
        """Evaluations per second that tokens of an ingress ask for, float64 ``[I, L, E]``."""
        return self.tokens_per_s[:, None, None] * self.share

    @cached_property
    def caller_demand(self) -> Floats:
        """Evaluations per second that a node's trunk asks for, float64 ``[N, L, E]``."""
        total = np.zeros((self.num_nodes, self.layers, self.experts))
        for nodes, demand in zip(self.trunk_node, self.demand, strict=True):
            np.add.at(total, (nodes, np.arange(self.layers)), demand)
        return total

    def held(self, placed: Bools) -> Bools:
        """Whether a node holds an expert in any tier, bool ``[N, L, E]``, from places ``[P, L, E]``."""
        nodes = np.zeros((self.num_nodes, self.layers, self.experts), dtype=bool)
        for place, node in enumerate(self.place_node):
            nodes[node] |= placed[place]
        return nodes

    def num_domains(self, held: Bools) -> Ints:
        """Failure domains that hold each expert, int64 ``[L, E]``, from nodes ``[N, L, E]``."""
        spanned = [held[self.domain == domain].any(axis=0) for domain in range(int(self.domain.max()) + 1)]
        return np.asarray(np.sum(spanned, axis=0, dtype=np.int64))

    @cached_property
    def has_shared_domains(self) -> bool:
        """Whether two nodes fail together, where that matters: more than one domain must hold each expert."""
        return self.required > 1 and len(np.unique(self.domain)) < self.num_nodes

    def place_name(self, place: int) -> str:
        """Name a place as a reader does: ``press (host)``."""
        return f"{self.node_ids[self.place_node[place]]} ({self.tier(place)})"

    def tier(self, place: int) -> Tier:
        """Tier of a place."""
        return TIERS[int(self.place_tier[place])]

    def link_name(self, link: int) -> str:
        """Name a link by its two nodes."""
        first, second = self.link_ends[link]
        return f"{self.node_ids[first]} - {self.node_ids[second]}"

    @property
    def stay_node(self) -> Ints:
        """Trunk at the ingress, int64 ``[I, L]``."""
        return np.tile(self.ingress_node[:, None], (1, self.layers))

    @cached_property
    def compute_s(self) -> Floats:
        """Seconds that a node computes a layer of a token, all decoder layers that go with it, float64 ``[N, L]``."""
        return self.trunk_s[:, None] * np.diff(self.room.decoder_first)[None, :] + self.chosen_s[:, None]

    @cached_property
    def hop_load(self) -> Floats:
        """Bytes per second that hops of the trunk put on each link, float64 ``[U]``."""
        pairs = np.zeros((self.num_nodes, self.num_nodes))
        onward = np.roll(self.trunk_node, -1, axis=1)
        np.add.at(pairs, (self.trunk_node, onward), self.tokens_per_s[:, None])
        crossing = np.bincount(
            self.hop_link, weights=pairs[self.hop_caller, self.hop_holder], minlength=len(self.link_rate)
        )
        return crossing.astype(np.float64) * self.hop_bytes

    def with_trunk(self, trunk_node: Ints) -> "Problem":
        """Return the problem with the trunk elsewhere, ``[I, L]``: demand, room for experts and for calls on links.

        Raises
        ------
        InfeasibleProblem
            Where trunk and KV cache do not fit there.
        """
        budget = expert_budget(self.room, trunk_node)
        moved = replace(
            self,
            trunk_node=trunk_node,
            capacity_bytes=budget.expert_bytes[self.place_node, self.place_tier],
            trunk_bytes=budget.trunk_bytes,
            kv_bytes=budget.kv_bytes,
        )
        return replace(moved, link_limit=self.link_limit + self.hop_load - moved.hop_load)

    def judged_on(self, events: Sequence[Events]) -> "Problem":
        """Return the same cluster with the demand of other events, one array per ingress."""
        share = np.stack([activation_share(chosen, self.experts) for chosen in events])
        return replace(self, share=share, events=tuple(events))


def build_problem(
    topology: Topology,
    model: ModelSpec,
    events: Sequence[Events],
    shares: Sequence[Floats] | None = None,
    sizes: ExpertSizes | None = None,
) -> Problem:
    """Turn a topology and recorded choices into arrays.

    Parameters
    ----------
    model
        As held in the topology's dtype.
    events
        Chosen experts ``[T, L, K]`` of each ingress, in the order of the topology's nodes.
    shares
        Activation share ``[L, E]`` of each ingress where something newer than `events` is known.
    sizes
        Bytes of one expert by precision, see `find_room`.

    Raises
    ------
    InfeasibleProblem
        Where trunk and KV cache do not fit: at the ingresses, or where the trunk may move, anywhere.
    """
    room, paths = find_room(topology, model, sizes), find_paths(topology)
    ingress = np.array([n for n, node in enumerate(topology.nodes) if node.ingress], dtype=np.int64)
    stay = np.tile(ingress[:, None], (1, model.layers))
    moves, wanted = topology.trunk.mode == "move", topology.replicas.required * model.layers * model.experts
    trunk = first_trunk(room, ingress, experts=wanted) if moves else stay
    budget = expert_budget(room, trunk)
    place_node, place_tier = (axis.astype(np.int64) for axis in np.nonzero(room.room_bytes > 0))
    index = {node.id: position for position, node in enumerate(topology.nodes)}
    pinned, banned = _pins(topology, model, index)
    if shares is None:
        shares = [activation_share(chosen, model.experts) for chosen in events]
    problem = Problem(
        node_ids=tuple(index),
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        expert_bytes=model.expert_bytes,
        call_bytes=call_bytes(model),
        place_node=place_node,
        place_tier=place_tier,
        capacity_bytes=budget.expert_bytes[place_node, place_tier],
        cost_s=call_seconds(topology, model, paths)[:, place_node, place_tier],
        service_s=service_seconds(topology, model)[place_node, place_tier],
        transfer_s=paths.latency_s + model.expert_bytes / paths.bandwidth,
        latency_s=paths.latency_s,
        compute_limit=np.full(len(index), topology.limits.compute),
        link_ends=paths.link_ends,
        link_rate=np.array([link.bandwidth for link in topology.links], dtype=np.float64),
        link_limit=np.array([link.bandwidth * topology.limits.link for link in topology.links], dtype=np.float64),
        hop_caller=paths.hop_caller,
        hop_holder=paths.hop_holder,
        hop_link=paths.hop_link,
        ingress_node=ingress,
        tokens_per_s=np.array([node.ingress.tokens_per_s for node in topology.nodes if node.ingress]),
        share=np.stack(shares),
        trunk_node=stay,
        required=topology.replicas.required,
        domain=_domains(topology),
        pinned=pinned,
        banned=banned,
        events=tuple(events),
        trunk_bytes=budget.trunk_bytes,
        kv_bytes=budget.kv_bytes,
        room=room,
        hop_s=hop_seconds(topology, model, paths),
        trunk_s=trunk_seconds(topology),
        chosen_s=chosen_seconds(topology, model),
        hop_bytes=hop_bytes(model),
        moves=moves,
        prompts=find_prompts(topology, model, paths),
    )
    return problem.with_trunk(trunk) if moves else problem


def _domains(topology: Topology) -> Ints:
    named = [node.domain or f"node {node.id}" for node in topology.nodes]
    return np.unique(named, return_inverse=True)[1].astype(np.int64)


def _pins(topology: Topology, model: ModelSpec, index: dict[str, int]) -> tuple[Bools, Bools]:
    pinned = np.zeros((len(index), model.layers, model.experts), dtype=bool)
    banned = np.zeros_like(pinned)
    for pin in topology.pins:
        (banned if pin.ban else pinned)[index[pin.node], pin.layer, pin.expert] = True
    return pinned, banned
