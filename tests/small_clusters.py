"""Small clusters with skewed routing, drawn from a seed: topology, model and problem without any file."""

from collections.abc import Sequence

import numpy as np

from planner.problem import Events, Problem, build_problem
from schemas.model import ModelSpec
from schemas.topology import Compute, Ingress, Limits, Link, Memory, Node, Pin, Replicas, Topology

MIB = 1 << 20


def draw_events(rng: np.random.Generator, popularity: np.ndarray, tokens: int, top_k: int) -> Events:
    """Chosen experts [T, L, K] without repetition, by popularity [L, E] (Gumbel top-k)."""
    noise = rng.gumbel(size=(tokens, *popularity.shape))
    return np.argsort(-(np.log(popularity)[None] + noise), axis=2)[:, :, :top_k].astype(np.int16)


def popularity(rng: np.random.Generator, layers: int, experts: int, zipf: float = 1.0) -> np.ndarray:
    """Zipf shares in an order of their own per layer, [L, E]."""
    shape = 1 / np.arange(1, experts + 1) ** zipf
    return rng.permuted(np.tile(shape / shape.sum(), (layers, 1)), axis=1)


def make_topology(
    slots: Sequence[int | tuple[int, int, int]],
    rates: Sequence[float],
    *,
    latency: float = 5e-3,
    bandwidth: float = 62.5e6,
    links: Sequence[tuple[int, int]] | None = None,
    pins: tuple[Pin, ...] = (),
    required: int = 1,
    compute: Compute | None = None,
) -> Topology:
    """One node per entry of `slots` (experts of 1 MiB on the device, or by tier); a rate of 0 means no ingress."""
    names = [f"n{index}" for index in range(len(slots))]
    nodes = []
    for name, room, rate in zip(names, slots, rates, strict=True):
        device, host, disk = (room, 0, 0) if isinstance(room, int) else room
        memory = Memory(device=device * MIB, host=host * MIB, disk=disk * MIB)
        ingress = Ingress(workload=name, tokens_per_s=rate) if rate else None
        nodes.append(Node(id=name, memory=memory, compute=compute or Compute(), ingress=ingress))
    pairs = links if links is not None else [(a, b) for a in range(len(slots)) for b in range(a + 1, len(slots))]
    return Topology(
        cluster="small",
        model="model.yaml",
        nodes=tuple(nodes),
        links=tuple(
            Link(between=(names[a], names[b]), latency=f"{latency!r} s", bandwidth=f"{bandwidth!r} B/s")
            for a, b in pairs
        ),
        workloads={name: f"{name}.safetensors" for name in names},
        replicas=Replicas(minimum=required),
        limits=Limits(),
        pins=pins,
    )


def make_model(layers: int = 3, experts: int = 8, top_k: int = 2) -> ModelSpec:
    """Experts of 1 MiB, hidden states of 4 KiB, no trunk."""
    return ModelSpec(
        id="small", layers=layers, experts=experts, top_k=top_k, hidden_size=1024, itemsize=4, expert_bytes=MIB
    )


def make_problem(
    topology: Topology, model: ModelSpec, *, seed: int = 0, tokens: int = 200, zipf: float = 1.0
) -> Problem:
    """Each ingress with a popularity of its own."""
    rng = np.random.default_rng(seed)
    entering = sum(node.ingress is not None for node in topology.nodes)
    shares = [popularity(rng, model.layers, model.experts, zipf) for _ in range(entering)]
    return build_problem(topology, model, [draw_events(rng, share, tokens, model.top_k) for share in shares])


def own_favourites(problem: Problem) -> np.ndarray:
    """A plain feasible placement [P, L, E]: every expert once, dealt out; then each node's own favourites."""
    count = problem.layers * problem.experts
    placed = np.zeros((problem.num_places, count), dtype=bool)
    free = problem.slots.copy()
    for expert in range(count):
        place = int(free.argmax())
        placed[place, expert] = True
        free[place] -= 1
    for place, node in enumerate(problem.place_node.tolist()):
        held = problem.held(placed.reshape(-1, problem.layers, problem.experts))[node].ravel()
        wanted = [e for e in np.argsort(-problem.caller_demand[node].ravel(), kind="stable") if not held[e]]
        placed[place, wanted[: max(int(free[place]), 0)]] = True
    return placed.reshape(-1, problem.layers, problem.experts)
