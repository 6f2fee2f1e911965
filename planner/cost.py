"""Seconds that calling an expert elsewhere adds to a token, and the links such a call crosses.

Decides the path between any two nodes and the cost ``c[n, p]`` of FORMULATION's table, from declared links and
measured compute and software. Must not know demand nor placements.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from schemas.model import ModelSpec
from schemas.topology import TIERS, Link, Topology

_HOP_S: Final = 1e-12  # among paths of equal latency, the one with fewer links

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Paths:
    """The path between every two nodes.

    Attributes
    ----------
    latency_s
        One way, along the path; 0 to oneself. float64 ``[N, N]``.
    bandwidth
        Of the narrowest link of the path, bytes/s; infinite to oneself. float64 ``[N, N]``.
    link_ends
        The nodes of each link, int64 ``[U, 2]``.
    hop_caller, hop_holder, hop_link
        One row for each link of each path between two different nodes. int64 ``[H]``.
    """

    latency_s: Floats
    bandwidth: Floats
    link_ends: Ints
    hop_caller: Ints
    hop_holder: Ints
    hop_link: Ints


def find_paths(topology: Topology) -> Paths:
    """Find the path of every pair: its declared link, else the declared path of least latency."""
    index = {node.id: position for position, node in enumerate(topology.nodes)}
    ends = np.array([[index[end] for end in link.between] for link in topology.links], dtype=np.int64).reshape(-1, 2)
    size = len(index)
    link_of = np.full((size, size), len(topology.links), dtype=np.int64)  # the last index means: no link
    for number, (first, second) in enumerate(ends):
        link_of[first, second] = link_of[second, first] = number
    following = _next_nodes(topology.links, link_of)
    hops = [
        (caller, holder, link)
        for caller in range(size)
        for holder in range(size)
        if caller != holder
        for link in _links_between(caller, holder, following, link_of, len(topology.links))
    ]
    caller, holder, link = np.array(hops, dtype=np.int64).reshape(-1, 3).T
    latency, bandwidth = np.zeros((size, size)), np.full((size, size), np.inf)
    np.add.at(latency, (caller, holder), np.array([item.latency for item in topology.links])[link])
    np.minimum.at(bandwidth, (caller, holder), np.array([item.bandwidth for item in topology.links])[link])
    return Paths(latency, bandwidth, ends, caller, holder, link)


def _next_nodes(links: tuple[Link, ...], link_of: Ints) -> Ints:
    """Next node on the way from one node to another, int64 ``[N, N]`` (Floyd-Warshall)."""
    size = len(link_of)
    latencies = np.array([link.latency for link in links] + [np.inf])
    distance = latencies[link_of] + _HOP_S
    np.fill_diagonal(distance, 0.0)
    following = np.tile(np.arange(size), (size, 1))
    for middle in range(size):
        through = distance[:, [middle]] + distance[[middle], :]
        better = through < distance
        distance = np.where(better, through, distance)
        following = np.where(better, following[:, [middle]], following)
    return following


def _links_between(caller: int, holder: int, following: Ints, link_of: Ints, num_links: int) -> list[int]:
    direct = int(link_of[caller, holder])
    if direct < num_links:
        return [direct]
    links, here = [], caller
    while here != holder:
        onward = int(following[here, holder])
        links.append(int(link_of[here, onward]))
        here = onward
    return links


def service_seconds(topology: Topology, model: ModelSpec) -> Floats:
    """Seconds a node needs for one evaluation of an expert it keeps in each tier, float64 ``[N, 3]``."""
    rows = []
    for node in topology.nodes:
        compute = node.compute
        unpack = compute.unpack_us * 1e-6 * (node.precision not in {None, "checkpoint"})
        device, host = compute.expert_us * 1e-6 + unpack, compute.host_us * 1e-6 + unpack
        rows.append((device, host, host + model.expert_bytes / compute.disk_bandwidth))
    return np.array(rows).reshape(-1, len(TIERS))


def call_bytes(model: ModelSpec) -> int:
    """Bytes of one expert call: the hidden state there and the result back."""
    return 2 * model.hidden_size * model.itemsize


def call_seconds(topology: Topology, model: ModelSpec, paths: Paths) -> Floats:
    """Seconds that a call of an expert adds to a token, float64 ``[N, N, 3]`` by caller, holder and holder's tier.

    Own device 0; own slower tier what it takes longer than the device; elsewhere the round trip, the bytes over the
    narrowest link, software, and the evaluation there.
    """
    service = service_seconds(topology, model)
    network = call_fixed_seconds(topology, paths) + call_bytes(model) / paths.bandwidth
    cost = network[:, :, None] + service[None, :, :]
    own = np.arange(len(topology.nodes))
    cost[own, own] = np.maximum(service - service[:, :1], 0.0)
    return cost


def call_fixed_seconds(topology: Topology, paths: Paths) -> Floats:
    """Seconds of a call of no bytes: round trip and software, float64 ``[N, N]``; 0 to oneself."""
    return _elsewhere(2 * paths.latency_s + call_software_seconds(topology)[None, :])


def hop_fixed_seconds(topology: Topology, paths: Paths) -> Floats:
    """Seconds of a hop of no bytes: one way and software, float64 ``[N, N]``; 0 to oneself."""
    return _elsewhere(paths.latency_s + hop_software_seconds(topology)[None, :])


def _elsewhere(seconds: Floats) -> Floats:
    return np.where(np.eye(len(seconds), dtype=bool), 0.0, seconds)


def call_software_seconds(topology: Topology) -> Floats:
    """Seconds of software of a call, by the node that is called, float64 ``[N]``."""
    return np.array([node.compute.call_overhead_us for node in topology.nodes]) * 1e-6


def hop_software_seconds(topology: Topology) -> Floats:
    """Seconds of software of a hop, by the node where it ends, float64 ``[N]``."""
    return np.array([node.compute.hop_us for node in topology.nodes]) * 1e-6


def hop_bytes(model: ModelSpec) -> int:
    """Bytes of one hidden state, which hops where the trunk goes on at another node."""
    return model.hidden_size * model.itemsize


def hop_seconds(topology: Topology, model: ModelSpec, paths: Paths) -> Floats:
    """Seconds until a token goes on at another node, float64 ``[N, N]``; 0 to oneself."""
    return np.asarray(hop_fixed_seconds(topology, paths) + hop_bytes(model) / paths.bandwidth)


def trunk_seconds(topology: Topology) -> Floats:
    """Seconds that a node computes one decoder layer of a token without its experts, float64 ``[N]``."""
    return np.array([node.compute.trunk_layer_us * 1e-6 for node in topology.nodes])


def chosen_seconds(topology: Topology, model: ModelSpec) -> Floats:
    """Seconds that a node computes the chosen experts of one layer of a token from its device, float64 ``[N]``."""
    return model.top_k * service_seconds(topology, model)[:, 0]
