"""What assignments ask of a node and whether it has room for that: replicas, parts of the trunk, layers, KV cache.

Decides what is there twice (an expert in two tiers, weights that two epochs need: once) and with which words something
does not fit. Pure; must not know in which order epochs come.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from agent.sessions import Range, range_of
from schemas.messages import AssignedReplica, AssignedTrunkPart, Assignment, TierBytes
from schemas.model import ModelSpec
from schemas.paths import PathMemory, path_memory
from schemas.plan import Segment, TrunkPath
from schemas.precision import Precision
from schemas.topology import TIERS, Context, Tier
from schemas.units import format_bytes

Held = tuple[int, int, Tier]


@dataclass(frozen=True)
class MemoryBudget:
    """What the node may use, and what the trunk and KV cache of the layers that it runs take of it.

    Attributes
    ----------
    trunk_tier
        Where trunk and KV cache are.
    spec, context
        The model as held, and how many tokens of how many sessions every ingress has room for.
    precision, offers
        In which the node holds experts in memory now, and those that it may hold them in.
    sizes
        Bytes of an expert in memory by precision; those of its record where one is left out.
    """

    node: str
    memory: TierBytes
    trunk_tier: Tier
    spec: ModelSpec
    context: Context
    precision: Precision = "checkpoint"
    offers: tuple[Precision, ...] = ("checkpoint",)
    sizes: Mapping[Precision, int] = field(default_factory=dict)

    def held_bytes(self, replica: AssignedReplica) -> int:
        """Return what a replica takes of its tier: records on disk are the checkpoint's whatever the precision."""
        size = replica.record.bytes
        return size if replica.tier == "disk" else self.sizes.get(self.precision, size)

    def holds_for(self, assignment: Assignment) -> bool:
        """Whether an assignment gives this node experts or layers."""
        return bool(assignment.replicas or self.ranges((assignment,)))

    def paths(self, assignment: Assignment) -> tuple[TrunkPath, ...]:
        """Return the paths through this node; an ingress without one runs every layer itself."""
        known = {path.ingress for path in assignment.paths}
        if not assignment.ingress or self.node in known:
            return assignment.paths
        whole = Segment(node=self.node, first_layer=0, last_layer=self.spec.num_decoder_layers - 1)
        return (*assignment.paths, TrunkPath(ingress=self.node, segments=(whole,)))

    def path_memory(self, assignments: Iterable[Assignment]) -> PathMemory:
        """Return what trunk and KV cache of all these assignments take together."""
        paths = [path for assignment in assignments for path in self.paths(assignment)]
        return path_memory(self.node, paths, self.spec, self.context)

    def ranges(self, assignments: Iterable[Assignment]) -> Mapping[Range, int]:
        """Return the layer ranges that this node runs, and the bytes of KV cache of all who enter through each."""
        users: dict[Range, set[str]] = defaultdict(set)
        for assignment in assignments:
            for path in self.paths(assignment):
                for segment in path.segments:
                    if segment.node == self.node:
                        users[range_of(segment)].add(path.ingress)
        each = self.spec.kv_bytes_per_token_layer * self.context.tokens * self.context.sessions
        return {key: each * (key[1] - key[0] + 1) * len(ingresses) for key, ingresses in users.items()}


def wanted_replicas(assignments: Iterable[Assignment]) -> dict[Held, AssignedReplica]:
    """Return what must be here by (layer, expert, tier); an expert may be in two tiers while an epoch changes."""
    return {(r.record.layer, r.record.expert, r.tier): r for a in assignments for r in a.replicas}


def wanted_parts(assignments: Iterable[Assignment]) -> dict[str, AssignedTrunkPart]:
    """Return the parts of the trunk that must be here, by their sha256."""
    return {part.record.sha256: part for a in assignments for part in a.trunk}


def over_budget(assignments: Iterable[Assignment], budget: MemoryBudget) -> str:
    """Say which tier these assignments exceed together, and by how much; empty if they fit."""
    held = tuple(assignments)
    used: Counter[Tier] = Counter()
    for replica in wanted_replicas(held).values():
        used[replica.tier] += budget.held_bytes(replica)
    trunk = budget.path_memory(held)
    for tier in TIERS:
        memory = int(getattr(budget.memory, tier))
        left = memory - (trunk.total if tier == budget.trunk_tier else 0)
        if left < 0:
            return _trunk_excess(budget, trunk, tier, -left)
        if used[tier] > left:
            return (
                f"{tier} memory: experts need {format_bytes(used[tier])}, {format_bytes(used[tier] - left)} more "
                f"than the {format_bytes(left)} left for them; raise memory.{tier} in the agent's config or solve "
                "with what it says"
            )
    return ""


def unlike_precision(assignment: Assignment, held: Iterable[Assignment], budget: MemoryBudget) -> str:
    """Say why a node cannot hold experts in the precision that an assignment asks for; empty if it can.

    It changes its precision only while it has nothing: what is there was made for another. Started again, it makes
    another of the checkpoint's records.
    """
    wanted = assignment.precision
    if wanted is None or wanted == budget.precision:
        return ""
    if wanted not in budget.offers:
        return (
            f"the plan wants experts in {wanted} here, this agent holds them in {budget.precision}; set precision: "
            f"{wanted} (or plan, to follow plans) in the agent's config and start it again, or solve with precision: "
            f"{budget.precision} for {budget.node}"
        )
    for other in held:
        if budget.holds_for(other):
            way = f"apply a plan first that gives {budget.node} neither experts nor layers"
            if budget.precision == "checkpoint":
                way = f"start it again with agent run --precision {wanted} and apply again"
            return (
                f"holds experts in {budget.precision} for epoch {other.epoch}, the plan wants them in {wanted}; {way}, "
                f"or solve with precision: {budget.precision} for {budget.node}"
            )
    return ""


def short_context(assignment: Assignment, budget: MemoryBudget) -> str:
    """Say how much more context an assignment was planned for than this node is set to; empty if no more."""
    planned, own = assignment.context, budget.context
    if planned is None or not (assignment.ingress or assignment.paths):
        return ""
    if planned.tokens <= own.tokens and planned.sessions <= own.sessions:
        return ""
    return (
        f"was planned for {planned.sessions} sessions of {planned.tokens} tokens, this agent is set to "
        f"{own.sessions} of {own.tokens}; set context in the agent's config to the topology's, or solve with less"
    )


def _trunk_excess(budget: MemoryBudget, trunk: PathMemory, tier: Tier, excess: int) -> str:
    context = budget.context
    return (
        f"trunk ({format_bytes(trunk.trunk_bytes)}) and KV cache ({format_bytes(trunk.kv_bytes)} for a context of "
        f"{context.tokens} tokens in {context.sessions} sessions of every ingress) need {format_bytes(trunk.total)} of "
        f"{tier} memory, {format_bytes(excess)} more than its {format_bytes(getattr(budget.memory, tier))}; raise "
        f"memory.{tier} in the agent's config, or plan for less context"
    )
