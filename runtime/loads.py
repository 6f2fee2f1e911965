"""How a record gets into a slot, or into memory for one use: from the first of its sources that is intact.

Decides nothing about what is loaded where: it fills the copy that it is given, and tells the shelf that it is filled or
why it could not be. Flow: source → parts of a slot (checked at first use) → device, where the slots are there. Runs in
whichever thread needs the copy first; bookkeeping under the residency's lock, reads outside of it.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from runtime.copies import Copy, CopyKey
from runtime.counters import TierCounts
from runtime.errors import ExpertLost, ExpertUnavailable, RuntimeFault
from runtime.packed import Repacked, bytes_read
from runtime.pool import ExpertWeights, SlotPool, as_weights
from runtime.precision import empty_parts, unpack_parts
from runtime.records import Source, read_first
from runtime.shelf import Shelf
from runtime.timeline import recorder
from schemas.precision import PackedLayout, Precision
from schemas.store import RecordLayout
from schemas.topology import TIERS, Tier

if TYPE_CHECKING:
    from runtime.cuda.copies import DeviceCopies


class Borrowed(NamedTuple):
    """An expert in use, the tier it was found in, what was waited for it, and in which precision it is."""

    weights: ExpertWeights
    tier: Tier
    waited_s: float = 0.0
    precision: Precision = "checkpoint"


class Loader:
    """Fills copies of one residency. Thread-safe.

    Parameters
    ----------
    shelf, pools, changed
        Of the residency: its books, its slots, and the lock of both.
    counts
        Takes what was read; None without a cache.
    packed
        How the slots hold records, where not as weights.
    copies
        Brings records to the slots of a device that is apart.
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
        packed: PackedLayout | None = None,
        copies: "DeviceCopies | None" = None,
    ) -> None:
        self._layout = layout
        self._shelf = shelf
        self._pools = pools
        self._changed = changed
        self._counts = counts
        self._device = device
        self._packed = packed
        self._precision: Precision = packed.precision if packed is not None else "checkpoint"
        self.copies = copies
        self._checked: set[Source] = set()

    def weights(self, copy: Copy) -> ExpertWeights:
        """Return the weights of a copy that is filled and in use."""
        return self._pools[copy.tier].weights(copy.slot)

    def borrowed(self, copy: Copy, waited_s: float = 0.0, *, is_new: bool = False) -> Borrowed:
        """Return a copy that is filled and in use as it is lent; of a new one, the tier that it came from."""
        tier = copy.found if is_new else copy.tier
        return Borrowed(self.weights(copy), tier, waited_s, self.precision_of(copy.key))

    def precision_of(self, key: CopyKey) -> Precision:
        """Return the precision that a copy has."""
        return key[2] if len(key) == 3 else self._precision

    def load(self, copy: Copy) -> None:
        """Fill a copy from the first source that is intact, and let it be used."""
        origin, began = self._shelf.comebacks.origin(copy), perf_counter()
        try:
            num_bytes = self.fill(copy)
        except (RuntimeFault, RuntimeError, OSError, ValueError, MemoryError) as error:
            with self._changed:
                self._shelf.fail(copy, error)
            return
        ended = perf_counter()
        if copy.recorder is not None:
            about = f"layer {copy.key[0]} expert {copy.key[1]}"
            copy.recorder.add("loads", about, began, ended, bytes=num_bytes, ahead=copy.is_guess)
        with self._changed:
            self._shelf.slack.observe_load(ended - began, is_low=len(copy.key) == 3)
            self._shelf.comebacks.observe(origin, ended - began)
            if self._counts is not None:
                self._counts.load(copy.key[0], num_bytes)
            self._shelf.finish(copy)

    def read(self, key: CopyKey) -> Borrowed:
        """Read an expert for one use: from host memory that is apart, where it lies there."""
        began = perf_counter()
        with self._changed:
            host = self._shelf.comebacks.in_host(key)
            if host is not None:
                self._shelf.use(host)
        if host is not None:
            return self._read_host_copy(host, began)
        parts, num_bytes = self._staged(key)
        if (into := recorder()) is not None:
            into.add("loads", f"layer {key[0]} expert {key[1]}", began, perf_counter(), bytes=num_bytes)
        weights = as_weights(self._layout, [part.to(self._device) for part in parts])
        if self._counts is not None:
            with self._changed:
                self._counts.load(key[0], num_bytes)
        return Borrowed(weights, "disk", perf_counter() - began, self.precision_of(key))

    def _read_host_copy(self, host: Copy, began: float) -> Borrowed:
        """Read an expert for one use from its copy in host memory, and end the use of that."""
        try:
            weights = self._pools["host"].weights(host.slot).copied(self._device)
        finally:
            with self._changed:
                self._shelf.end_use((host,))
        return Borrowed(weights, "host", perf_counter() - began, self.precision_of(host.key))

    def read_weights(self, key: CopyKey) -> bytes:
        """Read the record of weights of an expert that is held packed, from where it lies as such."""
        made = (source for source in self._shelf.sources.get(key, ()) if isinstance(source, Repacked))
        record = bytearray(self._layout.bytes)
        source, damaged = read_first([each.source for each in made], [memoryview(record)], self._checked)
        if source is None:
            why = f"this node but in {self._precision}{''.join(f'; {each}' for each in damaged.values())}"
            raise ExpertUnavailable(key[0], key[1], why)
        return bytes(record)

    def packed_record(self, key: CopyKey) -> bytes:
        """Return the packed record of an expert that is held packed: from memory, or from where it lies."""
        with self._changed:
            copy = self._shelf.ready.get(key)
            if copy is not None:
                self._shelf.use(copy)
        if copy is None:
            if self._packed is None:
                raise RuntimeFault("experts are not held packed here")
            record = bytearray(self._packed.bytes)
            self._read_into(key, [memoryview(record)])
            return bytes(record)
        try:
            return self._pools[copy.tier].record(copy.slot)
        finally:
            with self._changed:
                self._shelf.end_use((copy,))

    def fill(self, copy: Copy) -> int:
        """Fill a copy from the first source that is intact; returns how many bytes were read."""
        pool = self._pools[copy.tier]
        if self.copies is None or copy.tier == "host":
            return self._read_into(copy.key, pool.buffers(copy.slot))
        with self._host_copy(copy) as host:
            if host is not None:
                self.copies.bring(pool, copy.slot, self._pools["host"].whole(host.slot))
                return len(self._pools["host"].whole(host.slot))
        with self.copies.staged() as (staging, slot):
            num_bytes = self._read_into(copy.key, staging.buffers(slot))
            self.copies.bring(pool, copy.slot, staging.whole(slot))
            return num_bytes

    def is_at_hand(self, key: CopyKey) -> bool:
        """Whether a copy of an expert can be begun to be filled without reading anything; the lock is held."""
        host = self._shelf.copies.get((key, "host"))
        return self.copies is None or (host is not None and host.is_ready)

    def start(self, copy: Copy) -> Copy | None:
        """Begin to fill a copy; what is launched on the copy stream later finds it filled. The lock is not held.

        Returns
        -------
        Copy or None
            In host memory, that it is filled from, and whose use ends when the stream has come past.
        """
        host = None
        if self.copies is not None:
            with self._changed:
                host = self._shelf.copies.get((copy.key, "host"))
                if host is not None and host.is_ready:
                    self._shelf.use(host)
                else:
                    host = None
        if host is None or self.copies is None:
            self.fill(copy)
            return None
        copy.found = "host"
        self.copies.enqueue(self._pools[copy.tier], copy.slot, self._pools["host"], host.slot)
        return host

    @contextmanager
    def _host_copy(self, copy: Copy) -> Iterator[Copy | None]:
        """Use the copy of an expert in host memory meanwhile; it is read now where there is room for it."""
        is_new = False
        with self._changed:
            host = self._shelf.copies.get((copy.key, "host"))
            if host is None and (slot := self._shelf.room_in("host", copy.key[0])) is not None:
                host, is_new = self._shelf.occupy(copy.key, "host", slot), True
            elif host is not None and not host.is_ready:
                host = None
            if host is not None:
                self._shelf.use(host)
        try:
            if host is not None and is_new:
                self.read_host(host)
            elif host is not None:
                copy.found = "host"
            yield host
        finally:
            if host is not None:
                with self._changed:
                    self._shelf.end_use((host,))

    def read_host(self, host: Copy) -> None:
        """Fill a copy in host memory, and let it be used; raises what `fill` does."""
        try:
            self._read_into(host.key, self._pools["host"].buffers(host.slot))
        except (RuntimeFault, OSError, ValueError) as error:
            with self._changed:
                self._shelf.fail(host, error)
            raise
        with self._changed:
            self._shelf.finish(host)

    def note_read(self, copies: Iterable[Copy]) -> None:
        """Note that what was launched so far reads the slots of these copies."""
        if self.copies is not None:
            self.copies.fences.read(copy.slot for copy in copies if copy.tier == "device")

    def _staged(self, key: CopyKey) -> tuple[list[torch.Tensor], int]:
        """Read a record into memory of torch's own; returns the weights' parts, and how many bytes were read."""
        parts = empty_parts(self._layout)
        if self._packed is None:
            return parts, self._read_into(key, [_bytes_of(part) for part in parts])
        record = torch.empty(self._packed.bytes, dtype=torch.uint8)
        num_bytes = self._read_into(key, [_bytes_of(record)])
        unpack_parts(record, self._packed, parts)
        return parts, num_bytes

    def _read_into(self, key: CopyKey, parts: Sequence[memoryview]) -> int:
        """Read a record from its first intact source, which is checked when it is first used; returns bytes read."""
        sources = self._shelf.sources.get(key) or self._shelf.guests.get((key[0], key[1]), [])
        source, damaged = read_first(list(sources), parts, self._checked)
        if damaged:
            with self._changed:
                self._discredit(key, list(damaged))
        if source is None and not damaged and not any((key, tier) in self._shelf.assigned for tier in TIERS):
            raise ExpertUnavailable(key[0], key[1], "this node")
        if source is None:
            raise ExpertLost(key[0], key[1], list(damaged.values()))
        return bytes_read(source, sum(map(len, parts)))

    def _discredit(self, key: CopyKey, damaged: Sequence[Source]) -> None:
        """Ask damaged sources last from now on: it may have been a disk's passing fault."""
        if (known := self._shelf.sources.get(key)) is not None:
            known.sort(key=damaged.__contains__)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def device_copies(device: torch.device, layout: RecordLayout, packed: PackedLayout | None) -> "DeviceCopies":
    """Return what brings records to the slots of a device; its package is imported where there is one."""
    from runtime.cuda.copies import DeviceCopies, PlainCopies

    return (PlainCopies if device.type == "cpu" else DeviceCopies)(device, layout, packed=packed)
