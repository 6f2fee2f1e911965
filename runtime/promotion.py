"""Loads that wait to be made, and the threads that make them: one job may be made by whoever needs it first.

Decides nothing about what is loaded. Threads begin when they are first needed and end when they have had nothing to do
for a while. Must not know what a load is.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

_IDLE_S: Final = 1.0


class Promoter:
    """A queue of jobs with up to `workers` threads. Thread-safe."""

    def __init__(self, perform: Callable[[Any], None], workers: int) -> None:
        self.workers = workers
        self._perform = perform
        self._jobs: deque[Any] = deque()
        self._added = threading.Condition(threading.Lock())
        self._running = 0
        self._idle = 0

    @property
    def waiting(self) -> int:
        """Jobs that nobody has begun."""
        return len(self._jobs)

    def add(self, jobs: Sequence[Any], *, wake: bool) -> None:
        """Add jobs; without `wake`, whoever needs them makes them."""
        if not jobs:
            return
        with self._added:
            self._jobs.extend(jobs)
            if not wake:
                return
            for _ in range(min(len(jobs) - self._idle, self.workers - self._running)):
                self._running += 1
                threading.Thread(target=self._work, name="loads", daemon=True).start()
            self._added.notify(len(jobs))

    def run(self, job: Any) -> bool:
        """Make a job in this thread unless somebody has begun it; returns whether it did."""
        with self._added:
            try:
                self._jobs.remove(job)
            except ValueError:
                return False
        self._perform(job)
        return True

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._perform(job)

    def _next(self) -> Any:
        with self._added:
            self._idle += 1
            try:
                if not self._jobs and not self._added.wait_for(lambda: bool(self._jobs), _IDLE_S):
                    self._running -= 1
                    return None
                return self._jobs.popleft()
            finally:
                self._idle -= 1
