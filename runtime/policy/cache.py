"""Which experts are resident: a cache of equal slots over all layers, or of so many per layer.

Decides what is loaded and evicted when a layer asks for experts; the order is its `Eviction`'s. Must not know weights.
"""

from dataclasses import dataclass

import numpy as np

from runtime.policy.eviction import Bools, Eviction, Ints


class CacheTooSmall(ValueError):
    """A layer's experts do not fit together; the message says how many slots are needed."""


@dataclass(frozen=True, eq=False)
class Access:
    """What one layer's request led to: keys found, keys loaded, keys evicted for them."""

    hits: Ints
    loads: Ints
    evicted: Ints


class Cache:
    """Residents and who makes room for whom.

    Parameters
    ----------
    slots
        Experts that fit: over all layers, or of each layer where `per_layer`.

    Raises
    ------
    CacheTooSmall
        At a request for more experts of a layer than fit.
    """

    def __init__(self, layers: int, experts: int, slots: int, eviction: Eviction, *, per_layer: bool = False) -> None:
        self.resident: Bools = np.zeros(layers * experts, dtype=bool)
        self.slots = slots
        self._experts = experts
        self._eviction = eviction
        self._per_layer = per_layer

    def resident_of(self, layer: int) -> Bools:
        """Whether each expert of a layer is resident, bool ``[E]``. Does not modify."""
        return self.resident[layer * self._experts : (layer + 1) * self._experts]

    def request(self, layer: int, experts: Ints) -> Access:
        """Make the experts of a layer resident; none of them is evicted for another. Modifies."""
        keys = layer * self._experts + np.unique(experts)
        if len(keys) > self.slots:
            raise CacheTooSmall(
                f"layer {layer} needs {len(keys)} experts at once, the cache has {self.slots} slots"
                f"{' per layer' if self._per_layer else ''}; give it at least {len(keys)}"
            )
        found = self.resident[keys]
        loads = keys[~found]
        evicted = self._victims(layer, keys, len(loads))
        self.resident[evicted] = False
        self.resident[loads] = True
        return Access(keys[found], loads, evicted)

    def _victims(self, layer: int, pinned: Ints, count: int) -> Ints:
        first = layer * self._experts if self._per_layer else 0
        last = first + self._experts if self._per_layer else len(self.resident)
        held = first + np.flatnonzero(self.resident[first:last])
        short = len(held) + count - self.slots
        if short <= 0:
            return held[:0]
        free = held[~np.isin(held, pinned)]
        worth = self._eviction.worth(free, layer)
        return free[np.argsort(worth, kind="stable")[:short]]
