"""Records on their way from host memory to a device that is apart, begun without waiting for them.

Decides nothing: a copy that was launched is complete for everything that is launched behind it on the device, so that
nobody waits but the device, and only for what it needs. The host memory that is copied from stays in use until the
device has come past, and what a load takes is learnt then. Must not know why something is loaded.
"""

import threading
from collections import deque
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from runtime.comebacks import Origin
from runtime.copies import Copy
from runtime.counters import TierCounts
from runtime.pool import SlotPool
from runtime.shelf import Shelf
from schemas.topology import Tier

if TYPE_CHECKING:
    from runtime.cuda.copies import DeviceCopies, Launch


class _UnderWay(NamedTuple):
    launch: "Launch"
    copy: Copy
    host: Copy
    began: float


class Launches:
    """The launches of one residency. Thread-safe.

    Parameters
    ----------
    shelf, changed, pools
        Of the residency: its books, their lock, and its slots.
    counts
        Takes what was read; None without a cache.
    """

    def __init__(
        self,
        shelf: Shelf,
        changed: threading.Condition,
        pools: Mapping[Tier, SlotPool],
        copies: "DeviceCopies",
        counts: TierCounts | None,
    ) -> None:
        self._shelf = shelf
        self._changed = changed
        self._pools = pools
        self._copies = copies
        self._counts = counts
        self._under_way: deque[_UnderWay] = deque()
        self._unpublished: dict[Copy, None] = {}

    def begin(self, copy: Copy) -> bool:
        """Begin to fill a copy; False, with nothing done, where its record is not in host memory. Modifies.

        Raises
        ------
        RuntimeError
            The device's. The copy is given up.
        """
        with self._changed:
            host = self._shelf.comebacks.in_host(copy.key)
            if host is None or len(copy.key) != 2:
                return False
            self._shelf.use(host)
        try:
            launch = self._copies.launch(self._pools[copy.tier], copy.slot, self._pools["host"], host.slot)
        except BaseException as error:
            with self._changed:
                self._shelf.end_use((host,))
                self._shelf.fail(copy, RuntimeError(str(error)))
            raise
        copy.found = "host"
        with self._changed:
            self._under_way.append(_UnderWay(launch, copy, host, perf_counter()))
            if self._counts is not None:
                self._counts.load(copy.key[0], len(self._pools["host"].whole(host.slot)))
            copy.launch = launch
            self._unpublished[copy] = None
        return True

    def publish(self, copy: Copy) -> bool:
        """Let a copy be used by all that comes behind now; False where it was not launched, or is out already."""
        with self._changed:
            launch, copy.launch = copy.launch, None
            self._unpublished.pop(copy, None)
        if launch is None:
            return False
        launch.follow()
        with self._changed:
            self._shelf.finish(copy)
        return True

    def publish_all(self, layer: int | None = None) -> None:
        """Let all be used that nobody has asked for, of a layer or of any: what was guessed wrong. Modifies."""
        with self._changed:
            copies = [copy for copy in self._unpublished if layer is None or copy.key[0] == layer]
        for copy in copies:
            self.publish(copy)

    def settle(self) -> None:
        """Give host memory back that the device has come past, and learn what that took. Modifies."""
        with self._changed:
            self.collect()

    def collect(self) -> None:
        """Do what `settle` does; the lock is held. Modifies."""
        while self._under_way and self._under_way[0].launch.is_over():
            launch, copy, host, began = self._under_way.popleft()
            seconds = launch.seconds()
            self._shelf.end_use((host,))
            self._shelf.slack.observe_load(seconds)
            self._shelf.comebacks.observe(Origin("host"), seconds)
            if copy.recorder is not None:
                about = f"layer {copy.key[0]} expert {copy.key[1]}"
                copy.recorder.add("loads", about, began, began + seconds, bytes=0, ahead=False)
