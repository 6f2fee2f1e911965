"""What weights a node has: replicas in their tiers, backing copies on disk, and (where there is one) a store.

Decides where a record is looked for first, and how much disk backing copies may take: what the disk budget leaves
beside replicas of the disk tier, so that a restart need not pull again. Only replicas are ever executed. Whatever is
read is checked against its sha256 before it is used. Must not know sockets or epochs.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from agent.budget import Held
from agent.errors import CannotPrepare, DataUnusable
from runtime.errors import RuntimeFault
from runtime.records import FetchedRecord, RecordFile, Source
from runtime.slots import Key, Record, Residency
from runtime.store import Store
from schemas.messages import AssignedReplica, Hop
from schemas.messages import Record as RecordName
from schemas.outcome import ExitCode
from schemas.precision import LowPrecision
from schemas.store import RECORDS_NAME
from schemas.units import format_bytes

log = logging.getLogger(__name__)

_OURS: Final = re.compile(r"\.?[0-9a-f]{64}|\.record\..*")  # records, and what a killed agent was writing
_BACKED: Final = ("device", "host")  # a replica of the disk tier is its own copy


class Holdings:
    """The weights of one node. Thread-safe: one thread changes them, others read.

    Parameters
    ----------
    data
        ``records`` below it belongs to the disk tier (`residency`), ``backing`` to this class.
    disk_budget
        Bytes that both together may take.
    fetch
        Brings a record from other nodes when every copy here is damaged.
    """

    def __init__(
        self,
        residency: Residency,
        store: Store | None,
        data: Path,
        *,
        disk_budget: int,
        fetch: Callable[[AssignedReplica], Record] | None = None,
    ) -> None:
        self.residency = residency
        self._fetch = fetch
        self.store = store
        self._records = data / "records"
        self._backing = data / "backing"
        self._disk_budget = disk_budget
        self._lock = threading.RLock()
        self._keys: dict[str, Key] = {}
        self._sizes: dict[str, int] = {}
        self._packed: set[str] = set()  # of these names, those of packed records
        self._backed: dict[str, int] = {}
        self._reserved = 0  # bytes of the disk tier that are promised to replicas, here already or on their way

    def open(self, known: Mapping[Held, AssignedReplica], parts: Collection[str] = ()) -> None:
        """Make the directories, and remove records that are none of the `known` replicas' or trunk `parts`'. Modifies.

        Files that this class would not have made are left alone. Raises `DataUnusable`.
        """
        names = {replica.brought.sha256 for replica in known.values()}.union(parts)
        try:
            for directory in (self._records, self._backing):
                directory.mkdir(parents=True, exist_ok=True)
                for file in directory.iterdir():
                    if _OURS.fullmatch(file.name) and file.name not in names:
                        file.unlink()
            self._backed = {name: file.stat().st_size for name in names if (file := self._backing / name).is_file()}
        except OSError as error:
            raise DataUnusable(
                f"{error.filename}: {error.strerror}; the agent keeps its records there: give it a data directory of "
                "its own that it may write to"
            ) from error

    def missing(self, wanted: Mapping[Held, AssignedReplica]) -> list[AssignedReplica]:
        """Return the wanted replicas that are not in their tier, or not known by that record's name. Does not modify.

        A node that packs what comes knows it by the name of the checkpoint's record; peers may ask for the packed one.
        """
        held = {(*key, tier) for tier, keys in self.residency.held().items() for key in keys}
        with self._lock:
            named = set(self._keys)
        return [
            replica
            for place, replica in sorted(wanted.items())
            if place not in held or replica.brought.sha256 not in named
        ]

    def require_room(self, wanted: Mapping[Held, AssignedReplica], missing: Iterable[AssignedReplica]) -> None:
        """Raise `CannotPrepare` if the disk lacks room for missing records of its tier. May drop backing copies."""
        for_disk = {r.record.sha256: r.record.bytes for r in wanted.values() if r.tier == "disk"}
        self._reserved = sum(for_disk.values())
        self._trim(max(0, self._disk_budget - self._reserved))
        needed = sum({r.record.sha256: r.record.bytes for r in missing if r.tier == "disk"}.values())
        free = shutil.disk_usage(self._records).free
        if needed > free:
            raise CannotPrepare(
                f"{self._records}: the disk is full: records need {format_bytes(needed)}, {format_bytes(free)} are "
                "free; free some space there and apply again",
                ExitCode.INFEASIBLE,
            )

    def find(self, replica: AssignedReplica) -> Record | None:
        """Return a record that is here already, verified; damaged files are removed."""
        name, key = replica.brought.sha256, (replica.record.layer, replica.record.expert)
        if (data := self._read_back(name)) is not None:
            return data
        if (data := self._from_memory(key, is_packed=replica.packed is not None)) and _is_intact(data, name):
            return data
        return self._from_store(name)

    def _from_memory(self, key: Key, *, is_packed: bool) -> bytes | None:
        """Return the record of a held expert; None where it is only held in another precision, or damaged."""
        if not self.residency.holds(key):
            return None
        try:
            return self.residency.packed_record(key) if is_packed else self.residency.record(key)
        except RuntimeFault:
            return None

    def find_part(self, name: str) -> bytes | None:
        """Return a part of the trunk that is here already, verified; damaged files are removed."""
        data = self._read_back(name)
        return data if data is not None else self._from_store(name)

    def hold_part(self, name: str, record: bytes) -> None:
        """Keep a backing copy of a part of the trunk, where there is room. Modifies."""
        if self.store is None or name not in self.store.by_sha256:
            self._back(name, record)

    def _from_store(self, name: str) -> bytes | None:
        if self.store is None or name not in self.store.by_sha256:
            return None
        try:
            data = self.store.read(name)
        except OSError as error:
            log.warning("%s cannot be read: %s; record %s… is looked for elsewhere", self.store.path, error, name[:12])
            return None
        if _is_intact(data, name):
            return data
        log.warning("%s: record %s… is damaged; it is looked for elsewhere", self.store.path, name[:12])
        return None

    def _read_back(self, name: str) -> bytes | None:
        """Return a record from this node's own files; damaged ones are removed."""
        for file in (self._records / name, self._backing / name):
            try:
                data = file.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("%s cannot be read: %s; it is fetched again", file, error.strerror)
            else:
                if _is_intact(data, name):
                    return data
                log.warning("%s is damaged; it is fetched again", file)
            with suppress(OSError):  # of a disk that takes nothing back: it is looked at again
                file.unlink(missing_ok=True)
            with self._lock:
                self._backed.pop(name, None)
        return None

    def hold(self, replica: AssignedReplica, record: Record) -> None:
        """Put a verified record into its tier, with a backing copy where there is room. Modifies."""
        name, key = replica.brought.sha256, (replica.record.layer, replica.record.expert)
        if replica.tier in _BACKED:
            self._back(name, record)
        sources, packed = self._sources(replica.record.sha256), self.residency.packed
        if replica.packed is not None and packed is not None:
            made = self._sources(name)
            self.residency.put_packed(key, replica.tier, record, source=made[0] if made else None)
            for source in made:
                self.residency.place_packed(key, packed.precision, source)
        else:
            self.residency.put(key, replica.tier, record, source=sources[0] if sources else None)
        for source in sources:
            self.residency.add_source(key, source)
        for precision, source in self._packed_sources(key, replica.record.sha256):
            self.residency.place_packed(key, precision, source)
        if self._fetch is not None and replica.sources and replica.tier == "disk":
            self.residency.add_source(key, FetchedRecord(name, partial(self._fetched, replica)))
        with self._lock:
            self._keys[name], self._sizes[name] = key, len(record)
            (self._packed.add if replica.packed is not None else self._packed.discard)(name)

    def _sources(self, name: str) -> list[Source]:
        """Return where a record can be read again on this node."""
        sources: list[Source] = [self._file(self._backing / name, name)] if name in self._backed else []
        if self.store is not None and name in self.store.by_sha256:
            offset = self.store.by_sha256[name].offset
            sources.append(self._file(self.store.path / RECORDS_NAME, name, offset))
        return sources

    def _file(self, path: Path, sha256: str, offset: int = 0) -> RecordFile:
        """Return a record of this machine's disk, read as the residency reads."""
        return RecordFile(path, sha256, offset, self.residency.reads)

    def _packed_sources(self, key: Key, name: str) -> list[tuple[LowPrecision, Source]]:
        """Return where the store has this expert in low precisions."""
        if self.store is None or name not in self.store.by_sha256:
            return []
        file, manifest = self.store.path / RECORDS_NAME, self.store.manifest
        found = [
            (each.layout.precision, each.records[key[0] * manifest.model.experts + key[1]]) for each in manifest.packed
        ]
        return [(precision, self._file(file, record.sha256, record.offset)) for precision, record in found]

    def invite(self, routing: Iterable[Hop]) -> None:
        """Let experts that others compute for this node be cached here, from its own store or from them. Modifies."""
        guests: dict[Key, list[Source]] = {}
        for hop in routing:
            record = RecordName(
                layer=hop.layer, expert=hop.expert, sha256=hop.sha256, bytes=self.residency.layout.bytes
            )
            replica = AssignedReplica(record=record, tier="device", sources=hop.holders)
            guests[hop.layer, hop.expert] = self._sources(hop.sha256)
            if self._fetch is not None:
                guests[hop.layer, hop.expert].append(FetchedRecord(hop.sha256, partial(self._brought, replica)))
        self.residency.invite(guests)

    def _brought(self, replica: AssignedReplica, _: str) -> Record:
        assert self._fetch is not None  # noqa: S101
        return self._fetch(replica)

    def _fetched(self, replica: AssignedReplica, name: str) -> Record:
        log.warning("record %s… is fetched from other nodes", name[:12])
        assert self._fetch is not None  # noqa: S101
        return self._fetch(replica)

    def keep(self, wanted: Mapping[Held, AssignedReplica], parts: Collection[str] = ()) -> None:
        """Drop every replica and backing copy that is not wanted, nor one of the trunk's `parts`. Modifies."""
        for tier, keys in self.residency.held().items():
            for key in keys:
                if (*key, tier) not in wanted:
                    self.residency.drop(key, tier)
        names = {replica.brought.sha256 for replica in wanted.values()}.union(parts)
        with self._lock:
            for name in self._keys.keys() - names:
                del self._keys[name], self._sizes[name]
                self._packed.discard(name)
            for name in self._backed.keys() - names:
                self._unback(name)

    @property
    def backing_bytes(self) -> int:
        """Bytes of backing copies."""
        with self._lock:
            return sum(self._backed.values())

    def size(self, sha256: str) -> int:
        """Return a record's bytes for a peer; raises KeyError where it is not here."""
        with self._lock:
            found = self._sizes.get(sha256, self._backed.get(sha256))
        if found is None:
            found = self._stored(sha256).by_sha256[sha256].bytes
        return found

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Return bytes of a record for a peer; raises KeyError where it is not here."""
        with self._lock:
            key = self._keys.get(sha256)
        if key is None and sha256 not in self._backed:
            return self._stored(sha256).read(sha256, offset, length)
        for directory in (self._backing, self._records):
            try:
                with (directory / sha256).open("rb") as stream:
                    return os.pread(stream.fileno(), length, offset)
            except FileNotFoundError:
                continue
        if key is None:
            raise KeyError(sha256)
        try:
            record = self.residency.packed_record if sha256 in self._packed else self.residency.record
            return record(key)[offset : offset + length]
        except RuntimeFault as error:
            raise KeyError(sha256) from error

    def _stored(self, sha256: str) -> Store:
        if self.store is None or sha256 not in self.store.by_sha256:
            raise KeyError(sha256)
        return self.store

    def _back(self, name: str, record: Record) -> None:
        """Write a backing copy, if budget and disk have room: without one a restart pulls again, no more."""
        if name in self._backed:
            return
        used = max(self._reserved, self.residency.used()["disk"]) + self.backing_bytes
        free = shutil.disk_usage(self._backing).free
        if used + len(record) > self._disk_budget or 2 * len(record) > free:
            return
        temporary = self._backing / f".{name}"
        try:
            temporary.write_bytes(record)
            with self._lock:
                temporary.replace(self._backing / name)
                self._backed[name] = len(record)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            log.warning("%s: no room for backing copies; a restart pulls from peers", self._backing)

    def _trim(self, allowed: int) -> None:
        with self._lock:
            while self._backed and self.backing_bytes > allowed:
                self._unback(next(reversed(self._backed)))

    def _unback(self, name: str) -> None:
        (self._backing / name).unlink(missing_ok=True)
        self._backed.pop(name, None)


def _is_intact(record: Record, sha256: str) -> bool:
    return hashlib.sha256(record).hexdigest() == sha256
