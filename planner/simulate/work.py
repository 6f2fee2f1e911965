"""The parts that a simulated token or chunk is made of: computing at a node, calling others, hopping on.

Decides how each follows from links and the software of a node. Must not know time, nor what is routed where.
"""

from typing import Final, NamedTuple

from planner.simulate.network import Network, Path, Paths, empty_seconds

TOKEN_BYTES: Final = 8  # what the ring's last hop carries: the sampled token's number


class Call(NamedTuple):
    """One call of a layer: to whom, how long it computes there, which links it takes.

    Attributes
    ----------
    network_s
        Both ways, with free links.
    overhead_s
        Software; part of the time until the holder may compute.
    """

    holder: int
    service_s: float
    out: Path
    back: Path
    network_s: float
    overhead_s: float


class Work(NamedTuple):
    """What one event asks: trunk and local experts at `node`, then calls to others."""

    node: int
    trunk_s: float
    local_s: float
    calls: tuple[Call, ...]


class Hop(NamedTuple):
    """The hidden state goes on to the node that runs the next layer's trunk, the sampled token to that of the first.

    `overhead_s` is software at the node where it arrives.
    """

    path: Path
    network_s: float
    overhead_s: float
    bytes: float


def call_of(holder: int, service_s: float, out: Path, back: Path, network: Network) -> Call:
    """Return a call over these paths."""
    seconds = empty_seconds(out) + empty_seconds(back)
    return Call(holder, service_s, out, back, seconds, float(network.call_s[holder]))


def hop_of(paths: Paths, network: Network, here: int, there: int, size: float) -> Hop:
    """Return a hop of `size` bytes."""
    path = paths.one_way(here, there, size)
    return Hop(path, empty_seconds(path), float(network.hop_s[there]), size)
