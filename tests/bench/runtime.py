"""A model larger than the memory it is given, on disk: ``python -m tests.bench.runtime [MODEL]``.

Every arm runs in a process of its own, in turn, and generates the same greedy tokens from the same prompts; the page
cache of what it reads is dropped all the while, so that the disk is read. accelerate is no dependency: where it is not
installed its arm is left out. Figures are of one run on the machine that it names.
"""

import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch

from runtime.alone import open_alone
from runtime.errors import BudgetTooSmall
from runtime.generation import generate
from runtime.loading import load_tokenizer, load_trunk
from runtime.models import open_model
from runtime.store import prepare_store
from schemas.units import format_bytes
from tests.bench.given import MODEL

PROMPTS = ("def read_lines(path):\n    with open(path)", "The three of them went down to the river and")
_DROP_S = 0.005


@dataclass(frozen=True)
class Arm:
    """What is measured; `directory` is what it reads."""

    name: str
    directory: str
    budget: int
    tokens: int
    is_cold: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Of the decoded tokens of all prompts.

    `rss` is the growth of resident memory at its peak, beyond a process that has run the model once, and still holds
    its trunk and one layer's experts.
    """

    ids: list[list[int]]
    tokens_per_s: float
    prefill_s: float
    counted: int
    system: int
    loads: int
    hit_rate: float | None
    rss: int


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=MODEL)
@click.option("--share", default=0.25, show_default=True, help="Of the experts that fit into memory.")
@click.option("--tokens", default=64, show_default=True)
@click.option("--warm", is_flag=True, help="Let the page cache be.")
def main(model: Path, share: float, tokens: int, warm: bool) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        prepare_store(model, store, dtype="float32")
        spec = open_model(store).spec
        trunk = spec.range_bytes(range(spec.num_decoder_layers))
        room = int(share * spec.total_expert_bytes)
        kv = spec.kv_bytes_per_token_layer * spec.num_decoder_layers * 256
        whole = trunk + kv + spec.total_expert_bytes
        click.echo(
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads; "
            f"{spec.id} float32: trunk {format_bytes(trunk)}, experts {format_bytes(spec.total_expert_bytes)}, of which "
            f"{format_bytes(room)} fit; {tokens} tokens after each of {len(PROMPTS)} prompts"
        )
        budget = trunk + kv + room
        arms = [
            Arm("rates", str(store), budget, tokens, not warm, {}),
            Arm("lru", str(store), budget, tokens, not warm, {"eviction": "lru"}),
            Arm("cyclfu", str(store), budget, tokens, not warm, {"eviction": "cyclfu"}),
            Arm(
                "no more than one layer", str(store), trunk + kv + spec.top_k * spec.expert_bytes, tokens, not warm, {}
            ),
            Arm("all experts fit", str(store), whole, tokens, not warm, {}),
        ]
        if find_spec("accelerate"):
            arms.append(Arm("accelerate, disk offload", str(model), budget, tokens, not warm, {"accelerate": True}))
        else:
            click.echo("accelerate is not installed: its disk offload is not measured")
        print_table(arms, {arm.name: measure(arm) for arm in arms}, spec.expert_bytes)


def measure(arm: Arm) -> Measured:
    """Run an arm in a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        result: Measured = pool.apply(_accelerate if "accelerate" in arm.options else _ours, (arm,))
    return result


def print_table(arms: list[Arm], measured: dict[str, Measured], expert_bytes: int) -> None:
    """Print an arm a row, and what should hold."""
    click.echo(
        f"\n{'':28s}{'tokens/s':>10s}{'prefill':>10s}{'hit rate':>10s}{'loads/token':>13s}{'counted/token':>16s}"
        f"{'read/token':>14s}{'RSS growth':>13s}{'budget':>12s}"
    )
    first = measured[arms[0].name]
    for arm in arms:
        found, count = measured[arm.name], arm.tokens * len(PROMPTS)
        rate = "-" if found.hit_rate is None else f"{found.hit_rate:.1%}"
        click.echo(
            f"{arm.name:28s}{found.tokens_per_s:10.1f}{found.prefill_s:9.2f}s{rate:>10s}{found.loads / count:13.2f}"
            f"{format_bytes(found.counted // count):>16s}{format_bytes(found.system // count):>14s}"
            f"{format_bytes(found.rss):>13s}{format_bytes(arm.budget):>12s}"
            f"{'' if found.ids == first.ids else '   other tokens!'}"
        )
    for name in ("lru", "accelerate, disk offload"):
        if name in measured:
            click.echo(f"{arms[0].name} against {name}: {first.tokens_per_s / measured[name].tokens_per_s:.2f} ×")
    ratio = first.system / (first.loads * expert_bytes)
    click.echo(f"bytes read by the process against misses × record size: {ratio:.3f}")


def _ours(arm: Arm) -> Measured:
    torch.set_num_threads(1)
    path = Path(arm.directory)
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    kept = open_alone(path, budget=_least(path), max_tokens=256)
    list(generate(kept, prompts[0], max_tokens=2))
    before = _fresh_peak()
    segment = open_alone(path, budget=arm.budget, max_tokens=256, **arm.options)
    _fresh_peak()  # what loading a trunk takes for a moment is not what running it takes
    residency = segment.residency
    decode_s = prefill_s = 0.0
    loads = counted = system = 0
    ids = []
    with _cold(path, arm.is_cold):
        for prompt in prompts:
            began = time.perf_counter()
            tokens = generate(segment, prompt, max_tokens=arm.tokens + 1, stop_ids=frozenset())
            answer = [next(tokens)]
            prefill_s += time.perf_counter() - began
            had, read = sum(residency.counts.loads), _bytes_read()
            began = time.perf_counter()
            answer += tokens
            decode_s += time.perf_counter() - began
            ids.append(answer)
            loads += sum(residency.counts.loads) - had
            system += _bytes_read() - read
    counted = loads * residency.layout.bytes
    count = arm.tokens * len(prompts)
    grown = _peak() - before
    return Measured(ids, count / decode_s, prefill_s, counted, system, loads, residency.counts.hit_rate, grown)


def _least(path: Path) -> int:
    try:
        open_alone(path, budget=0, max_tokens=256)
    except BudgetTooSmall as error:
        return error.needed
    raise AssertionError


def _accelerate(arm: Arm) -> Measured:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    path = Path(arm.directory)
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    load_trunk(path)
    before = _fresh_peak()
    decode_s = prefill_s = 0.0
    system = 0
    ids = []
    with tempfile.TemporaryDirectory() as offload:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            device_map="auto",
            max_memory={"cpu": arm.budget},
            offload_folder=offload,
            experts_implementation="eager",
        )
        with _cold(path, arm.is_cold), _cold(Path(offload), arm.is_cold), torch.inference_mode():
            for prompt in prompts:
                began = time.perf_counter()
                output = model(torch.tensor([prompt]), use_cache=True)
                prefill_s += time.perf_counter() - began
                answer = [int(output.logits[0, -1].argmax())]
                began, read = time.perf_counter(), _bytes_read()
                for _ in range(arm.tokens):
                    output = model(torch.tensor([answer[-1:]]), past_key_values=output.past_key_values, use_cache=True)
                    answer.append(int(output.logits[0, -1].argmax()))
                decode_s += time.perf_counter() - began
                system += _bytes_read() - read
                ids.append(answer)
    count = arm.tokens * len(prompts)
    return Measured(ids, count / decode_s, prefill_s, 0, system, 0, None, _peak() - before)


@contextmanager
def _cold(directory: Path, is_cold: bool) -> Iterator[None]:
    """Drop what the page cache has of a directory's files, again and again."""
    ended = threading.Event()
    descriptors = [os.open(file, os.O_RDONLY) for file in directory.rglob("*") if file.is_file()]

    def drop() -> None:
        while not ended.wait(_DROP_S):
            for descriptor in descriptors:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=drop, daemon=True)
    if is_cold:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if is_cold:
            thread.join()
        for descriptor in descriptors:
            os.close(descriptor)


def _bytes_read() -> int:
    """Bytes that this process has asked the system for; pages that are mapped are not among them."""
    return _field("/proc/self/io", "rchar")


def _fresh_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    return _field("/proc/self/status", "VmHWM") * 1024


def _field(file: str, name: str) -> int:
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    main()
