"""topology.yaml: the machines, their links and workloads, and what the operator asks for.

Decides what a topology may say and which of its parts contradict each other. Must not know how it is solved.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from schemas.base import FrozenModel
from schemas.files import Fault, load_yaml
from schemas.model import HeldDtype
from schemas.precision import Precision
from schemas.units import Bandwidth, Bytes, Seconds, Share

NodeId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Tier = Literal["device", "host", "disk"]
TIERS: Final[tuple[Tier, ...]] = ("device", "host", "disk")  # fastest first

DEFAULT_COORDINATOR_PORT: Final = 7400


class Memory(FrozenModel):
    """All that ExpertMesh may use on a node: trunk, KV cache and experts together. A tier of 0 bytes is legal."""

    device: Bytes = 0
    host: Bytes = 0
    disk: Bytes = 0


class Compute(FrozenModel):
    """How long one expert takes for one token from the device and from host memory, in µs, and the disk's rate.

    Attributes
    ----------
    trunk_layer_us
        One layer without its experts for one token.
    call_overhead_us, hop_overhead_us
        What a call to an expert of this node takes in software, and what a token takes that goes on here, beside link
        and compute. A hop is one message, a call is two: where only the call was measured, a hop takes half of it.
    idle_factor
        How many times as long compute takes where it begins after this node idled for some ms: clocks and caches are
        cold. Matters to simulation only.
    unpack_us
        What an expert takes more where the node holds it packed in a low precision.
    prompt_layer_us, prompt_expert_us
        As `trunk_layer_us` and `expert_us`, for one token of a prompt, which is computed in chunks of many; like a
        token of an answer where they were not measured.
    """

    expert_us: Annotated[float, Field(gt=0, le=1e9)] = 50.0
    host_expert_us: Annotated[float, Field(gt=0, le=1e9)] | None = None
    disk_bandwidth: Bandwidth = 500e6
    trunk_layer_us: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    call_overhead_us: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    hop_overhead_us: Annotated[float, Field(ge=0, le=1e9)] | None = None
    idle_factor: Annotated[float, Field(ge=1, le=100)] = 1.0
    unpack_us: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    prompt_layer_us: Annotated[float, Field(ge=0, le=1e9)] | None = None
    prompt_expert_us: Annotated[float, Field(gt=0, le=1e9)] | None = None

    @property
    def host_us(self) -> float:
        """µs per expert and token from host memory; twice the device's where it was not measured."""
        return 2 * self.expert_us if self.host_expert_us is None else self.host_expert_us

    @property
    def hop_us(self) -> float:
        """µs of software of a hop that ends here."""
        return self.call_overhead_us / 2 if self.hop_overhead_us is None else self.hop_overhead_us


class Ingress(FrozenModel):
    """Tokens of `workload` that enter the cluster at a node.

    `tokens_per_s` counts tokens of answers. A prompt of `prompt_tokens` comes before each `answer_tokens` of them, and
    its time is shared out over these; 0: prompts do not count.
    """

    workload: str
    tokens_per_s: Annotated[float, Field(ge=0, le=1e9)]
    prompt_tokens: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    answer_tokens: Annotated[int, Field(ge=1, le=1 << 24)] = 32


class Node(FrozenModel):
    """One machine. Machines of one `domain` fail together (a switch, a fuse, a room); by default each is its own.

    It holds every expert in `precision`; None: the checkpoint's is counted, and its agent may hold what it likes.
    """

    id: NodeId
    address: str = "127.0.0.1"
    memory: Memory
    compute: Compute = Compute()
    ingress: Ingress | None = None
    domain: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    precision: Precision | None = None


class Link(FrozenModel):
    """A link, the same in both directions; `latency` is one way."""

    between: tuple[NodeId, NodeId]
    latency: Seconds
    bandwidth: Bandwidth


class Context(FrozenModel):
    """The KV cache to plan for at every ingress."""

    tokens: Annotated[int, Field(ge=1, le=1 << 24)] = 1024
    sessions: Annotated[int, Field(ge=1, le=1 << 16)] = 1


class Replicas(FrozenModel):
    """Replicas of every expert: at least `minimum`, and enough to survive the loss of any `survive` failure domains."""

    minimum: Annotated[int, Field(ge=1, le=1024)] = 1
    survive: Annotated[int, Field(ge=0, le=1023)] = 0

    @property
    def required(self) -> int:
        """Failure domains (nodes, where none are named) that must hold each expert."""
        return max(self.minimum, self.survive + 1)


class Trunk(FrozenModel):
    """Where attention, router and KV cache run: at the ingress (`stay`), or where the planner decides (`move`)."""

    mode: Literal["stay", "move"] = "stay"


class Quality(FrozenModel):
    """Perplexity increase that substitution of experts and low precision may spend together.

    `calibration` is a file of `agent calibrate` that tells what precisions cost; by default ``calibration.json`` in the
    model's directory. Agents substitute by their own.
    """

    budget: Share = 0.0
    calibration: str | None = None


class Limits(FrozenModel):
    """Highest expected utilisation of a node's compute and of a link's bandwidth that a plan may cause."""

    compute: Share = 1.0
    link: Share = 1.0


class Pin(FrozenModel):
    """Expert `expert` of layer `layer` must be held by `node`, or must not where `ban` is true."""

    layer: Annotated[int, Field(ge=0)]
    expert: Annotated[int, Field(ge=0)]
    node: NodeId
    ban: bool = False


class Coordinator(FrozenModel):
    """Where `planner serve` listens."""

    address: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = DEFAULT_COORDINATOR_PORT

    @property
    def endpoint(self) -> str:
        """HOST:PORT, as commands take it."""
        return f"{self.address}:{self.port}"


class Topology(FrozenModel):
    """Everything `planner solve` needs. Paths are relative to the file."""

    cluster: Annotated[str, Field(min_length=1, max_length=200)]
    model: str
    nodes: Annotated[tuple[Node, ...], Field(min_length=1, max_length=4096)]
    links: tuple[Link, ...] = ()
    workloads: Mapping[str, str] = Field(default_factory=dict)
    dtype: HeldDtype = "checkpoint"
    context: Context = Context()
    replicas: Replicas = Replicas()
    trunk: Trunk = Trunk()
    quality: Quality = Quality()
    limits: Limits = Limits()
    pins: tuple[Pin, ...] = ()
    coordinator: Coordinator = Coordinator()

    def node(self, node_id: str) -> Node:
        """Return the node of that id; KeyError where there is none."""
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise KeyError(node_id)


def load_topology(path: Path) -> Topology:
    """Read and check a topology file; raises `InvalidFile` with every fault."""
    return load_yaml(path, Topology, topology_faults)


def topology_faults(topology: Topology) -> Iterator[Fault]:
    """Yield everything in a well-formed topology that contradicts itself."""
    yield from _duplicate_faults(topology)
    yield from _link_faults(topology)
    yield from _ingress_faults(topology)
    yield from _replica_faults(topology)
    yield from _pin_faults(topology)


def _duplicate_faults(topology: Topology) -> Iterator[Fault]:
    for index in _repeated(node.id for node in topology.nodes):
        yield Fault(f"nodes[{index}].id", f"{topology.nodes[index].id!r} is used twice; ids must differ")
    for index in _repeated(frozenset(link.between) for link in topology.links):
        first, second = topology.links[index].between
        yield Fault(f"links[{index}].between", f"the link {first} – {second} is declared twice; keep one")


def _link_faults(topology: Topology) -> Iterator[Fault]:
    ids = {node.id for node in topology.nodes}
    for index, link in enumerate(topology.links):
        for end in sorted(set(link.between) - ids):
            yield Fault(f"links[{index}].between", f"there is no node {end!r}; nodes are {', '.join(sorted(ids))}")
        if link.between[0] == link.between[1]:
            yield Fault(f"links[{index}].between", f"links {link.between[0]!r} to itself; remove it")
    reached = reachable(topology, topology.nodes[0].id)
    if cut_off := sorted(ids - reached):
        yield Fault(
            "links",
            f"no path between {', '.join(sorted(reached))} and {', '.join(cut_off)}; declare a link between them",
        )


def reachable(topology: Topology, start: str) -> set[str]:
    """Return the ids of all nodes with a path of links from `start`, itself included."""
    neighbours: dict[str, set[str]] = {node.id: set() for node in topology.nodes}
    for link in topology.links:
        if set(link.between) <= neighbours.keys():
            first, second = link.between
            neighbours[first].add(second)
            neighbours[second].add(first)
    seen, frontier = {start}, [start]
    while frontier:
        fresh = neighbours[frontier.pop()] - seen
        seen |= fresh
        frontier.extend(fresh)
    return seen


def _ingress_faults(topology: Topology) -> Iterator[Fault]:
    if not any(node.ingress for node in topology.nodes):
        yield Fault("nodes", "no node has an ingress, so no tokens enter; give at least one node an ingress")
    for index, node in enumerate(topology.nodes):
        if node.ingress and node.ingress.workload not in topology.workloads:
            known = ", ".join(sorted(topology.workloads)) or "none"
            yield Fault(
                f"nodes[{index}].ingress.workload",
                f"workload {node.ingress.workload!r} has no trace; workloads with one: {known}",
            )
        if node.ingress and node.ingress.prompt_tokens:
            together = node.ingress.prompt_tokens + node.ingress.answer_tokens
            if together > topology.context.tokens:
                yield Fault(
                    f"nodes[{index}].ingress",
                    f"prompt_tokens and answer_tokens together are {together}, above context.tokens "
                    f"{topology.context.tokens}; raise that, or lower them",
                )


def _replica_faults(topology: Topology) -> Iterator[Fault]:
    required, count = topology.replicas.required, len(topology.nodes)
    domains = len({node.domain or f"node {node.id}" for node in topology.nodes})
    if required > count:
        yield Fault("replicas", f"asks for {required} nodes per expert, but there are {count} nodes; lower it")
    elif required > domains:
        yield Fault(
            "replicas",
            f"asks for {required} failure domains per expert, but nodes[].domain leaves {domains}; lower it or name "
            "more domains",
        )


def _pin_faults(topology: Topology) -> Iterator[Fault]:
    ids = {node.id for node in topology.nodes}
    seen: dict[tuple[int, int, str], bool] = {}
    bans: Counter[tuple[int, int]] = Counter()
    for index, pin in enumerate(topology.pins):
        key = (pin.layer, pin.expert, pin.node)
        if pin.node not in ids:
            yield Fault(f"pins[{index}].node", f"there is no node {pin.node!r}; nodes are {', '.join(sorted(ids))}")
        if seen.setdefault(key, pin.ban) != pin.ban:
            yield Fault(
                f"pins[{index}]",
                f"layer {pin.layer} expert {pin.expert} is both pinned to and banned from {pin.node}; keep one",
            )
        elif pin.ban:
            bans[pin.layer, pin.expert] += 1
    for (layer, expert), count in sorted(bans.items()):
        left = len(ids) - count
        if left < topology.replicas.required:
            yield Fault(
                "pins",
                f"layer {layer} expert {expert} is banned from {count} of {len(ids)} nodes, which leaves {left} for "
                f"{topology.replicas.required} replicas; lift a ban",
            )


def _repeated(keys: Iterable[object]) -> Iterator[int]:
    """Yield the index of every key that was seen before."""
    seen: set[object] = set()
    for index, key in enumerate(keys):
        if key in seen:
            yield index
        seen.add(key)
