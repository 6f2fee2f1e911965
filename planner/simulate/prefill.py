"""What a prompt asks of the cluster: its chunks, each with its work in every layer and its hops.

Decides which layers of a chunk run without a break: a node computes those together, and looks at other work only where
the chunk waits for another node, hops or ends. A layer calls each node that is as likely as not to serve one of the
chunk's tokens. Must not know time.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np

from planner.objective import Routing
from planner.prefill import Asked, chunk_asked
from planner.problem import Floats, Problem
from planner.simulate.network import Network, Paths
from planner.simulate.work import TOKEN_BYTES, Call, Hop, Work, call_of, hop_of

_LIKELY: Final = 0.5


@dataclass(frozen=True, eq=False)
class Chunk:
    """Work of a chunk, one entry for each layer, and the hop after each; None where the trunk stays.

    `lead_s` is how long the prompt takes from its ingress to the first layer's node.
    """

    works: tuple[Work, ...]
    hops: tuple[Hop | None, ...]
    lead_s: float


def prompt_chunks(problem: Problem, routing: Routing, network: Network) -> tuple[tuple[Chunk, ...], ...]:
    """Return the chunks of a prompt of each ingress, none where it has no prompts."""
    prompts, paths = problem.prompts, Paths(problem, network)
    if prompts is None:
        return ((),) * len(problem.ingress_node)
    found = []
    for ingress in range(len(problem.ingress_node)):
        sizes = prompts.chunks(ingress)
        kinds = {
            size: _chunk(paths, ingress, chunk_asked(problem, routing.holder, routing.share, ingress, size), size)
            for size in set(sizes)
        }
        found.append(tuple(kinds[size] for size in sizes))
    return tuple(found)


def _chunk(paths: Paths, ingress: int, asked: Asked, size: int) -> Chunk:
    trunk, state, works = paths.problem.trunk_node[ingress], paths.problem.hop_bytes, []
    for layer, node in enumerate(trunk.tolist()):
        calls = tuple(
            _call(paths, node, holder, asked, layer)
            for holder in np.flatnonzero(asked.called[layer] >= _LIKELY).tolist()
        )
        works.append(Work(node, float(asked.trunk_s[layer]), float(asked.local_s[layer]), calls))
    home, first, last = int(paths.problem.ingress_node[ingress]), int(trunk[0]), int(trunk[-1])
    onward = zip(trunk[:-1].tolist(), trunk[1:].tolist(), strict=True)
    hops = [_hop(paths, here, there, size * state) for here, there in onward]
    back, out = _hop(paths, last, home, TOKEN_BYTES), _hop(paths, home, first, TOKEN_BYTES * size)
    lead_s = 0.0 if out is None else out.network_s + out.overhead_s
    return Chunk(tuple(_without_breaks(works, [*hops, back])), (*hops, back), lead_s)


def _hop(paths: Paths, here: int, there: int, size: float) -> Hop | None:
    return None if here == there else hop_of(paths, paths.network, here, there, size)


def _call(paths: Paths, node: int, holder: int, asked: Asked, layer: int) -> Call:
    size = float(asked.sent[layer, holder]) * paths.problem.hop_bytes
    out, back = paths.one_way(node, holder, size), paths.reply(node, holder, size)
    return call_of(holder, float(asked.service_s[layer, holder]), out, back, paths.network)


def _without_breaks(works: list[Work], hops: list[Hop | None]) -> list[Work]:
    """Compute layers that follow each other without call or hop in the first of them; the others have nothing left."""
    joined, first = list(works), 0
    for layer, work in enumerate(works):
        if layer > first:
            before = joined[first]
            done = before.trunk_s + before.local_s + work.trunk_s
            joined[first] = Work(work.node, done, work.local_s, work.calls)
            joined[layer] = Work(work.node, 0.0, 0.0, ())
        if work.calls or hops[layer] is not None:
            first = layer + 1
    return joined


def prompt_use(chunks: tuple[Chunk, ...], network: Network) -> tuple[Floats, Floats]:
    """Seconds of compute at each node ``[N]`` and bytes over each directed link ``[2U]`` of one prompt."""
    rate = network.link_bandwidth
    busy, sent = np.zeros(len(network.trunk_s)), np.zeros(2 * len(rate))
    for chunk in chunks:
        for work in chunk.works:
            busy[work.node] += work.trunk_s + work.local_s
            for call in work.calls:
                busy[call.holder] += call.service_s
                for link, occupied, _ in chain(call.out, call.back):
                    sent[link] += occupied * rate[link // 2]
        for hop in filter(None, chunk.hops):
            for link, _, _ in hop.path:
                sent[link] += hop.bytes
    return busy, sent
