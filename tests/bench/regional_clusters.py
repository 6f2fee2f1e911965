"""Clusters of hundreds of nodes in regions, generated from a seed: topology, model and problem without any file.

Regions have 10 … 25 nodes, 1 … 2 ms apart on 10 Gbit/s; one gateway each, 10 … 40 ms apart on 1 Gbit/s, by their
distance on a map. The workloads of a region resemble each other: 60 % of a node's routing follows its region's Zipf
shares, 20 % those that all have in common, 20 % its own. Memory is uneven and adds up to `fill` times all experts.
"""

from itertools import combinations

import numpy as np

from planner.problem import Problem, build_problem
from schemas.model import ModelSpec
from schemas.topology import Compute, Ingress, Link, Memory, Node, Topology
from tests.small_clusters import draw_events, popularity

EVENTS = 32  # recorded tokens of each node; the shares are known exactly


def make_model(layers: int = 26, experts: int = 64, top_k: int = 6) -> ModelSpec:
    """DeepSeek-V2-Lite's sizes in bfloat16."""
    return ModelSpec(
        id="regional",
        layers=layers,
        experts=experts,
        top_k=top_k,
        hidden_size=2048,
        itemsize=2,
        expert_bytes=3 * 2048 * 1408 * 2,
    )


def region_of_nodes(nodes: int, rng: np.random.Generator) -> np.ndarray:
    """Region of each node, [N]: sizes of 10 … 25, at least two regions."""
    sizes: list[int] = []
    while (left := nodes - sum(sizes)) > 25:
        sizes.append(int(rng.integers(10, min(25, left - 10) + 1)))
    return np.repeat(np.arange(len(sizes) + 1), [*sizes, left]) if sizes else np.arange(nodes) * 2 // nodes


def make_topology(nodes: int, model: ModelSpec, *, fill: float, seed: int = 0, tokens_per_s: float = 2.0) -> Topology:
    rng = np.random.default_rng(seed)
    region = region_of_nodes(nodes, rng)
    names = [f"n{node:03d}" for node in rng.permutation(nodes)]  # names say nothing about regions
    share = rng.lognormal(0.0, 0.5, nodes)
    slots = np.ceil(share / share.sum() * fill * model.layers * model.experts).astype(int)
    machines = tuple(
        Node(
            id=name,
            memory=Memory(device=int(room) * model.expert_bytes),
            compute=Compute(expert_us=float(rng.uniform(40, 120))),
            ingress=Ingress(workload=name, tokens_per_s=tokens_per_s * float(rng.uniform(0.5, 2.0))),
        )
        for name, room in zip(names, slots, strict=True)
    )
    return Topology(
        cluster="regional",
        model="model.yaml",
        nodes=machines,
        links=tuple(_links(names, region, rng)),
        workloads={name: f"{name}.safetensors" for name in names},
    )


def _links(names: list[str], region: np.ndarray, rng: np.random.Generator) -> list[Link]:
    def link(first: int, second: int, latency_ms: float, bandwidth: str) -> Link:
        return Link(between=(names[first], names[second]), latency=f"{latency_ms:.3f} ms", bandwidth=bandwidth)

    links = []
    for one in range(region.max() + 1):
        inside = np.flatnonzero(region == one).tolist()
        links += [link(a, b, rng.uniform(1, 2), "10 Gbit/s") for a, b in combinations(inside, 2)]
    gateway = np.searchsorted(region, np.arange(region.max() + 1)).tolist()
    at = rng.uniform(0, 1, (len(gateway), 2))
    for a, b in combinations(range(len(gateway)), 2):
        far = float(np.linalg.norm(at[a] - at[b])) / 2**0.5
        links.append(link(gateway[a], gateway[b], 10 + 30 * far, "1 Gbit/s"))
    return links


def make_problem(nodes: int, *, layers: int = 26, experts: int = 64, fill: float, seed: int = 0) -> Problem:
    """The whole chain: topology, shares of every node's workload, problem."""
    model = make_model(layers, experts)
    topology = make_topology(nodes, model, fill=fill, seed=seed)
    rng = np.random.default_rng([seed, 1])
    region = region_of_nodes(nodes, np.random.default_rng(seed))
    common = popularity(rng, layers, experts)
    favourites = [popularity(rng, layers, experts) for _ in range(region.max() + 1)]
    popular = [0.2 * common + 0.6 * favourites[one] + 0.2 * popularity(rng, layers, experts) for one in region]
    events = [draw_events(rng, share, EVENTS, model.top_k) for share in popular]
    return build_problem(topology, model, events, [_inclusion(share, model.top_k) for share in popular])


def _inclusion(popular: np.ndarray, top_k: int) -> np.ndarray:
    """Share of tokens that activate each expert, [L, E]: Σ = K, none above 1; 1 − exp(−t p) with t to fit."""
    low, high = np.zeros(len(popular)), np.full(len(popular), 1e4)
    for _ in range(60):
        middle = (low + high) / 2
        enough = (1 - np.exp(-middle[:, None] * popular)).sum(axis=1) > top_k
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return 1 - np.exp(-high[:, None] * popular)
