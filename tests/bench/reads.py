"""Records read through the page cache and past it: ``python -m tests.bench.reads [MODEL] [--directory DIR]``.

First the reads alone, every record once in random order, then text from a model a quarter of whose experts fit, in
turns. The page cache of the store is dropped before every read where it says so. Figures are of one run on the machine
and the disk that it names.
"""

import os
import platform
import random
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import click
import torch

from runtime.alone import open_alone
from runtime.generation import generate
from runtime.loading import load_tokenizer
from runtime.models import open_model
from runtime.reads import READ_WAYS, ReadWay, reads_of
from runtime.records import RecordFile
from runtime.store import Store, prepare_store
from schemas.store import RECORDS_NAME
from tests.bench.given import MODEL

PROMPT = "def read_lines(path):\n    with open(path)"
_DROP_S = 0.005


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=MODEL)
@click.option("--directory", type=click.Path(path_type=Path, exists=True), help="Where the store is made.")
@click.option("--share", default=0.25, show_default=True, help="Of the experts that fit into memory.")
@click.option("--tokens", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(model: Path, directory: Path | None, share: float, tokens: int, rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=directory) as made:
        path = Path(made) / "store"
        prepare_store(model, path, dtype="float32")
        store = Store.open(path)
        size = store.manifest.layout.bytes
        click.echo(
            f"{platform.machine()}, {os.cpu_count()} cores, {len(store.by_key)} records of {size >> 10} KiB in {made}"
        )
        medians: dict[str, list[float]] = {}
        for number in range(rounds):
            for name, way, is_cold in (
                ("cached, dropped", "cached", True),
                ("direct", "direct", False),
                ("cached, warm", "cached", False),
            ):
                medians.setdefault(name, []).append(_one_by_one(store, way, number, is_cold=is_cold))
        base = statistics.median(medians["cached, dropped"])
        for name, found in medians.items():
            middle = statistics.median(found)
            click.echo(f"| {name} | {middle * 1e6:.0f} µs | {middle / base:.2f} |")
        speeds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for way in READ_WAYS:
                speeds.setdefault(way, []).append(_tokens_per_s(path, way, share, tokens))
        for way, found in speeds.items():
            click.echo(f"| {way}, cache dropped all the while | {statistics.median(found):.1f} tokens/s |")


def _one_by_one(store: Store, way: ReadWay, seed: int, *, is_cold: bool) -> float:
    """Return the median seconds of reading a record."""
    file, reads = store.path / RECORDS_NAME, reads_of(way)
    records = list(store.by_key.values())
    random.Random(seed).shuffle(records)
    into = [memoryview(bytearray(store.manifest.layout.bytes))]
    if is_cold:
        drop(file)
    took = []
    for record in records:
        source = RecordFile(file, record.sha256, record.offset, reads)
        began = perf_counter()
        source.read_into(into, check=False)
        took.append(perf_counter() - began)
    return statistics.median(took)


def _tokens_per_s(path: Path, way: ReadWay, share: float, tokens: int) -> float:
    spec = open_model(path).spec
    trunk = spec.range_bytes(range(spec.num_decoder_layers))
    kv = spec.kv_bytes_per_token_layer * spec.num_decoder_layers * 256
    budget = trunk + kv + int(share * spec.total_expert_bytes)
    segment = open_alone(path, budget=budget, max_tokens=256, reads=way)
    ids = load_tokenizer(path)(PROMPT)["input_ids"]
    with dropped(path / RECORDS_NAME):
        made = generate(segment, ids, max_tokens=tokens)
        next(made)
        began = perf_counter()
        count = sum(1 for _ in made)
        return count / (perf_counter() - began)


def drop(file: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def dropped(file: Path) -> Iterator[None]:
    """Keep a file out of the page cache meanwhile."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(_DROP_S):
            drop(file)

    thread = threading.Thread(target=run)
    drop(file)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
