"""How a record gets into a slot, or into memory for one use: from the first of its sources that is intact.

Decides nothing about what is loaded where: it fills the copy that it is given, and tells the shelf that it is filled or
why it could not be. Flow: source → parts of a slot (checked at first use) → device, where the slots are there. Runs in
whichever thread needs the copy first; bookkeeping under the residency's lock, reads outside of it.
"""

import threading
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch

from runtime.counters import TierCounts
from runtime.errors import ExpertLost, ExpertUnavailable, RuntimeFault
from runtime.pool import ExpertWeights, SlotPool, as_weights
from runtime.records import Source, read_first
from runtime.shelf import Copy, Key, Shelf
from runtime.tensors import torch_dtype
from runtime.timeline import Timeline
from schemas.store import RecordLayout
from schemas.topology import TIERS, Tier


class Borrowed(NamedTuple):
    """An expert in use, the tier it was found in, and what was waited for it."""

    weights: ExpertWeights
    tier: Tier
    waited_s: float = 0.0


class Loader:
    """Fills copies of one residency. Thread-safe.

    Parameters
    ----------
    shelf, pools, changed
        Of the residency: its books, its slots, and the lock of both.
    counts
        Takes what was read; None without a cache.

    Attributes
    ----------
    timeline
        Takes a span for every load, where it is set.
    """

    def __init__(
        self,
        layout: RecordLayout,
        shelf: Shelf,
        pools: Mapping[Tier, SlotPool],
        changed: threading.Condition,
        *,
        counts: TierCounts | None,
        device: torch.device,
    ) -> None:
        self.timeline: Timeline | None = None
        self._layout = layout
        self._shelf = shelf
        self._pools = pools
        self._changed = changed
        self._counts = counts
        self._device = device
        self._checked: set[Source] = set()

    def weights(self, copy: Copy) -> ExpertWeights:
        """Return the weights of a copy that is filled and in use."""
        return self._pools[copy.tier].weights(copy.slot)

    def load(self, copy: Copy) -> None:
        """Fill a copy from the first source that is intact."""
        began = perf_counter()
        try:
            self._fill(copy)
        except (RuntimeFault, RuntimeError, OSError, ValueError, MemoryError) as error:
            with self._changed:
                self._shelf.fail(copy, error)
            return
        ended = perf_counter()
        if self.timeline is not None:
            about = f"layer {copy.key[0]} expert {copy.key[1]}"
            self.timeline.add("loads", about, began, ended, bytes=self._layout.bytes, ahead=copy.is_guess)
        with self._changed:
            self._shelf.slack.observe_load(ended - began)
            if self._counts is not None:
                self._counts.load(copy.key[0], self._layout.bytes)
            self._shelf.finish(copy)

    def read(self, key: Key) -> Borrowed:
        """Read an expert for one use."""
        began = perf_counter()
        weights = as_weights(self._layout, [part.to(self._device) for part in self._staged(key)])
        if self._counts is not None:
            with self._changed:
                self._counts.load(key[0], self._layout.bytes)
        return Borrowed(weights, "disk", perf_counter() - began)

    def _fill(self, copy: Copy) -> None:
        pool = self._pools[copy.tier]
        if self._device.type == "cpu" or copy.tier == "host":
            self._read_into(copy.key, pool.buffers(copy.slot))
            return
        with self._changed:
            host = self._shelf.copies.get((copy.key, "host"))
            host = host if host is not None and host.is_ready else None
            if host is not None:
                self._shelf.use(host)
        if host is None:
            pool.fill_from(copy.slot, self._staged(copy.key))
            return
        try:
            copy.found = "host"
            pool.fill_from(copy.slot, [part for part in self.weights(host) if part is not None])
        finally:
            with self._changed:
                self._shelf.end_use((host,))

    def _staged(self, key: Key) -> list[torch.Tensor]:
        """Read a record into memory of torch's own; returns its parts."""
        dtype = torch_dtype(self._layout.dtype)
        parts = [torch.empty(part.shape, dtype=dtype) for part in self._layout.parts]
        self._read_into(key, [_bytes_of(part) for part in parts])
        return parts

    def _read_into(self, key: Key, parts: Sequence[memoryview]) -> None:
        """Read a record from its first intact source, which is checked when it is first used."""
        source, damaged = read_first(list(self._shelf.sources.get(key, ())), parts, self._checked)
        if damaged:
            with self._changed:
                self._discredit(key, list(damaged))
        if source is None and not damaged and not any((key, tier) in self._shelf.assigned for tier in TIERS):
            raise ExpertUnavailable(*key, "this node")
        if source is None:
            raise ExpertLost(*key, list(damaged.values()))

    def _discredit(self, key: Key, damaged: Sequence[Source]) -> None:
        """Ask damaged sources last from now on: it may have been a disk's passing fault."""
        if (known := self._shelf.sources.get(key)) is not None:
            known.sort(key=damaged.__contains__)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
