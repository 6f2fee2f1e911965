"""Runs a solver in a child process of its own, under our own clock.

Solvers do not always keep their time limits and cannot always be interrupted, so the child streams its incumbents and
bounds; when its time is over it is killed with all that it started, and the last of them are the result.
Decides when a child has had its time. Must not know what a placement means.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Final, assert_never

from planner.objective import ObjectiveName
from planner.problem import Bools, Problem
from planner.solvers.base import (
    Bound,
    Incumbent,
    Progress,
    Result,
    SolveLimits,
    SolveStatus,
    StopReason,
    relative_gap,
    with_status,
)
from planner.solvers.choose import find_solver

_START_S: Final = 60.0  # a child that has not imported its solver by then never will
_GRACE_S: Final = 1.0  # what a solver may take beyond its limit to hand over what it has
_PARENT_POLL_S: Final = 0.2


@dataclass(frozen=True, eq=False)
class Job:
    """What a child is to do."""

    problem: Problem
    solver: str
    objective: ObjectiveName
    limits: SolveLimits


@dataclass(frozen=True)
class Standing:
    """How far a running solver has come: figures of the real objective, None where not known yet."""

    seconds: float
    incumbent: float | None
    bound: float | None

    @property
    def gap(self) -> float | None:
        """Relative distance between the two."""
        return relative_gap(self.incumbent, self.bound)


Watch = Callable[[Standing], None]


@dataclass(frozen=True)
class _Started:
    """The child has imported its solver; its time runs from here."""


def solve_in_child(job: Job, watch: Watch | None = None) -> Result:
    """Run a job in a child process, which is dead when this returns or raises."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(theirs, job), name=f"planner-{job.solver}")
    follower = _Follower(job, ours, watch)
    try:
        with _interrupts_held():  # the child, which inherits that, is killed by us and never by Ctrl-C
            child.start()
        theirs.close()
        return follower.follow()
    finally:
        if child.pid is not None:
            _kill(child.pid)
            child.join()
        ours.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until this is over."""
    resource_tracker.ensure_running()  # to start it would let interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(pid: int) -> None:
    """Kill a child and whatever it started; it leads a process group of its own, or has not come that far."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone already; a zombie on some systems
            continue


class _Follower:
    """Follows a child until it hands over its result, its time is over, or it dies; keeps the best it has said."""

    def __init__(self, job: Job, pipe: Connection, watch: Watch | None) -> None:
        self._job, self._pipe, self._watch = job, pipe, watch
        self._start = time.monotonic()
        self._deadline = self._start + _START_S
        self._placed: Bools | None = None
        self._value: float | None = None
        self._bound: float | None = None

    def follow(self) -> Result:
        """Wait for the result. Modifies the follower."""
        while self._pipe.poll(max(self._deadline - time.monotonic(), 0.0)):
            try:
                message: _Started | Progress | Result = self._pipe.recv()
            except EOFError:
                return self._so_far(StopReason.FAILED, "its process died")
            if isinstance(message, Result):
                return replace(message, seconds=time.monotonic() - self._start)
            self._take(message)
        return self._so_far(StopReason.TIME, "killed at its time limit")

    def _take(self, message: _Started | Progress) -> None:
        match message:
            case _Started():
                self._deadline = time.monotonic() + self._job.limits.time_s + _GRACE_S
                return
            case Incumbent():
                if self._value is None or message.value < self._value:
                    self._placed, self._value = message.placed, message.value
            case Bound():
                self._bound = message.value if self._bound is None else max(self._bound, message.value)
            case _:
                assert_never(message)
        if self._watch is not None:
            self._watch(Standing(time.monotonic() - self._start, self._value, self._bound))

    def _so_far(self, reason: StopReason, detail: str) -> Result:
        result = Result(
            solver=self._job.solver,
            status=SolveStatus.UNKNOWN,
            stop_reason=reason,
            seconds=time.monotonic() - self._start,
            placed=self._placed,
            objective=self._value,
            bound=self._bound,
            detail=detail,
        )
        return with_status(result, self._job.limits.gap)


def _work(pipe: Connection, job: Job) -> None:
    """Solve, sending everything through the pipe; leads its own process group and ends with its parent."""
    os.setsid()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    run = find_solver(job.solver)
    pipe.send(_Started())
    pipe.send(run(job.problem, objective=job.objective, limits=job.limits, report=pipe.send))
    pipe.close()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.killpg(0, signal.SIGKILL)
