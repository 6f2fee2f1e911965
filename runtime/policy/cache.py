"""Which experts are resident: a cache of equal slots, or of bytes, over all layers or of so many per layer.

Decides what is loaded and evicted when a layer asks for experts, or when somebody guesses that one will; the order is
its `Eviction`'s. Must not know weights.
"""

from dataclasses import dataclass

import numpy as np

from runtime.policy.eviction import Bools, Eviction, Floats, Ints
from schemas.units import format_bytes


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
        Experts that fit: over all layers, or of each layer where `per_layer`. With `sizes`, what they may take.
    sizes
        What each expert takes, float64 ``[L * E]``; one slot each by default.

    Raises
    ------
    CacheTooSmall
        At a request for more experts of a layer than fit.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        eviction: Eviction,
        *,
        per_layer: bool = False,
        sizes: Floats | None = None,
    ) -> None:
        self.resident: Bools = np.zeros(layers * experts, dtype=bool)
        self.slots = slots
        self._experts = experts
        self._eviction = eviction
        self._per_layer = per_layer
        self._sizes = sizes

    def resident_of(self, layer: int) -> Bools:
        """Whether each expert of a layer is resident, bool ``[E]``. Does not modify."""
        return self.resident[layer * self._experts : (layer + 1) * self._experts]

    def request(self, layer: int, experts: Ints) -> Access:
        """Make the experts of a layer resident; none of them is evicted for another. Modifies."""
        keys = layer * self._experts + np.unique(experts)
        if self._size(keys) > self.slots:
            raise CacheTooSmall(self._shortage(layer, keys))
        found = self.resident[keys]
        loads = keys[~found]
        evicted = self._victims(layer, keys, loads, layer)
        self.resident[evicted] = False
        self.resident[loads] = True
        return Access(keys[found], loads, evicted)

    def bring(self, layer: int, experts: Ints, running: int, used: Ints) -> Ints:
        """Make experts of a layer resident that is still to run, as far as there is room. Modifies.

        Parameters
        ----------
        running, used
            The layer that runs meanwhile, and what it uses, which is not evicted.

        Returns
        -------
        Ints
            Keys of what was brought in.
        """
        keys = layer * self._experts + experts
        pinned = np.concatenate([keys, running * self._experts + used])
        loads = keys[~self.resident[keys]]
        in_the_way = pinned if not self._per_layer else keys
        while len(loads) and self._size(in_the_way[self.resident[in_the_way]]) + self._size(loads) > self.slots:
            loads = loads[:-1]
        self.resident[self._victims(layer, pinned, loads, running)] = False
        self.resident[loads] = True
        return loads

    def _size(self, keys: Ints) -> float:
        return len(keys) if self._sizes is None else float(self._sizes[keys].sum())

    def _shortage(self, layer: int, keys: Ints) -> str:
        per_layer = " per layer" if self._per_layer else ""
        if self._sizes is not None:
            needed, given = format_bytes(self._size(keys)), format_bytes(self.slots)
            return f"layer {layer} needs {needed} at once, the cache has {given}{per_layer}; give it at least {needed}"
        return (
            f"layer {layer} needs {len(keys)} experts at once, the cache has {self.slots} slots{per_layer}; give it at "
            f"least {len(keys)}"
        )

    def _victims(self, layer: int, pinned: Ints, loads: Ints, running: int) -> Ints:
        """Return what must go so that `loads` of a layer fit: what is worth least while layer `running` runs."""
        first = layer * self._experts if self._per_layer else 0
        last = first + self._experts if self._per_layer else len(self.resident)
        held = first + np.flatnonzero(self.resident[first:last])
        short = self._size(held) + self._size(loads) - self.slots
        if short <= 0 or not len(loads):
            return held[:0]
        free = held[~np.isin(held, pinned)]
        order = free[np.argsort(self._eviction.worth(free, running), kind="stable")]
        if self._sizes is None:
            return order[: int(short)]
        return order[: 1 + int(np.searchsorted(np.cumsum(self._sizes[order]), short))]
