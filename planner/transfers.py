"""When each new replica is brought from where: transfers scheduled over links, and how long all of them take.

Decides sources and order. List scheduling: of all transfers that could begin, the one that ends first begins next;
replicas that few nodes hold go before others, and a replica that has arrived is a source for the rest. Several
sources send to one node at once where links allow. Pure: must not know plans or sockets. K counts experts flat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.problem import Bools, Floats, Ints, Problem
from planner.simulate.network import Network, Paths


@dataclass(frozen=True)
class Transfer:
    """One record on its way: expert (flat), node that sends, node that receives, seconds from the start."""

    expert: int
    source: int
    target: int
    start_s: float
    finish_s: float


@dataclass(frozen=True, eq=False)
class Schedule:
    """Transfers in order of their start.

    Attributes
    ----------
    bound_s
        No schedule is shorter: the fullest node's bytes over all links that lead to it.
    busy_s
        Seconds that each directed link is in use, float64 ``[2U]``.
    unsourced
        (expert, node) that no node holds or stores.
    """

    transfers: tuple[Transfer, ...]
    makespan_s: float
    bound_s: float
    busy_s: Floats
    unsourced: tuple[tuple[int, int], ...]

    @property
    def total_s(self) -> float:
        """Seconds of all transfers together: what moving costs, as replanning counts it."""
        return sum(transfer.finish_s - transfer.start_s for transfer in self.transfers)


@dataclass(frozen=True, eq=False)
class Roads:
    """What transfers may use.

    Attributes
    ----------
    pair_rate
        Bytes/s from one node to another, float64 ``[N, N]``; 0 where there is no way.
    pair_latency_s
        float64 ``[N, N]``.
    links
        Directed links on the way, int64 ``[N, N, H]``, filled up with `num_links`.
    node_rate
        Bytes/s that a node sends, and receives, over all links together, float64 ``[N]``.
    link_rate
        float64 ``[2U]``.
    link_target
        Node at the end of each directed link, int64 ``[2U]``.
    """

    pair_rate: Floats
    pair_latency_s: Floats
    links: Ints
    node_rate: Floats
    link_rate: Floats
    link_target: Ints

    @property
    def num_links(self) -> int:
        """Directed links, 2U."""
        return len(self.link_rate)


def build_roads(problem: Problem, network: Network, node_rate: Floats | None = None) -> Roads:
    """Find rates and links of every pair; nodes send and receive as fast as their links where no rate is given."""
    paths, nodes = Paths(problem, network), problem.num_nodes
    ways = {
        (start, end): paths.one_way(start, end, 1.0)
        for start, end in set(zip(problem.hop_caller.tolist(), problem.hop_holder.tolist(), strict=True))
    }
    links = np.full((nodes, nodes, max((len(way) for way in ways.values()), default=1)), 2 * len(problem.link_ends))
    rate, latency = np.zeros((nodes, nodes)), np.zeros((nodes, nodes))
    limit = np.full(nodes, np.inf) if node_rate is None else node_rate
    for (start, end), way in ways.items():
        links[start, end, : len(way)] = [link for link, _, _ in way]
        narrowest = 1.0 / max(seconds for _, seconds, _ in way)
        rate[start, end] = min(narrowest, limit[start], limit[end])
        latency[start, end] = sum(seconds for _, _, seconds in way)
    target = np.stack([problem.link_ends[:, 1], problem.link_ends[:, 0]], axis=1).ravel()
    return Roads(rate, latency, links, limit, np.repeat(network.link_bandwidth, 2), target)


def schedule_transfers(
    wanted: Sequence[tuple[int, int]],
    held: Bools,
    roads: Roads,
    record_bytes: float | Ints,
    stores: Sequence[int] = (),
) -> Schedule:
    """Schedule records to the nodes that want them.

    Parameters
    ----------
    wanted
        (expert, node), each once.
    held
        Who holds what before, bool ``[N, K]``.
    record_bytes
        Of each node's experts, ``[N]`` where these differ: then only nodes with as many bytes, and stores, send them.
    stores
        Nodes that can send any expert.
    """
    sizes = np.broadcast_to(np.asarray(record_bytes, dtype=np.float64), (len(held),))
    sends = sizes[:, None] == sizes[None, :]
    sends[list(stores)] = True
    since = np.where(held, 0.0, np.inf)  # from when a node can send an expert
    since[list(stores)] = 0.0
    lacking = np.zeros(held.shape, dtype=bool)
    for expert, node in wanted:
        lacking[node, expert] = True
    unsourced = lacking & ~(sends.T @ np.isfinite(since))
    lacking &= ~unsourced & ~np.isfinite(since)  # a node with a store has it already
    board = _Board(roads, sizes, sends)
    bound = _bound(lacking, roads, sizes)
    transfers = []
    while lacking.any():
        expert, source, target, start, finish = board.next(lacking, since)
        board.take(source, target, start)
        lacking[target, expert] = False
        since[target, expert] = finish
        transfers.append(Transfer(expert, source, target, start, finish))
    transfers.sort(key=lambda one: (one.start_s, one.target, one.expert))
    return Schedule(
        transfers=tuple(transfers),
        makespan_s=max((one.finish_s for one in transfers), default=0.0),
        bound_s=bound,
        busy_s=board.busy_s,
        unsourced=tuple((int(expert), int(node)) for node, expert in np.argwhere(unsourced)),
    )


def _bound(lacking: Bools, roads: Roads, sizes: Floats) -> float:
    arriving = np.bincount(roads.link_target, weights=roads.link_rate, minlength=len(lacking))
    rate = np.minimum(arriving, roads.node_rate)
    asked = lacking.sum(axis=1) * sizes
    return float((asked[asked > 0] / rate[asked > 0]).max(initial=0.0))


class _Board:
    """When links and nodes are free."""

    def __init__(self, roads: Roads, sizes: Floats, sends: Bools) -> None:
        self.roads = roads
        self.sizes = sizes
        with np.errstate(divide="ignore"):
            self.pair_s = np.where(sends, sizes[None, :] / roads.pair_rate, np.inf)  # infinite where there is no way
        nodes = len(roads.node_rate)
        self.link_free = np.zeros(roads.num_links + 1)  # the last stands for no link and stays 0
        self.sends_free, self.receives_free = np.zeros(nodes), np.zeros(nodes)
        self.busy_s = np.zeros(roads.num_links)

    def next(self, lacking: Bools, since: Floats) -> tuple[int, int, int, float, float]:
        """Return the transfer that can end first: expert, source, target, start, finish. Does not modify the board."""
        start = self.link_free[self.roads.links].max(axis=2)
        start = np.maximum(start, np.maximum(self.sends_free[:, None], self.receives_free[None, :]))
        open_to = np.isfinite(self.pair_s) & (lacking.sum(axis=1) > 0)[None, :]
        finish = np.where(open_to, start + self.pair_s + self.roads.pair_latency_s, np.inf)
        holders = np.isfinite(since).sum(axis=0)
        best: tuple[float, int, int, int, float] | None = None
        for pair in np.argsort(finish, axis=None, kind="stable").tolist():
            source, target = divmod(pair, len(finish))
            if not np.isfinite(finish[source, target]) or (best is not None and finish[source, target] >= best[0]):
                break
            experts = np.flatnonzero(lacking[target] & np.isfinite(since[source]))
            if not experts.size:
                continue
            begin = np.maximum(since[source, experts], start[source, target])
            chosen = int(np.lexsort((holders[experts], begin))[0])
            end = float(begin[chosen] + finish[source, target] - start[source, target])
            if best is None or end < best[0]:
                best = end, int(experts[chosen]), source, target, float(begin[chosen])
        if best is None:
            raise AssertionError("links connect all nodes, so whoever holds a record can send it")
        end, expert, source, target, begun = best
        return expert, source, target, begun, end

    def take(self, source: int, target: int, start: float) -> None:
        """Occupy links and nodes. Modifies the board."""
        seconds = float(self.pair_s[source, target])
        links = self.roads.links[source, target]
        links = links[links < self.roads.num_links]
        self.link_free[links] = start + seconds
        self.busy_s[links] += seconds
        self.sends_free[source] = start + self.sizes[target] / self.roads.node_rate[source]
        self.receives_free[target] = start + self.sizes[target] / self.roads.node_rate[target]
