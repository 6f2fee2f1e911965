"""The state of one solve: best placement, best bound, clock; and its workers.

Decides when a solve is over and why. Must not know how placements and bounds are found.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

from planner.solvers.decomposition.arrays import (
    Floats,
    Incumbent,
    Outcome,
    PlacementArrays,
    Progress,
    Settings,
    Stop,
    gap_of,
)


class Run:
    """Best placement and bound so far, and the clock. `offer` and `prove` modify it."""

    def __init__(self, arrays: PlacementArrays, settings: Settings) -> None:
        self.arrays, self.settings = arrays, settings
        self.incumbent: Incumbent | None = None
        self.bound = 0.0  # every cost is non-negative
        self.history: list[Progress] = []
        self.is_interrupted = False
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit; 0 once interrupted."""
        return 0.0 if self.is_interrupted else max(0.0, self.settings.time_limit_s - self.seconds)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do or no time to do it."""
        return self.is_closed or self.seconds_left == 0 or self.bound == float("inf")

    @property
    def is_closed(self) -> bool:
        """Whether the gap that was asked for is reached."""
        return self.incumbent is not None and gap_of(self.incumbent.objective, self.bound) <= self.settings.gap

    @property
    def stop(self) -> Stop:
        """Why the solve is over, once it is."""
        if self.bound == float("inf"):
            return Stop.INFEASIBLE
        if self.is_closed:
            return Stop.GAP
        if self.is_interrupted:
            return Stop.INTERRUPTED
        return Stop.TIME if self.seconds_left == 0 else Stop.EXHAUSTED

    def offer(self, incumbent: Incumbent | None, phase: str) -> None:
        """Take a placement where it is the best so far."""
        if incumbent is not None and (self.incumbent is None or incumbent.objective < self.incumbent.objective):
            self.incumbent = incumbent
        self.note(phase)

    def prove(self, bound: float, phase: str) -> None:
        """Take a bound where it is the best so far; a bound cannot pass the best placement but by rounding."""
        if self.incumbent is not None:
            bound = min(bound, self.incumbent.objective)
        self.bound = max(self.bound, bound)
        self.note(phase)

    def note(self, phase: str) -> None:
        """Record and report the state."""
        objective = None if self.incumbent is None else self.incumbent.objective
        self.history.append(Progress(self.seconds, phase, objective, self.bound))
        report = self.settings.on_progress
        if report is not None and not report(self.history[-1], self.incumbent):
            self.is_interrupted = True

    def outcome(self, stop: Stop, memory_price: Floats) -> Outcome:
        """Freeze the state."""
        return Outcome(self.incumbent, self.bound, stop, tuple(self.history), memory_price)


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Yield a pool of `threads` (0: one per processor); BLAS keeps to one thread, as tiles are shared out already."""
    count = threads or os.cpu_count() or 1
    with threadpool_limits(limits=1, user_api="blas"):
        if count == 1:
            yield None
            return
        with ThreadPoolExecutor(count) as pool:
            yield pool
