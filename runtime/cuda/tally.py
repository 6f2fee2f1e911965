"""What is counted of a step that runs on a device by itself: routing, where experts were found, caches written to.

Decides nothing. Must not know who brought what a layer lacked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.table import sorted_rows
from runtime.dispatch import Dispatcher
from runtime.slots import Residency
from schemas.topology import Tier

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Tally:
    """Counts one step of some sessions.

    Parameters
    ----------
    first_layer
        Of the step, among layers with experts.
    caches
        Of the sessions.
    """

    def __init__(self, residency: Residency, dispatcher: Dispatcher, first_layer: int, caches: Sequence[Any]) -> None:
        self._residency = residency
        self._dispatcher = dispatcher
        self._first = first_layer
        self._caches = caches
        self._is_lacking = bool(residency.inside.shelf.lacking)

    def count(self, index: int, experts: Ints, brought: Mapping[int, Tier]) -> list[int]:
        """Count a layer, and let caches know what the device has written to them; returns the experts computed.

        Parameters
        ----------
        experts
            [B, K] that were computed, below 0 where none.
        brought
            Those that were not in a slot, and where they came from.
        """
        number, counts = self._first + index, self._dispatcher.counts
        for cache in self._caches:
            cache.layers[index].written(1)
        flat: list[int] = experts[experts >= 0].tolist()
        self._count_found(number, flat, brought)
        if len(experts) == 1:
            counts.count_token(number, flat, remote_rows=0)
        else:
            counts.count_layer(number, sorted_rows(experts), tokens=len(experts), remote_rows=0, remote_tokens=0)
        counts.local_calls += 1
        return flat

    def _count_found(self, number: int, flat: list[int], brought: Mapping[int, Tier]) -> None:
        """Count rows by where their experts were found, and experts once."""
        rows = self._dispatcher.counts.tier_rows
        if not brought:
            rows["device"] = rows.get("device", 0) + len(flat)
        for expert in flat if brought else ():
            tier = brought.get(expert, "device")
            rows[tier] = rows.get(tier, 0) + 1
        if self._residency.caching is not None:
            self._residency.counts.found["device"][number] += len(set(flat) - brought.keys())

    def observe(self, index: int, chosen: Ints, gates: Floats) -> None:
        """Let the eviction policy learn of a layer's routing. Modifies."""
        if not self._is_lacking:
            return
        number, is_some = self._first + index, chosen >= 0
        if len(chosen) == 1:
            self._residency.observe_token(number, chosen[is_some].tolist(), gates[is_some].astype(np.float32))
            return
        tokens = np.nonzero(is_some)[0]
        self._residency.observe(number, tokens, chosen[is_some], torch.from_numpy(gates[is_some]))
