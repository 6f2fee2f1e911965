"""Spans as a file for trace viewers."""

import json
import threading

from runtime.timeline import Process, Several, Timeline, recorded, recorder, trace_document, write_trace


def test_spans_of_a_track_never_overlap_and_processes_share_one_clock(tmp_path):
    here, there = Timeline(), Timeline()
    here.add("steps", "one", 10.0, 12.0, rows=3)
    here.add("steps", "two", 11.0, 13.0)
    here.add("steps", "three", 12.0, 14.0)
    there.add("loads", "late", 111.5, 112.5)
    document = trace_document([Process("a", here.spans()), Process("b", there.spans(), ahead_s=100.0)])
    write_trace(tmp_path / "trace.json", [Process("a", here.spans())])
    assert json.loads((tmp_path / "trace.json").read_text())["displayTimeUnit"] == "ms"
    spans = {e["name"]: e for e in document["traceEvents"] if e["ph"] == "X"}
    assert spans["one"]["ts"] == 0
    assert spans["one"]["args"] == {"rows": 3}
    assert spans["one"]["tid"] == spans["three"]["tid"] != spans["two"]["tid"]
    assert (spans["late"]["pid"], spans["late"]["ts"], spans["late"]["dur"]) == (2, 1.5e6, 1e6)
    names = [e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M"]
    assert names == ["a", "steps", "steps 2", "b", "loads"]
    assert trace_document([])["traceEvents"] == []


def test_spans_go_to_whoever_asked_in_that_thread():
    one, other = Timeline(limit=1), Timeline()
    with recorded(Several([one, other])):
        recorder().add("steps", "x", 0.0, 1.0)
        recorder().add("steps", "y", 0.0, 1.0)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(recorder()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert recorder() is None
    assert ([span.name for span in one.spans()], one.missed) == (["x"], 1)
    assert [span.name for span in other.spans()] == ["x", "y"]
