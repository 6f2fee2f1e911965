"""Records brought from host memory into slots of a device, on a stream of their own.

Decides when a slot may be overwritten: when every kernel that was told to read it has run (`Fences`). What is brought
is complete when the copy's event is. Must not know which expert is brought, or for whom.
"""

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch

from runtime.pool import SlotPool
from schemas.precision import PackedLayout
from schemas.store import RecordLayout

_STAGING_SLOTS: Final = 2

Event = TypeVar("Event")


class Fences(Generic[Event]):
    """Which slots are read by kernels that may still run.

    Parameters
    ----------
    record
        Returns an event that comes after all kernels launched so far.
    wait
        Lets what is copied from now on wait for an event.
    """

    def __init__(self, record: Callable[[], Event], wait: Callable[[Event], None]) -> None:
        self._record = record
        self._wait = wait
        self._of: dict[int, Event] = {}
        self._of_all: Event | None = None

    def read(self, slots: Iterable[int]) -> None:
        """Note that kernels launched so far read these slots. Modifies."""
        slots = list(slots)
        if slots:
            self._of.update(dict.fromkeys(slots, self._record()))

    def read_all(self) -> None:
        """Note that kernels launched so far read any slot. Modifies."""
        self._of.clear()
        self._of_all = self._record()

    def claim(self, slot: int) -> None:
        """Let the copy that overwrites a slot wait for those who read it. Modifies."""
        if self._of_all is not None:
            self._wait(self._of_all)
            self._of_all = None  # later copies come behind this one
        event = self._of.pop(slot, None)
        if event is not None:
            self._wait(event)


class Launch(NamedTuple):
    """A copy that was begun.

    Attributes
    ----------
    follow
        Lets what is launched from now on wait for it, on the device.
    is_over, seconds
        Whether it is made, and what it took then.
    """

    follow: Callable[[], None]
    is_over: Callable[[], bool]
    seconds: Callable[[], float]


class DeviceCopies:
    """The copy stream of a device, with some pinned memory to stage what comes from elsewhere. Thread-safe."""

    def __init__(self, device: torch.device, layout: RecordLayout, *, packed: PackedLayout | None = None) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)  # not in one hardware queue with the kernels
        self.fences: Fences[Any] = Fences(self._recorded, self.stream.wait_event)
        self._copy = _driver_copy()
        self._device = device
        self._staging = SlotPool(layout, _STAGING_SLOTS, "host", device, packed=packed)
        self._free = list(range(_STAGING_SLOTS))
        self._changed = threading.Condition()

    def _recorded(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def enqueue(self, target: SlotPool, slot: int, source: SlotPool, source_slot: int) -> None:
        """Begin to copy a whole slot of pinned memory, which stays as it is until the stream has come past."""
        self.fences.claim(slot)
        size = target.stride
        self.send(target.address + slot * size, source.address + source_slot * size, size)

    def launch(self, target: SlotPool, slot: int, source: SlotPool, source_slot: int) -> Launch:
        """Begin to copy a whole slot of pinned memory, as `enqueue` does, so that others can come behind it."""
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self._changed:  # events and copy of one launch lie next to each other
            self.fences.claim(slot)
            begun.record(self.stream)
            self.enqueue(target, slot, source, source_slot)
            ended.record(self.stream)

        def follow() -> None:
            torch.cuda.current_stream(self._device).wait_event(ended)

        return Launch(follow, ended.query, lambda: 1e-3 * begun.elapsed_time(ended))

    def send(self, target: int, source: int, num_bytes: int, *, stream: int | None = None) -> None:
        """Begin to copy bytes between addresses: torch's own way takes four times as long to begin.

        Parameters
        ----------
        stream
            The driver's, on which they are copied; this one's by default.

        Raises
        ------
        RuntimeError
            CUDA's, which `is_device_fault`.
        """
        error = self._copy(target, source, num_bytes, self.stream.cuda_stream if stream is None else stream)
        if error:
            raise RuntimeError(f"CUDA error {error}: bytes cannot be copied to the device")

    def bring(self, target: SlotPool, slot: int, source: torch.Tensor) -> None:
        """Copy a whole slot, and return when it is there."""
        with torch.cuda.stream(self.stream):
            self.fences.claim(slot)
            target.whole(slot).copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        event.synchronize()

    @contextmanager
    def staged(self) -> Iterator[tuple[SlotPool, int]]:
        """Lend a pinned slot to read a record into."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free))
            slot = self._free.pop()
        try:
            yield self._staging, slot
        finally:
            with self._changed:
                self._free.append(slot)
                self._changed.notify()


class PlainCopies(DeviceCopies):
    """The same where the device is a processor that computes from slots of its own: copies are made at once."""

    def __init__(self, device: torch.device, layout: RecordLayout, *, packed: PackedLayout | None = None) -> None:
        self.fences: Fences[Any] = Fences(lambda: None, lambda _: None)
        self._staging = SlotPool(layout, _STAGING_SLOTS, "host", device, packed=packed)
        self._free = list(range(_STAGING_SLOTS))
        self._changed = threading.Condition()

    def enqueue(self, target: SlotPool, slot: int, source: SlotPool, source_slot: int) -> None:
        """Copy a whole slot."""
        target.whole(slot).copy_(source.whole(source_slot))

    def launch(self, target: SlotPool, slot: int, source: SlotPool, source_slot: int) -> Launch:
        """Copy a whole slot."""
        began = perf_counter()
        self.enqueue(target, slot, source, source_slot)
        seconds = perf_counter() - began
        return Launch(lambda: None, lambda: True, lambda: seconds)

    def bring(self, target: SlotPool, slot: int, source: torch.Tensor) -> None:
        """Copy a whole slot."""
        target.whole(slot).copy_(source)


def _driver_copy() -> Any:
    """Return the driver's asynchronous copy from host to device: (target, source, bytes, stream) -> error."""
    function = ctypes.CDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
    function.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function
