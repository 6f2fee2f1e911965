"""What happened when while a request was answered, as a file that trace viewers open (Chrome's trace event format).

Decides how spans are named and laid out: a process for every node, a track for every kind of span, more of them where
spans overlap. Times come from whoever measures; ui.perfetto.dev and chrome://tracing show the file. Nothing is noted,
and nothing costs, where `recorded` was not entered. Must not know what the spans mean.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from schemas.files import write_atomic


class Span(NamedTuple):
    """Something that took from `began` to `ended`, `time.perf_counter` seconds, and figures `about` it."""

    track: str
    name: str
    began: float
    ended: float
    about: Mapping[str, Any]


class Recorder(Protocol):
    """Takes spans of several threads."""

    def add(self, track: str, name: str, began: float, ended: float, **about: Any) -> None:
        """Add a span. Modifies."""


class Timeline:
    """Spans of several threads. Thread-safe.

    Parameters
    ----------
    limit
        The most spans that are kept; none is left out if None.

    Attributes
    ----------
    missed
        Spans that were left out.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.missed = 0
        self._limit = limit
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, track: str, name: str, began: float, ended: float, **about: Any) -> None:
        """Add a span; `began` and `ended` are `time.perf_counter` seconds. Modifies."""
        with self._lock:
            if self._limit is None or len(self._spans) < self._limit:
                self._spans.append(Span(track, name, began, ended, about))
            else:
                self.missed += 1

    def spans(self) -> list[Span]:
        """Return the spans so far. Does not modify."""
        with self._lock:
            return list(self._spans)


class Several:
    """Hands every span to several recorders."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = recorders

    def add(self, track: str, name: str, began: float, ended: float, **about: Any) -> None:
        """Add a span to each. Modifies them."""
        for recorder in self._recorders:
            recorder.add(track, name, began, ended, **about)


_RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def recorder() -> Recorder | None:
    """Return what takes the spans of this thread's work, None where nobody wants them."""
    return _RECORDER.get()


@contextmanager
def recorded(into: Recorder) -> Iterator[None]:
    """Hand the spans of this thread's work, and of loads that it begins, to `into` meanwhile."""
    token = _RECORDER.set(into)
    try:
        yield
    finally:
        _RECORDER.reset(token)


@dataclass(frozen=True)
class Process:
    """The spans of one node. `ahead_s` is how much its clock is ahead of the first node's."""

    name: str
    spans: Sequence[Span]
    ahead_s: float = 0.0


def trace_document(processes: Sequence[Process]) -> dict[str, Any]:
    """Return the trace: a row of tracks for each process, times in µs from the first span on."""
    starts = [span.began - each.ahead_s for each in processes for span in each.spans]
    origin = min(starts, default=0.0)
    events: list[dict[str, Any]] = []
    for number, each in enumerate(processes, start=1):
        if each.name:
            events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": each.name}})
        events += _events(number, each.spans, origin + each.ahead_s)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(process: int, spans: Iterable[Span], origin: float) -> list[dict[str, Any]]:
    """Return the spans of one process, no two of a track at the same time: viewers would nest them."""
    tracks: dict[tuple[str, int], int] = {}
    ends: dict[tuple[str, int], float] = {}
    events: list[dict[str, Any]] = []
    for track, name, began, ended, about in sorted(spans, key=lambda span: span.began):
        lane = next(lane for lane in range(len(ends) + 1) if ends.get((track, lane), began) <= began)
        ends[track, lane] = ended
        if (track, lane) not in tracks:
            tracks[track, lane] = len(tracks) + 1
            label = f"{track} {lane + 1}" if lane else track
            thread = {"pid": process, "tid": tracks[track, lane], "args": {"name": label}}
            events.append({"ph": "M", "name": "thread_name", **thread})
        when = {"ts": 1e6 * (began - origin), "dur": 1e6 * (ended - began)}
        events.append(
            {"ph": "X", "name": name, "pid": process, "tid": tracks[track, lane], **when, "args": dict(about)}
        )
    return events


def write_trace(file: Path, processes: Sequence[Process]) -> None:
    """Write the trace whole or not at all; raises `CannotWrite`."""
    write_atomic(file, json.dumps(trace_document(processes)))
