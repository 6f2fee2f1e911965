"""Slots for records: memory of one tier, taken as slots are used and given back to the system when it must be.

Decides where the parts of a record lie in a slot: each at a multiple of 64 bytes, so that the bits of a product do not
depend on which slot it is. Must not know which expert is where.
"""

import mmap
import weakref
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch

from runtime.errors import RuntimeFault
from runtime.precision import empty_parts, unpack_parts
from runtime.records import scatter
from runtime.tensors import torch_dtype
from schemas.model import DTYPE_ITEMSIZE
from schemas.precision import PackedLayout
from schemas.store import RecordLayout
from schemas.topology import Tier
from schemas.units import format_bytes

_ALIGNMENT: Final = 64


class ExpertWeights(NamedTuple):
    """One expert's tensors, shaped as the layout's form says; views of the slot or record they lie in."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def copied(self, device: torch.device | None = None) -> "ExpertWeights":
        """Return the same in memory of their own, on that device where one is given."""
        gate_up, down, *biases = self
        copies = [None if bias is None else bias.to(device, copy=True) for bias in biases]
        return ExpertWeights(gate_up.to(device, copy=True), down.to(device, copy=True), *copies)


class SlotPool:
    """`slots` equal slots. Knows nothing of who uses which; may be used from several threads, a slot by one at a time.

    Parameters
    ----------
    packed
        How a slot holds a record, where not as weights: these are then made whenever they are asked for.

    Attributes
    ----------
    slots, stride, address
        How many there are, the bytes from one to the next, and where the first begins.

    Raises
    ------
    RuntimeFault
        So much memory cannot be reserved.
    """

    def __init__(
        self, layout: RecordLayout, slots: int, tier: Tier, device: torch.device, *, packed: PackedLayout | None = None
    ) -> None:
        self.slots = slots
        self._layout = layout
        self._packed = packed
        self._dtype = torch_dtype(layout.dtype)
        weights = [part.elements * DTYPE_ITEMSIZE[layout.dtype] for part in layout.parts]
        self._sizes = weights if packed is None else [packed.bytes]
        self._starts = _aligned_starts(self._sizes)
        self._stride = _aligned(self._starts[-1] + self._sizes[-1])
        self._map: mmap.mmap | None = None
        self._unpin: weakref.finalize[Any, SlotPool] | None = None
        try:
            self._bytes = self._reserve(slots * self._stride, tier, device)
        except (RuntimeError, MemoryError, OSError, ValueError, OverflowError) as error:
            raise RuntimeFault(
                f"{tier} tier: {format_bytes(slots * self._stride)} cannot be reserved on {device}; "
                f"lower memory.{tier} of this node"
            ) from error
        self.stride, self.address = self._stride, self._bytes.data_ptr()
        self._weights: dict[int, ExpertWeights] = {}

    def _reserve(self, size: int, tier: Tier, device: torch.device) -> torch.Tensor:
        if tier == "device" and device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=device)
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        if device.type == "cuda":
            self._pin(memory)
        return memory

    def _pin(self, memory: torch.Tensor) -> None:
        """Pin a map: torch's own pinned memory would come in powers of two."""
        cudart = torch.cuda.cudart()
        error = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(error) != 0:
            raise RuntimeError(f"host memory cannot be pinned: {error}")
        # the same addresses may be mapped again later, and be pinned then
        self._unpin = weakref.finalize(self, cudart.cudaHostUnregister, memory.data_ptr())

    def weights(self, slot: int) -> ExpertWeights:
        """Return the views of a slot's parts; of a packed one, weights in memory of their own."""
        if self._packed is not None:
            start = slot * self._stride
            parts = empty_parts(self._layout, self._bytes.device)
            unpack_parts(self._bytes[start : start + self._packed.bytes], self._packed, parts)
            return as_weights(self._layout, parts)
        found = self._weights.get(slot)
        if found is None:
            found = self._weights[slot] = as_weights(self._layout, self._parts(slot))
        return found

    def _parts(self, slot: int) -> list[torch.Tensor]:
        base = slot * self._stride
        return [
            self._bytes[base + start : base + start + size].view(self._dtype).view(part.shape)
            for start, size, part in zip(self._starts, self._sizes, self._layout.parts, strict=True)
        ]

    def buffers(self, slot: int) -> list[memoryview]:
        """Return the parts of a slot as bytes that can be written; of pools in ordinary memory."""
        base = slot * self._stride
        memory: Any = self._map if self._map is not None else self._bytes.numpy()
        whole = memoryview(memory)
        return [whole[base + a : base + a + size] for a, size in zip(self._starts, self._sizes, strict=True)]

    def fill(self, slot: int, record: bytes | bytearray | memoryview) -> None:
        """Copy a record into a slot. Modifies."""
        if self._bytes.device.type == "cpu":
            scatter(record, self.buffers(slot))
            return
        staged = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        self.fill_from(slot, torch.split(staged, self._sizes))

    def fill_from(self, slot: int, parts: Sequence[torch.Tensor]) -> None:
        """Copy parts, held as bytes, into a slot of a device. Modifies."""
        base = slot * self._stride
        for start, size, part in zip(self._starts, self._sizes, parts, strict=True):
            self._bytes[base + start : base + start + size].copy_(part.view(-1).view(torch.uint8))

    def record(self, slot: int) -> bytes:
        """Return the packed record that a slot holds; of pools of packed records."""
        start, size = slot * self._stride, self._sizes[0]
        return bytes(self._bytes[start : start + size].cpu().numpy().tobytes())

    def whole(self, slot: int) -> torch.Tensor:
        """Return all bytes of a slot, the gaps between its parts too; alike in every pool of a layout."""
        return self._bytes[slot * self._stride : (slot + 1) * self._stride]

    def lanes(self) -> tuple[torch.Tensor, int, list[int]]:
        """Return all slots as one vector of weights, the weights from slot to slot, and where parts begin in one."""
        size = self._dtype.itemsize
        return self._bytes.view(self._dtype), self._stride // size, [start // size for start in self._starts]

    def give_back(self, slot: int) -> None:
        """Let the system have the pages of a slot that is not used. Modifies."""
        if self._map is None or self._unpin is not None:
            return
        first = -(-slot * self._stride // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (slot + 1) * self._stride // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def vacate(self) -> None:
        """Give all memory back, of slots that nobody uses, nor will, whoever still knows the pool. Modifies."""
        self.slots = 0
        self._weights.clear()
        if self._unpin is not None:
            self._unpin()
        self._bytes, self._map = torch.empty(0, dtype=torch.uint8, device=self._bytes.device), None


def as_weights(layout: RecordLayout, tensors: Sequence[torch.Tensor]) -> ExpertWeights:
    """Name the parts of a record."""
    named = dict(zip((part.name for part in layout.parts), tensors, strict=True))
    bias, down_bias = named.get("gate_up_proj_bias"), named.get("down_proj_bias")
    return ExpertWeights(named["gate_up_proj"], named["down_proj"], bias, down_bias)


def record_of(layout: RecordLayout, weights: ExpertWeights) -> bytes:
    """Return the record that weights came from."""
    by_name = {
        "gate_up_proj": weights.gate_up,
        "down_proj": weights.down,
        "gate_up_proj_bias": weights.gate_up_bias,
        "down_proj_bias": weights.down_bias,
    }
    parts = [tensor for part in layout.parts if (tensor := by_name[part.name]) is not None]
    return b"".join(part.contiguous().cpu().view(torch.uint8).numpy().tobytes() for part in parts)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned_starts(sizes: Sequence[int]) -> list[int]:
    starts, start = [], 0
    for size in sizes:
        starts.append(start)
        start = _aligned(start + size)
    return starts
