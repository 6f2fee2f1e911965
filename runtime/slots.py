"""Where a node keeps its replicas: device slots, host memory, record files; never more bytes than each tier may use.

Decides nothing about which expert belongs here: it holds what it is told to, or raises `OverBudget`. Flow: record →
slot (device), tensor (host) or file (disk) → `borrow` → weights for the expert maths. Bookkeeping under one lock.
"""

import hashlib
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import ExpertUnavailable, InvalidInput, OverBudget, RuntimeFault, writing
from runtime.tensors import torch_dtype
from schemas.store import RecordLayout
from schemas.topology import TIERS, Tier
from schemas.units import format_bytes

Key = tuple[int, int]
Record = bytes | bytearray | memoryview


class ExpertWeights(NamedTuple):
    """One expert's tensors, shaped as the layout's form says; views of the slot or record they lie in."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(slots=True)
class _Replica:
    """A replica in one tier. `users` borrow it; one dropped while borrowed is freed when the last user is done."""

    key: Key
    tier: Tier
    weights: ExpertWeights | None = None  # None: read from the file when used
    slot: int | None = None
    file: Path | None = None
    users: int = 0
    dropped: bool = False


class Borrowed(NamedTuple):
    """An expert in use and the tier it was found in."""

    weights: ExpertWeights
    tier: Tier


class Residency:
    """The replicas of one node. Thread-safe; every method says whether it modifies what is held.

    Parameters
    ----------
    budgets
        Bytes that experts may take per tier; a tier that is left out has none. The device pool of
        ``budgets["device"] // layout.bytes`` slots is reserved at once (its pages are used as slots are).
    record_dir
        Directory of the disk tier's record files, named by sha256. Needed if the disk budget is not 0.
    device
        Torch device of the slots.
    max_slots
        Slots to reserve at most: no model has more experts than it has, however large the budget.
    """

    def __init__(
        self,
        layout: RecordLayout,
        budgets: Mapping[Tier, int],
        record_dir: Path | None = None,
        *,
        device: str = "cpu",
        max_slots: int | None = None,
    ) -> None:
        self.layout = layout
        self.device = torch.device(device)
        self.budgets: dict[Tier, int] = {tier: budgets.get(tier, 0) for tier in TIERS}
        self._record_dir = record_dir
        self._dtype = torch_dtype(layout.dtype)
        self._lock = threading.Lock()
        self._replicas: dict[tuple[Key, Tier], _Replica] = {}
        self._fastest: dict[Key, _Replica] = {}
        self._used: Counter[Tier] = Counter()
        slots = self.budgets["device"] // layout.bytes
        slots = slots if max_slots is None else min(slots, max_slots)
        self._pool = self._make_pool(slots)
        self._free = list(range(slots - 1, -1, -1))

    def put(self, key: Key, tier: Tier, record: Record) -> None:
        """Hold a replica of `key` in `tier`; holding it there already changes nothing. Modifies.

        Raises
        ------
        OverBudget
            The tier has no room. Nothing changes.
        """
        if len(record) != self.layout.bytes:
            raise InvalidInput(
                f"layer {key[0]} expert {key[1]}: record of {len(record)} bytes, the layout says {self.layout.bytes}"
            )
        with self._lock:
            if (key, tier) in self._replicas:
                return
            replica = _Replica(key, tier, slot=self._reserve(tier))
        try:
            self._fill(replica, record)
        except BaseException:
            with self._lock:
                self._free_up(replica)
            raise
        with self._lock:
            if (key, tier) in self._replicas:  # another thread put it meanwhile
                self._free_up(replica)
                return
            self._replicas[key, tier] = replica
            self._choose_fastest(key)

    def drop(self, key: Key, tier: Tier | None = None) -> None:
        """Stop holding `key` in `tier` (everywhere by default); what is not held is no error. Modifies.

        A replica in use is freed, and counted by `used`, until its last user is done.
        """
        with self._lock:
            for each in TIERS if tier is None else (tier,):
                replica = self._replicas.pop((key, each), None)
                if replica is not None:
                    replica.dropped = True
                    if not replica.users:
                        self._free_up(replica)
            self._choose_fastest(key)

    @contextmanager
    def borrow(self, layer: int, experts: Sequence[int]) -> Iterator[list[Borrowed]]:
        """Lend weights of experts of one layer, from the fastest tier; they stay valid inside. Does not modify.

        Raises
        ------
        ExpertUnavailable
            One of them is not held.
        """
        replicas: list[_Replica] = []
        try:
            with self._lock:
                for expert in experts:
                    replica = self._fastest.get((layer, expert))
                    if replica is None:
                        raise ExpertUnavailable(layer, expert, "this node")
                    replica.users += 1
                    replicas.append(replica)
            yield [Borrowed(replica.weights or self._read(replica), replica.tier) for replica in replicas]
        finally:
            with self._lock:
                for replica in replicas:
                    replica.users -= 1
                    if replica.dropped and not replica.users:
                        self._free_up(replica)

    def acquire(self, key: Key) -> ExpertWeights:
        """Return a copy of an expert's weights that stays valid whatever is dropped later. Does not modify."""
        with self.borrow(key[0], [key[1]]) as (borrowed,):
            gate_up, down, *biases = borrowed.weights
            copies = [None if bias is None else bias.clone() for bias in biases]
            return ExpertWeights(gate_up.clone(), down.clone(), *copies)

    def record(self, key: Key) -> bytes:
        """Return the record of a held expert, as it was put, for a peer that pulls it. Does not modify."""
        with self.borrow(key[0], [key[1]]) as (borrowed,):
            by_name = _by_name(borrowed.weights)
            parts = (by_name[part.name] for part in self.layout.parts)
            return b"".join(part.contiguous().cpu().view(torch.uint8).numpy().tobytes() for part in parts)

    def holds(self, key: Key) -> bool:
        """Whether `key` is held in any tier."""
        return key in self._fastest

    def tier_of(self, key: Key) -> Tier | None:
        """Return the fastest tier that holds `key`; None if none does."""
        replica = self._fastest.get(key)
        return None if replica is None else replica.tier

    def at_hand(self, layer: int, experts: int) -> NDArray[np.bool_]:
        """Whether each expert of a layer can be computed without reading its record first, bool [E]."""
        found = (self._fastest.get((layer, expert)) for expert in range(experts))
        return np.array([replica is not None and replica.tier != "disk" for replica in found])

    def held(self) -> dict[Tier, list[Key]]:
        """Return the sorted keys held in each tier."""
        with self._lock:
            keys = sorted(self._replicas)
        return {tier: [key for key, where in keys if where == tier] for tier in TIERS}

    def used(self) -> dict[Tier, int]:
        """Return the bytes taken in each tier, of dropped replicas still in use too."""
        with self._lock:
            return {tier: self._used[tier] for tier in TIERS}

    def _make_pool(self, slots: int) -> list[torch.Tensor]:
        """Return one tensor per part of the layout, [slots, *shape]."""
        try:
            return [
                torch.empty((slots, *part.shape), dtype=self._dtype, device=self.device) for part in self.layout.parts
            ]
        except (RuntimeError, MemoryError) as error:
            size = format_bytes(slots * self.layout.bytes)
            raise RuntimeFault(
                f"device tier: {size} cannot be reserved on {self.device}; lower memory.device of this node"
            ) from error

    def _reserve(self, tier: Tier) -> int | None:
        """Account for one more record in `tier`; return its slot on the device."""
        used, budget = self._used[tier], self.budgets[tier]
        if used + self.layout.bytes > budget or (tier == "device" and not self._free):
            raise OverBudget(tier, needed=self.layout.bytes, used=used, budget=budget)
        self._used[tier] += self.layout.bytes
        return self._free.pop() if tier == "device" else None

    def _free_up(self, replica: _Replica) -> None:
        self._used[replica.tier] -= self.layout.bytes
        if replica.slot is not None:
            self._free.append(replica.slot)
        if replica.file is not None and not self._file_is_shared(replica):
            replica.file.unlink(missing_ok=True)

    def _file_is_shared(self, replica: _Replica) -> bool:
        """Whether another replica's record has the same content."""
        return any(other.file == replica.file for other in self._replicas.values() if other is not replica)

    def _choose_fastest(self, key: Key) -> None:
        held = [self._replicas[key, tier] for tier in TIERS if (key, tier) in self._replicas]
        if held:
            self._fastest[key] = held[0]
        else:
            self._fastest.pop(key, None)

    def _fill(self, replica: _Replica, record: Record) -> None:
        match replica.tier:
            case "device":
                pooled = [pool[replica.slot] for pool in self._pool]
                for part, staged in zip(pooled, self._views(_staged(record)), strict=True):
                    part.copy_(staged)
                replica.weights = self._weights(pooled)
            case "host":
                replica.weights = self._weights(self._views(_staged(record)))
            case "disk":
                replica.file = self._write(record)

    def _views(self, record: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of a record held as bytes."""
        elements = record.view(self._dtype)
        size = elements.element_size()
        starts = [part.offset // size for part in self.layout.parts]
        return [
            elements[start : start + part.elements].view(part.shape)
            for start, part in zip(starts, self.layout.parts, strict=True)
        ]

    def _weights(self, tensors: Sequence[torch.Tensor]) -> ExpertWeights:
        named = dict(zip((part.name for part in self.layout.parts), tensors, strict=True))
        bias, down_bias = named.get("gate_up_proj_bias"), named.get("down_proj_bias")
        return ExpertWeights(named["gate_up_proj"], named["down_proj"], bias, down_bias)

    def _write(self, record: Record) -> Path:
        if self._record_dir is None:
            raise InvalidInput("the disk tier has a budget but no directory for its records; name one")
        file = self._record_dir / hashlib.sha256(record).hexdigest()
        if file.is_file() and file.stat().st_size == len(record):
            return file
        with writing(file, needed=len(record)):
            self._record_dir.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._record_dir, prefix=".record.")
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(record)
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(name).replace(file)
            except BaseException:
                Path(name).unlink()
                raise
        return file

    def _read(self, replica: _Replica) -> ExpertWeights:
        layer, expert = replica.key
        if replica.file is None:
            raise ExpertUnavailable(layer, expert, "this node")
        try:
            data = np.fromfile(replica.file, dtype=np.uint8)
        except OSError as error:
            raise RuntimeFault(f"layer {layer} expert {expert}: {replica.file}: {error.strerror}") from error
        if data.size != self.layout.bytes:
            raise RuntimeFault(
                f"layer {layer} expert {expert}: {replica.file} has {data.size} bytes, the layout says "
                f"{self.layout.bytes}; apply the plan again to fetch it anew"
            )
        parts = self._views(torch.from_numpy(data))
        return self._weights([part.to(self.device) for part in parts])


def _staged(record: Record) -> torch.Tensor:
    """Copy a record into memory of torch's own alignment."""
    staged = torch.empty(len(record), dtype=torch.uint8)
    staged.numpy()[:] = np.frombuffer(record, dtype=np.uint8)
    return staged


def _by_name(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    named = {
        "gate_up_proj": weights.gate_up,
        "down_proj": weights.down,
        "gate_up_proj_bias": weights.gate_up_bias,
        "down_proj_bias": weights.down_bias,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}
