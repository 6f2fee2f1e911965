"""Trunks that differ little from one that is known.

Decides what a search looks at next: another path for one ingress, a boundary one layer on, for all that share it, the
paths of two ingresses exchanged. Must not know costs.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from planner.problem import Ints


def neighbours(trunk_node: Ints, paths: Sequence[Ints], num_nodes: int) -> Iterator[Ints]:
    """Yield trunks ``[I, L]`` near another.

    Parameters
    ----------
    paths
        Nodes of layers, int64 ``[L]`` each, that an ingress may take instead of its own, beside each node alone.
    """
    yield from _other_paths(trunk_node, paths, num_nodes)
    yield from _shifted(trunk_node)
    yield from _swapped(trunk_node)


def single_layers(trunk_node: Ints, num_nodes: int) -> Iterator[Ints]:
    """Yield trunks in which one layer runs elsewhere, for all ingresses or for one."""
    if len(trunk_node) > 1:
        for layer in range(trunk_node.shape[1]):
            for node in range(num_nodes):
                if (trunk_node[:, layer] != node).any():
                    changed = trunk_node.copy()
                    changed[:, layer] = node
                    yield changed
    for ingress, layer in np.ndindex(*trunk_node.shape):
        for node in range(num_nodes):
            if trunk_node[ingress, layer] != node:
                changed = trunk_node.copy()
                changed[ingress, layer] = node
                yield changed


def _other_paths(trunk_node: Ints, paths: Sequence[Ints], num_nodes: int) -> Iterator[Ints]:
    alone = [np.full(trunk_node.shape[1], node) for node in range(num_nodes)]
    for ingress, own in enumerate(trunk_node):
        for path in (*alone, *paths):
            if (path != own).any():
                changed = trunk_node.copy()
                changed[ingress] = path
                yield changed


def _swapped(trunk_node: Ints) -> Iterator[Ints]:
    for one, other in combinations(range(len(trunk_node)), 2):
        if (trunk_node[one] != trunk_node[other]).any():
            changed = trunk_node.copy()
            changed[[one, other]] = trunk_node[[other, one]]
            yield changed


def _shifted(trunk_node: Ints) -> Iterator[Ints]:
    for path in np.unique(trunk_node, axis=0):
        same = (trunk_node == path).all(axis=1)
        for layer in range(1, len(path)):
            if path[layer] != path[layer - 1]:
                for moved, node in ((layer, path[layer - 1]), (layer - 1, path[layer])):
                    changed = trunk_node.copy()
                    changed[same, moved] = node
                    yield changed
