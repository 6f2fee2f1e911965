"""What tokens' paths ask of a node: which decoder layers it runs, and the memory that their trunk and KV cache take.

Decides the one account that plans, migrations and agents keep. For an epoch change the paths of both epochs are given
together: weights of a layer are there once however many ingresses and epochs need them, and a session has its KV cache
of a layer once, since it is closed along its old path before it is opened along the new one. Must not know tiers.
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from schemas.model import ModelSpec
from schemas.plan import TrunkPath
from schemas.topology import Context


class PathMemory(NamedTuple):
    """Bytes of trunk weights and of KV cache."""

    trunk_bytes: int
    kv_bytes: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.trunk_bytes + self.kv_bytes


def path_nodes(paths: Iterable[TrunkPath]) -> frozenset[str]:
    """Nodes where tokens enter or that run layers for them."""
    return frozenset(chain.from_iterable((path.ingress, *(s.node for s in path.segments)) for path in paths))


def layers_run(node: str, paths: Iterable[TrunkPath]) -> frozenset[int]:
    """Return the decoder layers that a node runs for any ingress."""
    return frozenset(layer for _, layer in _runs(node, paths))


def path_memory(node: str, paths: Iterable[TrunkPath], model: ModelSpec, context: Context) -> PathMemory:
    """Bytes that paths, of one epoch or of two that overlap, take at a node.

    Parameters
    ----------
    model
        As held.
    context
        Tokens and sessions of every ingress to have room for.
    """
    runs = _runs(node, paths)
    kv = model.kv_bytes_per_token_layer * context.tokens * context.sessions
    return PathMemory(model.range_bytes({layer for _, layer in runs}), kv * len(runs))


def _runs(node: str, paths: Iterable[TrunkPath]) -> frozenset[tuple[str, int]]:
    """Return (ingress, decoder layer) of all that a node runs."""
    return frozenset(
        (path.ingress, layer)
        for path in paths
        for segment in path.segments
        if segment.node == node
        for layer in range(segment.first_layer, segment.last_layer + 1)
    )
