"""What happened when while a request was answered, as a file that trace viewers open (Chrome's trace event format).

Decides how spans are named. Times come from whoever measures; ui.perfetto.dev and chrome://tracing show the file. Must
not know what the spans mean.
"""

import json
import threading
from pathlib import Path
from typing import Any

from runtime.errors import writing


class Timeline:
    """Spans of several threads. Thread-safe."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, str, float, float, dict[str, Any]]] = []
        self._lock = threading.Lock()

    def add(self, track: str, name: str, began: float, ended: float, **about: Any) -> None:
        """Add a span; `began` and `ended` are `time.perf_counter` seconds. Modifies."""
        with self._lock:
            self._spans.append((track, name, began, ended, about))

    def document(self) -> dict[str, Any]:
        """Return the trace: one track a kind, times in µs from the first span on."""
        with self._lock:
            spans = sorted(self._spans, key=lambda span: span[2])
        tracks = {name: number for number, name in enumerate(dict.fromkeys(span[0] for span in spans), start=1)}
        origin = spans[0][2] if spans else 0.0
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
            for name, number in tracks.items()
        ]
        for track, name, began, ended, about in spans:
            start, duration = 1e6 * (began - origin), 1e6 * (ended - began)
            events.append(
                {"ph": "X", "name": name, "pid": 1, "tid": tracks[track], "ts": start, "dur": duration, "args": about}
            )
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def write(self, file: Path) -> None:
        """Write the trace; raises `DiskFull` or `InvalidInput`."""
        text = json.dumps(self.document())
        with writing(file, needed=len(text)):
            file.write_text(text, encoding="utf-8")
