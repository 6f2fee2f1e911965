"""How far a step has come through the layers, so that the next step of its session may follow before it has ended.

Decides what a step waits for: in each layer for the keys and values of the step before it, and at the end for that step
itself. A step that fails fails those behind it, since what they would read is not there. Must not know caches or
threads: what is done while a step waits is the caller's (`Rest`).
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from runtime.errors import StepAbandoned

Rest = Callable[[], AbstractContextManager[object]]
"""Makes what is entered while a step waits for another one of its session, and left before it goes on."""

_ALL: Final = 1 << 30


class Passage:
    """One step's way through the layers of a segment. Thread-safe."""

    def __init__(self) -> None:
        self._written = 0  # layers whose keys and values are in the session's cache
        self._has_failed = False
        self._changed = threading.Condition()

    def wrote(self, layer: int) -> None:
        """Note that the keys and values of a layer, counted in the segment, are in the cache. Modifies."""
        with self._changed:
            self._written = layer + 1
            self._changed.notify_all()

    def end(self, *, failed: bool) -> None:
        """Note that the step is over. Modifies."""
        with self._changed:
            self._written, self._has_failed = _ALL, failed
            self._changed.notify_all()

    def await_layer(self, layer: int, rest: Rest) -> None:
        """Wait until a layer is written; raises `StepAbandoned` if the step fails before."""
        if self._written <= layer:
            with rest(), self._changed:
                self._changed.wait_for(lambda: self._written > layer)
        if self._has_failed:
            raise StepAbandoned()

    def await_end(self, rest: Rest) -> None:
        """Wait until the step is over; raises `StepAbandoned` if it fails."""
        self.await_layer(_ALL - 1, rest)


def passed() -> Passage:
    """Return what stands before a session's first step: it is over."""
    passage = Passage()
    passage.end(failed=False)
    return passage
