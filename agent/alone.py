"""`agent generate --local`: one process, no cluster; a model that may be larger than the memory it is given.

Decides nothing: `runtime.alone` loads, `runtime.engine` generates. Must not know sockets.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.client import Answer
from runtime.alone import Alone
from runtime.loading import load_tokenizer
from runtime.models import open_model
from runtime.reads import ReadWay
from runtime.sampling import Sampling
from runtime.text import TextStream
from runtime.timeline import Process, Timeline, recorded, write_trace
from schemas.messages import Finished
from schemas.precision import Precision
from schemas.units import format_bytes


def stream_alone(
    model: Path,
    answer: Answer,
    *,
    prompt: str,
    max_tokens: int,
    device: str = "cpu",
    budget: int | None = None,
    host_budget: int | None = None,
    precision: Precision = "checkpoint",
    eviction: str = "rates",
    predictor: Path | None = None,
    uses: Path | None = None,
    reads: ReadWay = "cached",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    combine: Any = "partial",
    trace_file: Path | None = None,
) -> Iterator[str]:
    """Yield pieces of text, filling `answer` meanwhile; its `note` tells what was loaded."""
    tokenizer = load_tokenizer(open_model(model).config_dir)
    ids = tokenizer(prompt)["input_ids"]
    alone = Alone(
        model,
        device=device,
        budget=budget,
        host_budget=host_budget,
        max_tokens=len(ids) + max_tokens,
        precision=precision,
        eviction=eviction,
        predictor=predictor,
        uses=uses,
        reads=reads,
    )
    timeline = Timeline()
    text, began, first = TextStream(tokenizer), time.monotonic(), 0.0
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    tokens = alone.generate(ids, max_tokens=max_tokens, sampling=sampling, combine=combine)
    for token in tokens if trace_file is None else _recorded(tokens, timeline):
        first = first or time.monotonic()
        answer.tokens.append(token)
        piece = text.push(token)
        answer.text += piece
        yield piece
    if trace_file is not None:
        write_trace(trace_file, [Process("", timeline.spans())])
    rest = text.end()
    answer.text += rest
    answer.note = _note(alone, precision)
    stopped = answer.tokens[-1] in alone.segment.trunk.stop_ids
    answer.finished = Finished(
        request="local",
        text=rest,
        reason="stop" if stopped else "length",
        prompt_tokens=len(ids),
        tokens=len(answer.tokens),
        seconds=time.monotonic() - began,
        prefill_s=first - began,
    )
    yield rest


def _recorded(tokens: Iterator[int], timeline: Timeline) -> Iterator[int]:
    """Yield tokens; what happens while they are made is noted."""
    while True:
        with recorded(timeline):
            token = next(tokens, None)
        if token is None:
            return
        yield token


def _note(alone: Alone, precision: Precision) -> dict[str, Any]:
    """Tell what was executed where, and what the cache did."""
    segment = alone.segment
    residency, counts = segment.residency, segment.residency.counts
    spec, packed = segment.trunk.spec, residency.packed
    each = spec.expert_bytes if packed is None else packed.bytes
    return {
        "device": str(segment.trunk.device),
        "fallen": alone.fallen,
        "precision": precision,
        "is_packed": packed is not None,
        "expert_budget": residency.budgets["device"],
        "expert_bytes": spec.layers * spec.experts * each,
        "hit_rate": counts.hit_rate,
        "loads": sum(counts.loads),
        "loaded_bytes": sum(counts.load_bytes),
        "waited_s": sum(counts.waited_s),
        "prefetched": sum(counts.prefetched),
        "prefetch_hits": sum(counts.prefetch_hits),
    }


def _held(note: dict[str, Any]) -> str:
    if note["precision"] == "checkpoint":
        return ""
    return f" in {note['precision']}{', packed' if note['is_packed'] else ''}"


def told(note: dict[str, Any]) -> str:
    """Return a note in words."""
    rate = note["hit_rate"]
    where = "" if note["device"] == "cpu" else f" of {note['device']}"
    fallen = f"; {note['fallen']}: computed on {note['device']}" if note["fallen"] else ""
    room = min(note["expert_budget"], note["expert_bytes"])
    return (
        f"experts{_held(note)}: {format_bytes(room)} of {format_bytes(note['expert_bytes'])} "
        f"in memory{where}, "
        f"{'-' if rate is None else f'{rate:.1%}'} found there, {note['loads']} loads of "
        f"{format_bytes(note['loaded_bytes'])}, waited {note['waited_s']:.2f} s for them{fallen}"
    )
