"""What the host does beside every step that a device runs: what is counted, and when.

Decides that what a layer chose is counted when there is time, at the latest when the step is over. Must not know who
brings what layers lack: `fetched` and `waited` do.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.cuda.bringing import Bringer
from runtime.cuda.runners import Runner
from runtime.cuda.table import SlotTable
from runtime.cuda.tally import Tally
from runtime.dispatch import Dispatcher


@dataclass(frozen=True)
class Beside:
    """What a step is followed with.

    Attributes
    ----------
    stamp
        Its number.
    pending
        Bookkeeping of steps before that can wait; modified.
    """

    bringer: Bringer
    table: SlotTable
    runner: Runner
    dispatcher: Dispatcher
    tally: Tally
    stamp: int
    first_layer: int
    looks_ahead: bool
    pending: deque[Callable[[], None]]


class Following(ABC):
    """Follows one step: `begin` · launch · `serve` each layer · `settle` · `close` · `finish`.

    Attributes
    ----------
    loads
        That layers waited for.
    """

    def __init__(self, beside: Beside) -> None:
        self._bringer = beside.bringer
        self._table = beside.table
        self._runner = beside.runner
        self._dispatcher = beside.dispatcher
        self._tally = beside.tally
        self._stamp = beside.stamp
        self._first = beside.first_layer
        self._looks_ahead = beside.looks_ahead
        self._pending = beside.pending
        self._layers, self._rows, self._top_k = beside.runner.buffers.slots.shape
        self._counting: deque[Callable[[], object]] = deque()
        self.loads = 0

    def begin(self) -> int:
        """Do what must be done before the step is launched; returns the number of its first spare. Modifies."""
        return 0

    @abstractmethod
    def serve(self, index: int) -> None:
        """Do what a layer that has chosen needs. Modifies."""

    @abstractmethod
    def settle(self) -> None:
        """Bring the books up to what the next step needs, when the last layer has chosen. Modifies."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the step does not need any more, or did not when it failed. Modifies."""

    def finish(self) -> None:
        """Count what has not been counted yet; the device may still run the step's end. Modifies."""
        while self._counting:
            self._counting.popleft()()

    def _note_loads(self, number: int, count: int, began: float) -> None:
        """Count loads that a layer waits for, and show them. Modifies."""
        self.loads += count
        timeline, residency = self._dispatcher.timeline, self._bringer.residency
        if timeline is not None and count:
            about = f"layer {number}: {count} experts"
            took = count * residency.slack.load_s
            timeline.add("loads", about, began, began + took, bytes=count * residency.layout.bytes)
