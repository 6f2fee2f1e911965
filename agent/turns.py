"""Whose turn it is: one thread at a time receives, computes and sends; the others wait for an answer or for the turn.

Decides who gets the turn next: threads that have something to go on with, in the order in which they asked, before
those that would merely wait for messages, and those before the one that may only listen. It is handed over, never raced
for. Must not know what is done with it.
"""

import threading
from collections import deque
from collections.abc import Callable


class Turn:
    """A lock that is handed from thread to thread.

    Parameters
    ----------
    wake
        Called when somebody asks for the turn while another has it, who may be waiting for messages.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._mutex = threading.Lock()
        self._is_taken = False
        self._asking: deque[threading.Lock] = deque()
        self._idle: deque[threading.Lock] = deque()
        self._listeners: deque[threading.Lock] = deque()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody asks for it who has something to go on with."""
        return bool(self._asking)

    @property
    def is_better_placed(self) -> bool:
        """Whether a listener should give it to somebody else."""
        return bool(self._asking or self._idle)

    def take(self) -> None:
        """Wait for the turn, before all that are idle."""
        with self._mutex:
            if not self._is_taken:
                self._is_taken = True
                return
            gate = _closed_gate()
            self._asking.append(gate)
        self._wake()
        gate.acquire()

    def take_when_free(self, timeout_s: float) -> bool:
        """Wait until nobody else wants the turn; False when time is up first."""
        return self._take_from(self._idle, timeout_s)

    def listen_when_free(self, timeout_s: float) -> bool:
        """Wait until nobody wants the turn and nobody is idle; False when time is up first."""
        return self._take_from(self._listeners, timeout_s)

    def _take_from(self, line: deque[threading.Lock], timeout_s: float) -> bool:
        with self._mutex:
            if not self._is_taken:
                self._is_taken = True
                return True
            gate = _closed_gate()
            line.append(gate)
        if gate.acquire(timeout=timeout_s):
            return True
        with self._mutex:
            if gate in line:
                line.remove(gate)
                return False
        return True  # it was handed over just now

    def give(self) -> None:
        """Hand the turn to whoever is next, the idle thread that ran last if nobody asks."""
        with self._mutex:
            if self._asking:
                self._asking.popleft().release()
            elif self._idle:
                self._idle.pop().release()
            elif self._listeners:
                self._listeners.pop().release()
            else:
                self._is_taken = False


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate
