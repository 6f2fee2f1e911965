"""From prompts and a placement's routing to what a chunk asks, and to seconds until the first token.

Decides the estimate that `prompts` tells of. Must not know how paths and placements were found.
"""

from dataclasses import dataclass

import numpy as np

from planner.problem import Floats, Ints, Problem
from planner.prompts import Prompts


@dataclass(frozen=True, eq=False)
class Asked:
    """What a chunk of a prompt asks, layer by layer. Axes: L layers, N nodes.

    Attributes
    ----------
    trunk_s, local_s
        Compute where the trunk runs: without experts, and of those served there, float64 ``[L]``.
    service_s
        Compute at nodes that are called, float64 ``[L, N]``.
    sent
        Tokens whose state goes to each node, and of whom a sum comes back, float64 ``[L, N]``.
    called
        How likely any does, float64 ``[L, N]``.
    """

    trunk_s: Floats
    local_s: Floats
    service_s: Floats
    sent: Floats
    called: Floats


def prompt_path_seconds(problem: Problem) -> Floats:
    """Seconds of a prompt that its path decides, float64 ``[I]``: the first chunk's trunk and hops; 0 without.

    A prompt goes from its ingress to the first layer's node as text, and the first token from the last one's back.
    """
    found = np.zeros(len(problem.ingress_node))
    for ingress, size in _mean_chunks(problem.prompts):
        trunk, prompts = problem.trunk_node[ingress], _of(problem)
        here, there, home = trunk[:-1], trunk[1:], int(problem.ingress_node[ingress])
        hops = prompts.hop_s[here, there] + size * prompts.state_bytes * prompts.byte_s[here, there]
        ends = prompts.hop_s[home, trunk[0]] + prompts.hop_s[trunk[-1], home]
        found[ingress] = float(hops.sum() + ends + size * _layer_seconds(problem, trunk).sum())
    return found


def prompt_rest_seconds(problem: Problem, holder: Ints, share: Floats | None) -> Floats:
    """Seconds of a prompt beside those of its path, float64 ``[I]``: experts, here or called, and all further chunks.

    Parameters
    ----------
    holder, share
        As in `Routing`.
    """
    found = np.zeros(len(problem.ingress_node))
    for ingress, size in _mean_chunks(problem.prompts):
        asked = chunk_asked(problem, holder, share, ingress, size)
        trunk, prompts = problem.trunk_node[ingress], _of(problem)
        each_way = asked.sent * prompts.state_bytes * prompts.byte_s[trunk]  # [L, N]
        calls = asked.called * prompts.call_s[trunk] + 2 * each_way + asked.service_s
        further = len(prompts.chunks(ingress)) - 1
        found[ingress] = float(np.maximum(asked.local_s, calls.max(axis=1)).sum())
        found[ingress] += further * _busiest(problem, trunk, asked, each_way)
    return found


def chunk_asked(problem: Problem, holder: Ints, share: Floats | None, ingress: int, size: float) -> Asked:
    """Return what `size` tokens of an ingress's prompt ask of the nodes."""
    prompts, trunk, layers = _of(problem), problem.trunk_node[ingress], np.arange(problem.layers)
    used = problem.share[ingress][:, None, :]  # [L, 1, E]
    if share is None:
        served = (holder[trunk, layers][:, None, :] == np.arange(problem.num_places)[None, :, None]).astype(np.float64)
    else:
        served = share[trunk, :, layers]  # [L, P, E]
    of_node = (problem.place_node[:, None] == np.arange(problem.num_nodes)[None, :]).astype(np.float64)  # [P, N]
    expert_s = prompts.expert_s[problem.place_node, problem.place_tier]
    service = size * ((used * served).sum(axis=2) * expert_s) @ of_node
    none_there = np.log1p(-np.minimum(used * served, 1 - 1e-12)).sum(axis=2) @ of_node
    needed = 1 - np.exp(none_there)  # share of tokens that a node serves, experts taken as independent
    local = service[layers, trunk].copy()
    service[layers, trunk] = needed[layers, trunk] = 0.0
    return Asked(size * _layer_seconds(problem, trunk), local, service, size * needed, 1 - (1 - needed) ** size)


def _busiest(problem: Problem, trunk: Ints, asked: Asked, each_way: Floats) -> float:
    """Seconds that a chunk keeps the busiest node or way between two nodes busy."""
    nodes = asked.service_s.sum(axis=0)
    np.add.at(nodes, trunk, asked.trunk_s + asked.local_s)
    ways = np.zeros((problem.num_nodes, problem.num_nodes))
    np.add.at(ways, trunk, each_way)
    return float(max(nodes.max(), ways.max()))


def _layer_seconds(problem: Problem, trunk: Ints) -> Floats:
    """Seconds of one token of a prompt in each layer, all decoder layers that go with it, float64 ``[L]``."""
    return np.asarray(np.diff(problem.room.decoder_first) * _of(problem).layer_s[trunk])


def _mean_chunks(prompts: Prompts | None) -> list[tuple[int, float]]:
    """Ingresses that have prompts, and the mean tokens of their chunks."""
    if prompts is None:
        return []
    return [
        (ingress, tokens / len(prompts.chunks(ingress)))
        for ingress, tokens in enumerate(prompts.tokens.tolist())
        if tokens
    ]


def _of(problem: Problem) -> Prompts:
    if problem.prompts is None:
        raise AssertionError("asked only where there are prompts")
    return problem.prompts
