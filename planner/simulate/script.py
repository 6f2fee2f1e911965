"""What each recorded (token, layer) event asks of the cluster under a placement, before any clock runs.

Decides which of an event's experts run where the trunk is and which holders get a call: one call per holder and
layer, with all of its experts. Events that ask the same share one `Work`, so that the clock's loop looks up rather
than computes. Must not know time.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.objective import Routing
from planner.problem import Events, Floats, Ints, Problem
from planner.simulate.network import Network, Paths
from planner.simulate.prefill import Chunk, prompt_chunks
from planner.simulate.work import TOKEN_BYTES, Hop, Work, call_of, hop_of


@dataclass(frozen=True, eq=False)
class Script:
    """All events of all ingresses as `works`.

    Attributes
    ----------
    works
        Distinct kinds of event.
    work_of
        Kind of each event, int64 ``[T, L]`` by ingress.
    hops
        By ingress and layer: the hop after it (after the last layer: back to the first); None where the trunk stays.
    chunks
        By ingress: those of the prompt that comes before an answer.
    idle_factor
        How many times as long compute takes at a node that idled before, float64 ``[N]``.
    num_nodes, num_links
        N and directed links 2U.
    """

    works: list[Work]
    work_of: tuple[Ints, ...]
    hops: tuple[tuple[Hop | None, ...], ...]
    chunks: tuple[tuple[Chunk, ...], ...]
    idle_factor: Floats
    num_nodes: int
    num_links: int
    message_bytes: float

    @cached_property
    def compute_s(self) -> Floats:
        """Seconds of compute that each kind of event costs each node, float64 ``[W, N]``."""
        table = np.zeros((len(self.works), self.num_nodes))
        for row, work in zip(table, self.works, strict=True):
            row[work.node] += work.trunk_s + work.local_s
            for call in work.calls:
                row[call.holder] += call.service_s
        return table

    @cached_property
    def messages(self) -> Ints:
        """Messages that each kind of event puts on each directed link, int64 ``[W, 2U]``."""
        table = np.zeros((len(self.works), self.num_links), dtype=np.int64)
        for row, work in zip(table, self.works, strict=True):
            for call in work.calls:
                for link, _, _ in (*call.out, *call.back):
                    row[link] += 1
        return table


def build_script(
    problem: Problem, routing: Routing, network: Network, events: tuple[Events, ...], seed: int = 0
) -> Script:
    """Turn recorded events into work.

    Parameters
    ----------
    events
        Chosen experts ``[T, L, K]`` by ingress.
    seed
        Draws the holder of each call where the routing splits them by shares.
    """
    rng = np.random.default_rng(seed)
    chosen = [
        _asked(problem, routing, trunk, seen, rng) for trunk, seen in zip(problem.trunk_node, events, strict=True)
    ]
    kinds, flat = np.unique(np.concatenate(chosen), axis=0, return_inverse=True)
    cuts = np.cumsum([len(rows) for rows in chosen])[:-1]
    work_of = tuple(part.reshape(-1, problem.layers) for part in np.split(flat.ravel(), cuts))
    return Script(
        works=_works(problem, network, kinds),
        work_of=work_of,
        hops=tuple(_hops(problem, network, trunk) for trunk in problem.trunk_node),
        chunks=prompt_chunks(problem, routing, network),
        idle_factor=network.idle_factor,
        num_nodes=problem.num_nodes,
        num_links=2 * len(problem.link_ends),
        message_bytes=problem.call_bytes / 2,
    )


def _asked(problem: Problem, routing: Routing, trunk: Ints, events: Events, rng: np.random.Generator) -> Events:
    """Trunk node, decoder layers it runs, experts asked of each place by every event, int16 ``[T * L, 2 + P]``."""
    layers = np.arange(problem.layers)[None, :, None]
    if routing.share is None:
        place = routing.holder[trunk[None, :, None], layers, events]
    else:
        share = np.moveaxis(routing.share, 1, -1)[trunk[None, :, None], layers, events]  # [T, L, K, P]
        drawn = rng.random(events.shape)[..., None] * share.sum(axis=-1, keepdims=True)
        place = (drawn >= share.cumsum(axis=-1)).sum(axis=-1).clip(max=problem.num_places - 1)
    count = events.shape[0] * events.shape[1]
    asked = np.zeros((count, 2 + problem.num_places), dtype=np.int16)
    asked[:, 0] = np.tile(trunk, events.shape[0])
    asked[:, 1] = np.tile(np.diff(problem.room.decoder_first), events.shape[0])
    np.add.at(asked, (np.arange(count)[:, None], 2 + place.reshape(count, -1)), np.int16(1))
    return asked


def _works(problem: Problem, network: Network, kinds: Events) -> list[Work]:
    paths = Paths(problem, network)
    size = problem.call_bytes / 2
    ways = {
        pair: (paths.one_way(*pair, size), paths.reply(*pair, size))
        for pair in set(zip(problem.hop_caller.tolist(), problem.hop_holder.tolist(), strict=True))
    }
    works = []
    for kind in kinds.tolist():
        node, decoders, *counts = kind
        service: dict[int, float] = {}
        for place, count in enumerate(counts):
            if count:
                holder = int(problem.place_node[place])
                service[holder] = service.get(holder, 0.0) + count * float(problem.service_s[place])
        local = service.pop(node, 0.0)
        calls = tuple(call_of(holder, seconds, *ways[node, holder], network) for holder, seconds in service.items())
        works.append(Work(node, decoders * float(network.trunk_s[node]), local, calls))
    return works


def _hops(problem: Problem, network: Network, trunk: Ints) -> tuple[Hop | None, ...]:
    paths, last = Paths(problem, network), len(trunk) - 1
    hops: list[Hop | None] = []
    for layer, (here, there) in enumerate(zip(trunk.tolist(), np.roll(trunk, -1).tolist(), strict=True)):
        if here == there:
            hops.append(None)
            continue
        hops.append(hop_of(paths, network, here, there, TOKEN_BYTES if layer == last else problem.call_bytes / 2))
    return tuple(hops)
