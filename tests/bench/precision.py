"""What int8 and int4 cost and save: ``python -m tests.bench.precision [MODEL] --text FILE …``.

Perplexity of text with every expert rounded, and decoding (sampled, with one seed) from a store on disk within a budget that the experts
exceed: their records as the checkpoint has them, in each precision, unpacked when they are loaded or held packed, and
as the checkpoint has them but for what is missing when it is asked for (`low_precision` of an agent).
Arms take turns, so that load on the machine falls on all of them, and the quickest round of each counts; the page cache
of the store is dropped all the while.
"""

import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from agent.calibrating import _pieces
from runtime.alone import open_alone, packed_source
from runtime.degrading import precision_costs
from runtime.engine import Segment
from runtime.forcing import Bench, Supply
from runtime.generation import generate
from runtime.importance import Importance
from runtime.loading import load_tokenizer, load_whole
from runtime.models import open_model
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import Exact, LowMissing
from runtime.records import RecordFile
from runtime.sampling import Sampling
from runtime.store import prepare_store
from schemas.precision import LOW_PRECISIONS, LowPrecision
from schemas.units import format_bytes
from tests.bench.given import MODEL
from tests.bench.runtime import _cold

PROMPT = "def read_lines(path):\n    with open(path)"


@dataclass
class Arm:
    """One way to hold experts, and what decoding with it took in each round."""

    name: str
    options: dict[str, Any]
    seconds: list[float]
    low: LowPrecision | None = None
    loads: int = 0
    load_bytes: int = 0
    tokens: Sequence[int] = ()
    segment: Segment | None = None


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=MODEL)
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--text-tokens", default=10240, show_default=True)
@click.option("--share", default=0.25, show_default=True, help="Of the experts' bytes that fit into memory.")
@click.option("--tokens", default=24, show_default=True, help="Decoded in each of the rounds.")
@click.option("--rounds", default=10, show_default=True)
@click.option("--warm", is_flag=True, help="Let the page cache be.")
@click.option("--disk", type=float, help="Let reads take as long as from a disk of so many MiB/s.")
def main(
    model: Path,
    texts: tuple[Path, ...],
    text_tokens: int,
    share: float,
    tokens: int,
    rounds: int,
    warm: bool,
    disk: float | None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread"
    click.echo(f"{machine}; {model.name}, float32")
    if texts:
        print_perplexity(model, texts, text_tokens)
    with tempfile.TemporaryDirectory() as directory, slower_disk(disk):
        store = Path(directory) / "store"
        prepare_store(model, store, dtype="float32", precisions=LOW_PRECISIONS)
        print_decoding(store, share=share, tokens=tokens, rounds=rounds, is_cold=not warm)


@contextmanager
def slower_disk(rate: float | None) -> Iterator[None]:
    """Let every record take as long to read as from a disk of `rate` MiB/s, where that is longer."""
    read_into = RecordFile.read_into

    def slowly(self: RecordFile, parts: Sequence[memoryview], *, check: bool) -> None:
        due = time.perf_counter() + sum(map(len, parts)) / (rate * 2**20)
        read_into(self, parts, check=check)
        time.sleep(max(0.0, due - time.perf_counter()))

    if rate is not None:
        click.echo(f"reads take as long as from a disk of {rate:g} MiB/s")
        RecordFile.read_into = slowly
    try:
        yield
    finally:
        RecordFile.read_into = read_into


def print_perplexity(model: Path, texts: tuple[Path, ...], tokens: int) -> None:
    """Print perplexity at the checkpoint's precision and its rise in the others."""
    spec = open_model(model).spec
    pieces = _pieces(model, texts, tokens=tokens, window=256)
    everything = Supply(spec.layers, spec.experts, masks=np.ones((spec.layers, spec.experts), dtype=bool))
    bench = Bench(load_whole(model, dtype="float32"), pieces, everything, spec.top_k)
    click.echo(f"perplexity of {pieces.numel()} tokens: {exp(bench.run(Exact()).nll.mean()):.3f}")
    for cost in precision_costs(bench, LOW_PRECISIONS):
        click.echo(f"  every expert in {cost.precision}: {cost.rise:+.2%} (95 %: {cost.low:+.2%} … {cost.high:+.2%})")


def print_decoding(store: Path, *, share: float, tokens: int, rounds: int, is_cold: bool) -> None:
    """Print an arm a row."""
    spec, manifest = open_model(store).spec, open_model(store).manifest
    assert manifest is not None
    beside = spec.range_bytes(range(spec.num_decoder_layers)) + spec.kv_bytes(tokens=512, sessions=1)
    room = int(share * spec.total_expert_bytes)
    sizes = ", ".join(f"{each.layout.precision} {format_bytes(each.layout.bytes)}" for each in manifest.packed)
    click.echo(
        f"an expert: {format_bytes(spec.expert_bytes)}, {sizes}; {format_bytes(room)} of "
        f"{format_bytes(spec.total_expert_bytes)} fit\n\n{'':22s}{'tokens/s':>10s}{'against':>9s}{'loads/token':>13s}"
        f"{'read/token':>12s}"
    )
    arms = [Arm("all fit", {"budget": beside + spec.total_expert_bytes}, []), Arm("checkpoint", {}, [])]
    for precision in LOW_PRECISIONS:
        for is_packed in (False, True):
            options = {"precision": precision, "is_packed": is_packed}
            arms.append(Arm(f"{precision}{', held packed' if is_packed else ''}", options, []))
    arms += [Arm(f"missing in {precision}", {}, [], precision) for precision in LOW_PRECISIONS]
    decode(arms, store, beside + room, tokens=tokens, rounds=rounds, is_cold=is_cold)
    base, count = next(arm for arm in arms if arm.name == "checkpoint"), tokens * rounds
    same: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for arm in arms:
        if arm.low is None:
            same[str(arm.options.get("precision"))].add(tuple(arm.tokens))
        took = min(arm.seconds)
        click.echo(
            f"{arm.name:22s}{tokens / took:10.1f}{min(base.seconds) / took:8.2f}x{arm.loads / count:13.2f}"
            f"{format_bytes(arm.load_bytes // count):>12s}"
        )
    for precision in LOW_PRECISIONS:
        chosen = open_alone(store, max_tokens=512, budget=beside + room, precision=precision).residency.packed
        click.echo(f"{precision} is held {'as weights' if chosen is None else 'packed'} where nothing else is said")
    assert all(len(each) == 1 for each in same.values()), "tokens depend on how experts are held"


def let_missing_come(segment: Segment, store: Path, precision: LowPrecision) -> None:
    """Let experts that are missing come in a low precision, whatever that costs in quality."""
    model = open_model(store)
    for key in model.store.by_key:
        segment.residency.place_packed(key, precision, packed_source(model, key, precision))
    free = (0.0,) * model.spec.layers
    account = Controller(Allowance(1.0, (1.0,) * model.spec.layers, free, nll_per_low_row=free))
    segment.importance = Importance(LowMissing(Exact()), account, is_whole=False, precision=precision)


def decode(arms: list[Arm], store: Path, budget: int, *, tokens: int, rounds: int, is_cold: bool) -> None:
    """Decode with each arm in turn, after a round that is not counted; modifies."""
    prompt = load_tokenizer(store)(PROMPT)["input_ids"]
    for number in range(rounds + 1):
        for arm in arms:
            if arm.segment is None:
                arm.segment = open_alone(store, max_tokens=512, **{"budget": budget, **arm.options})
                if arm.low is not None:
                    let_missing_come(arm.segment, store, arm.low)
            counts = arm.segment.residency.counts
            answer = generate(
                arm.segment,
                [*prompt, *arm.tokens][-200:],
                max_tokens=tokens + 1,
                sampling=Sampling(temperature=1.0, seed=number),  # greedy text runs in circles
                stop_ids=frozenset(),
            )
            new = [next(answer)]
            loads, load_bytes = sum(counts.loads), sum(counts.load_bytes)
            with _cold(store, is_cold):
                began = time.perf_counter()
                new += answer
                took = time.perf_counter() - began
            arm.tokens = [*arm.tokens, *new]
            if number:
                arm.seconds.append(took)
                arm.loads += sum(counts.loads) - loads
                arm.load_bytes += sum(counts.load_bytes) - load_bytes


if __name__ == "__main__":
    main()
