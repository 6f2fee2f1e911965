"""What the cache costs a prompt: ``python -m tests.bench.prefill MODEL [MODEL …]``.

The same prompt runs through segments that differ only in where their experts are: each in a slot of its own (twice, to
show what a ratio of equals looks like here), in a cache that has room for all, and in one with room for a share, whose
misses are read from the page cache, or from the disk (``reads: direct``). They take turns in one process, in another
order each time, so that ratios hold whatever else the machine does. Without MODEL, one with random weights is made.
"""

import os
import platform
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import torch

from runtime.alone import open_alone
from runtime.engine import Segment
from runtime.loading import load_trunk
from runtime.reads import ReadWay
from runtime.routing import EpochBoard, Routing
from runtime.sampling import prefill_chunks
from runtime.slots import Residency
from runtime.store import Store, prepare_store

PROMPT = 512
FIRST = "no cache, all experts in slots"


def make_larger(path: Path) -> Path:
    """Write a random Qwen3-MoE whose experts are of 2.25 MiB: 4 layers of 32, top-4."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        intermediate_size=512, moe_intermediate_size=384, num_experts=32, num_experts_per_tok=4,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def without_cache(store: Store, path: Path) -> Segment:
    """Every expert in a slot of its own."""
    spec = store.manifest.model
    residency = Residency(store.manifest.layout, {"device": spec.total_expert_bytes})
    for key, record in store.by_key.items():
        residency.put(key, "device", store.read(record.sha256))
    board = EpochBoard(Routing.all_local(1, layers=spec.layers, experts=spec.experts))
    return Segment(load_trunk(path, dtype="float32"), residency, board)


def with_cache(path: Path, store: Store, share: float, reads: ReadWay = "cached") -> Segment:
    """Experts in a cache with room for a share of them."""
    spec = store.manifest.model
    trunk = spec.range_bytes(range(spec.num_decoder_layers))
    kv = spec.kv_bytes_per_token_layer * spec.num_decoder_layers * (PROMPT + 1)
    return open_alone(
        path, budget=trunk + kv + round(share * spec.total_expert_bytes), max_tokens=PROMPT + 1, reads=reads
    )


def prefill_s(segment: Segment, ids: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Run a prompt in its chunks; returns seconds, those that all threads computed, and its last token's logits."""
    began, computed = time.perf_counter(), time.process_time()
    segment.open("prompt", len(ids) + 1)
    for chunk in prefill_chunks(len(ids)):
        logits = segment.step("prompt", ids[chunk], keep="last" if chunk.stop >= len(ids) else "none")
    segment.close("prompt")
    return time.perf_counter() - began, time.process_time() - computed, logits


def report(path: Path, *, share: float, rounds: int) -> None:
    """Measure one model and print its table."""
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory) / "store"
        prepare_store(path, where, dtype="float32")
        store = Store.open(where)
        spec = store.manifest.model
        ids = torch.randint(2, 1000, (PROMPT,), generator=torch.Generator().manual_seed(1))
        arms = {
            FIRST: without_cache(store, where),
            "the same again": without_cache(store, where),
            "cache, room for all": with_cache(where, store, 1.0),
            f"cache, room for {share:.0%}": with_cache(where, store, share),
            f"cache, room for {share:.0%}, from the disk": with_cache(where, store, share, "direct"),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        loads: dict[str, int] = {}
        wanted = None
        for turn in range(rounds + 1):
            for name in random.sample(list(arms), len(arms)):
                counts = arms[name].residency.counts
                had = sum(counts.loads)
                *seconds, logits = prefill_s(arms[name], ids)
                loads[name] = sum(counts.loads) - had
                wanted = logits if wanted is None else wanted
                assert torch.equal(logits, wanted), name
                if turn:  # the first one loads what there is room for
                    taken[name].append((seconds[0], seconds[1]))
        print_table(spec.id, taken, loads)


def print_table(name: str, taken: dict[str, list[tuple[float, float]]], loads: dict[str, int]) -> None:
    """Print an arm a row: the best turn, which other work disturbed least, and the median of its ratios to the first arm."""
    first = taken[FIRST]
    head = f"{name}, a prompt of {PROMPT} tokens"
    click.echo(f"\n{head:44s}{'ms':>10s}{'of no cache':>13s}{'computed ms':>13s}{'of no cache':>13s}{'loads':>7s}")
    for arm, turns in taken.items():
        columns = ""
        for which in (0, 1):
            ratio = median(turn[which] / base[which] for turn, base in zip(turns, first, strict=True))
            width = 10 if which == 0 else 13
            columns += f"{1e3 * min(turn[which] for turn in turns):{width}.1f}{ratio:13.3f}"
        click.echo(f"{arm:44s}{columns}{loads[arm]:7d}")


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--share", default=0.25, show_default=True, help="Of the experts that fit into the small cache.")
@click.option("--rounds", default=15, show_default=True)
def main(models: tuple[Path, ...], share: float, rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    click.echo(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as directory:
        for model in models or (make_larger(Path(directory) / "larger"),):
            report(model, share=share, rounds=rounds)


if __name__ == "__main__":
    main()
