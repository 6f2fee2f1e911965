"""Waiting for experts of other nodes without keeping others waiting: the port of a worker's steps.

Decides when the turn is given up while an answer is awaited: at once where other sessions could use it, or another
piece of the same prompt, and otherwise only when the answer is late, since a lone session should not pay for a change
of threads. Must not know calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from agent.peers import PeerCaller, Pending
from agent.turns import Turn
from runtime.experts import ExpertCall


class Port:
    """An `ExpertCaller` of one worker thread, which has the turn whenever it computes.

    Parameters
    ----------
    is_wanted
        Whether there is something else to do now.
    """

    def __init__(self, caller: PeerCaller, turn: Turn, is_wanted: Callable[[], bool]) -> None:
        self._caller = caller
        self._turn = turn
        self._is_wanted = is_wanted
        self._has_turn = True
        caller.when_late = self._give

    def begin_step(self, is_cancelled: Callable[[], bool]) -> None:
        """Begin a step, with the turn."""
        self._caller.is_cancelled = is_cancelled

    def end_step(self) -> None:
        """End a step; calls that it leaves are forgotten."""
        self._caller.forget_all()

    def begin(self, call: ExpertCall) -> "Awaited":
        """Send a call and return at once."""
        return Awaited(self, self._caller.begin(call))

    def close(self) -> None:
        """Close this thread's connections."""
        self._caller.close()

    def result(self, pending: Pending) -> torch.Tensor:
        """Wait for an answer; have the turn again when it is there."""
        if self._is_wanted():
            self._give()
        try:
            return pending.result()
        finally:
            self._retake()

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Let others have the turn while a step waits for the one before it."""
        self._give()
        try:
            yield
        finally:
            self._retake()

    def _retake(self) -> None:
        if not self._has_turn:
            self._turn.take()
            self._has_turn = True

    def _give(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._turn.give()


class Awaited:
    """A call under way."""

    def __init__(self, port: Port, pending: Pending) -> None:
        self._port = port
        self._pending = pending

    def result(self) -> torch.Tensor:
        """Block until the answer is there; raises what the caller raises."""
        return self._port.result(self._pending)
