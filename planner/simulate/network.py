"""What a simulation knows of the cluster beyond the problem: true link rates, trunk time, software of messages.

Decides which directed links a message crosses and how long it takes when nothing is in its way. A path is cut
through: its head moves on while its tail still leaves, so that an empty path of several links takes its latencies
plus the bytes over its narrowest link, as the planner's cost says. Must not know placements nor tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.cost import call_software_seconds, hop_software_seconds, trunk_seconds
from planner.problem import Floats, Ints, Problem
from schemas.topology import Topology

Leg = tuple[int, float, float]  # directed link, seconds that the bytes occupy it, latency
Path = tuple[Leg, ...]


@dataclass(frozen=True, eq=False)
class Network:
    """Links, and the times of a node that no placement changes.

    Attributes
    ----------
    link_latency_s, link_bandwidth
        One way, seconds; bytes/s in each direction. float64 ``[U]``.
    trunk_s
        One layer without its experts for one token, float64 ``[N]``.
    call_s, hop_s
        Software time of a call and of a hop, by the node that is called or where the hop ends, float64 ``[N]``. It
        delays and occupies nothing.
    idle_factor
        How many times as long compute takes at a node that idled before, float64 ``[N]``.
    """

    link_latency_s: Floats
    link_bandwidth: Floats
    trunk_s: Floats
    call_s: Floats
    hop_s: Floats
    idle_factor: Floats


def build_network(topology: Topology) -> Network:
    """Read links and node times from a topology."""
    return Network(
        link_latency_s=np.array([link.latency for link in topology.links], dtype=np.float64),
        link_bandwidth=np.array([link.bandwidth for link in topology.links], dtype=np.float64),
        trunk_s=trunk_seconds(topology),
        call_s=call_software_seconds(topology),
        hop_s=hop_software_seconds(topology),
        idle_factor=np.array([node.compute.idle_factor for node in topology.nodes]),
    )


@dataclass(frozen=True, eq=False)
class Paths:
    """Directed links between any two nodes: link u from its first to its second end is 2u, the other way 2u + 1."""

    problem: Problem
    network: Network

    @cached_property
    def _links(self) -> dict[tuple[int, int], list[int]]:
        """Directed links from one node to another, in order."""
        found: dict[tuple[int, int], list[int]] = {}
        here: dict[tuple[int, int], int] = {}
        problem = self.problem
        for caller, holder, link in zip(
            problem.hop_caller.tolist(), problem.hop_holder.tolist(), problem.hop_link.tolist(), strict=True
        ):
            pair = caller, holder
            node = here.get(pair, caller)
            first, second = problem.link_ends[link].tolist()
            found.setdefault(pair, []).append(2 * link + (node != first))
            here[pair] = second if node == first else first
        return found

    def one_way(self, start: int, end: int, size: float) -> Path:
        """Return the legs of a message of `size` bytes."""
        return self._legs(self._links[start, end], size)

    def reply(self, caller: int, holder: int, size: float) -> Path:
        """Return the legs of an answer, which takes the call's way back."""
        return self._legs([link ^ 1 for link in reversed(self._links[caller, holder])], size)

    def _legs(self, links: list[int], size: float) -> Path:
        network = self.network
        return tuple(
            (link, size / float(network.link_bandwidth[link // 2]), float(network.link_latency_s[link // 2]))
            for link in links
        )


def empty_seconds(path: Path) -> float:
    """Seconds from the head's start to the tail's arrival when all links are free."""
    return sum(latency for _, _, latency in path) + max((occupied for _, occupied, _ in path), default=0.0)


def directed_ends(problem: Problem) -> Ints:
    """From and to node of each directed link, int64 ``[2U, 2]``."""
    ends = problem.link_ends
    return np.stack([ends, ends[:, ::-1]], axis=1).reshape(-1, 2)
