"""Replicas put, placed and dropped, and the budgets of the tiers they lie in.

Decides what a tier has room for: a replica is held where it is told to be, or `OverBudget` says what is lacking; cached
copies make room for it, and a lowered budget is made good by replicas that can be read again. Must not know who uses an
expert, nor which belongs here. Flow: record → slot (device, host) or file named by its sha256 (disk); or only the
source of a record, which takes none of the budgets.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from runtime.copies import MEMORY, Copy, Key, copy_keys
from runtime.errors import BudgetTooSmall, InvalidInput, OverBudget
from runtime.launches import Launches
from runtime.packed import Repacked, Unpacked
from runtime.pool import SlotPool
from runtime.precision import pack_record, packed_layout
from runtime.reads import Reads
from runtime.records import RecordFile, Source, write_record
from runtime.shelf import Shelf
from schemas.precision import LowPrecision, PackedLayout
from schemas.store import RecordLayout
from schemas.topology import TIERS, Tier

Record = bytes | bytearray | memoryview

_LAUNCH_S: Final = 0.01  # after which the device is asked again how far it has come


class Placer:
    """Puts the replicas of one residency where they are told to be. Thread-safe.

    Parameters
    ----------
    shelf, pools, changed
        Of the residency: its books, its slots, and the lock of both.
    packed
        How the slots hold records, where not as weights.
    record_dir
        Directory of the disk tier's record files.
    reads
        How these are read.
    launches
        Of a device that is apart: what it has come past in host memory is no longer in use.
    """

    def __init__(
        self,
        layout: RecordLayout,
        shelf: Shelf,
        pools: Mapping[Tier, SlotPool],
        changed: threading.Condition,
        *,
        packed: PackedLayout | None,
        record_dir: Path | None,
        reads: Reads,
        launches: Launches | None = None,
    ) -> None:
        self._layout = layout
        self._shelf = shelf
        self._pools = pools
        self._changed = changed
        self._packed = packed
        self._record_dir = record_dir
        self._reads = reads
        self._launches = launches
        self._most = dict(shelf.budgets)

    def put(
        self, key: Key, tier: Tier, record: Record, source: Source | None = None, *, is_packed: bool = False
    ) -> None:
        """Hold a replica as `Residency.put` and `Residency.put_packed` say. Modifies."""
        layout = self._packed if is_packed else self._layout
        if layout is None or (is_packed and tier == "disk"):
            raise InvalidInput(f"layer {key[0]} expert {key[1]}: packed records are not held in {tier} here")
        if len(record) != layout.bytes:
            raise InvalidInput(
                f"layer {key[0]} expert {key[1]}: record of {len(record)} bytes, the layout says {layout.bytes}"
            )
        if source is not None and not is_packed:
            source = self.as_held(source)
        if tier == "disk":
            self._put_file(key, record)
            return
        with self._changed:
            copy, is_held = self._claim(key, tier, source)
            if is_held:
                return
            if source is not None:
                self._shelf.add_source(key, source)
            self._shelf.assign(key, tier)
            if copy is None:
                return  # the budget was lowered: it is loaded when it is asked for
            copy.is_assigned = True
            self._shelf.settle(copy)
            if copy.is_ready:
                return
        try:
            made = record if self._packed is None or is_packed else pack_record(record, self._packed)
            self._pools[tier].fill(copy.slot, made)
        except BaseException:
            self.drop(key, tier)
            raise
        finally:
            with self._changed:
                self._shelf.finish(copy)

    def place(self, key: Key, source: Source) -> None:
        """Execute `key` from a source, as `Residency.place` says. Modifies."""
        with self._changed:
            self._shelf.add_source(key, self.as_held(source))
            self._shelf.assign(key, "disk")

    def place_packed(self, key: Key, precision: LowPrecision, source: Source) -> None:
        """Know where a packed record lies, as `Residency.place_packed` says. Modifies."""
        with self._changed:
            if self._packed is None:
                unpacked = Unpacked(source, self._layout, packed_layout(self._layout, precision))
                self._shelf.add_source((*key, precision), unpacked)
            elif self._packed.precision == precision:
                self._shelf.add_source(key, source, is_best=True)

    def add_source(self, key: Key, source: Source) -> None:
        """Remember another place of a record, as `Residency.add_source` says. Modifies."""
        with self._changed:
            if any((key, tier) in self._shelf.assigned for tier in TIERS):
                self._shelf.add_source(key, self.as_held(source))

    def as_held(self, source: Source) -> Source:
        """Return a source of weights as one of what slots hold."""
        return source if self._packed is None else Repacked(source, self._layout, self._packed)

    def drop(self, key: Key, tier: Tier | None = None) -> None:
        """Stop holding `key`, as `Residency.drop` says. Modifies."""
        with self._changed:
            for each in TIERS if tier is None else (tier,):
                if (key, each) in self._shelf.assigned:
                    _remove_file(self._shelf.unassign(key, each))
            if not any((key, each) in self._shelf.assigned for each in TIERS):
                for copy_key in copy_keys(key):
                    self._shelf.sources.pop(copy_key, None)
                    for each in MEMORY:
                        self._shelf.remove((copy_key, each))
                    self._shelf.note_lack(copy_key)

    def set_budget(self, tier: Tier, budget: int) -> None:
        """Change a tier's budget, as `Residency.set_budget` says. Modifies."""
        with self._changed:
            self._collect()
            budget = min(budget, self._most[tier])
            bound = 0 if tier == "disk" else self._shelf.replicas.only_here(tier)
            if bound * self._shelf.record_bytes[tier] > budget:
                why = f"{bound} experts have no copy on this node's disk"
                raise BudgetTooSmall(tier, budget=budget, needed=bound * self._shelf.record_bytes[tier], why=why)
            self._shelf.budgets[tier] = budget
            if tier != "disk":
                self._shelf.forget_guesses(*self._shelf.guesses)
                self._shelf.review(tier)
                self._shelf.shrink(tier)

    def _claim(self, key: Key, tier: Tier, source: Source | None) -> tuple[Copy | None, bool]:
        """Return a copy to be filled or kept, and whether the replica is held already.

        There is no copy where the budget was lowered and the record can be read again. Cached copies make room, those
        in use when their users are done.
        """
        while True:
            self._collect()
            copy = self._shelf.copies.get((key, tier))
            if copy is not None and not copy.is_ready:
                self._changed.wait()
            elif copy is not None or (key, tier) in self._shelf.assigned:
                return copy, (key, tier) in self._shelf.assigned
            elif room := self._shelf.take(tier, 1):
                return self._shelf.occupy(key, *room[0]), False
            elif self._shelf.is_frozen_in(tier):
                self._changed.wait()
            elif victims := self._shelf.worst(key[0], 1, (tier,)):
                self._shelf.evict(victims[0])
            elif any(each.tier == tier and not each.is_assigned for each in self._shelf.copies.values()):
                self._shelf.forget_guesses(*self._shelf.guesses)
                if not any(each.tier == tier for each in self._shelf.evictable):
                    self._changed.wait(_LAUNCH_S if self._launches is not None else None)
            elif source is not None and self._shelf.budgets[tier] < self._most[tier]:
                return None, False
            else:
                raise OverBudget(
                    tier,
                    needed=self._shelf.record_bytes[tier],
                    used=self._shelf.used[tier],
                    budget=self._shelf.budgets[tier],
                )

    def _collect(self) -> None:
        """End the use of what the device has come past, since nobody may lend for a while; the lock is held."""
        if self._launches is not None:
            self._launches.collect()

    def _put_file(self, key: Key, record: Record) -> None:
        size = self._layout.bytes
        with self._changed:
            if (key, "disk") in self._shelf.assigned:
                return
            if self._shelf.used["disk"] + size > self._shelf.budgets["disk"]:
                raise OverBudget("disk", needed=size, used=self._shelf.used["disk"], budget=self._shelf.budgets["disk"])
            self._shelf.used["disk"] += size
        try:
            file = write_record(self._record_dir, record)
        except BaseException:
            with self._changed:
                self._shelf.used["disk"] -= size
            raise
        with self._changed:
            if (key, "disk") in self._shelf.assigned:  # another thread put it meanwhile
                self._shelf.used["disk"] -= size
                return
            own = self.as_held(RecordFile(file, file.name, reads=self._reads))
            self._shelf.add_source(key, own, is_best=True)
            self._shelf.assign(key, "disk", own)


def _remove_file(source: Source | None) -> None:
    source = source.source if isinstance(source, Repacked) else source
    if isinstance(source, RecordFile):
        source.file.unlink(missing_ok=True)
