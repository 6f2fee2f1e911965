"""Experts in host memory beside a CUDA device: loaded always, or computed in place: ``python -m tests.bench.in_place``.

One layer's experts after the other, operation by operation, as prompts, batches and layers whose experts are spread over
nodes run; a quarter of the experts has slots, every record is in pinned host memory. Routing is drawn once, evenly or
with a few favourites, and both ways run it by turns. Answers are compared: they may differ by rounding.
"""

import gc
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from runtime.experts import Rows, compute_rows
from runtime.models import Model, open_model
from runtime.slots import Caching, Residency
from schemas.topology import Tier
from tests.bench.cuda_models import MIXTRAL, QWEN, RandomRecord, Shape, write_hollow

SHARE = 0.25
TOKENS = (1, 4, 16, 64, 512)
SECONDS = 0.7  # of every arm
SMALL = Shape("small", "qwen3_moe", 2, 16, 4, 512, 64, 2, 2, 1000)
SHAPES = {"qwen": replace(QWEN, layers=4), "mixtral": replace(MIXTRAL, layers=2), "small": SMALL}


@dataclass
class Arm:
    """One way, and what it did: seconds of each layer, and the rows by where they were computed."""

    residency: Residency
    seconds: list[float]
    rows: dict[str, int]


@click.command()
@click.argument("shapes", nargs=-1, type=click.Choice(list(SHAPES)))
@click.option("--device", default="cuda", show_default=True)
@click.option("--threads", default=0, help="Of the processor; torch's own choice if 0.")
def main(shapes: tuple[str, ...], device: str, threads: int) -> None:
    """Measure and print a table for each shape."""
    if threads:
        torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if device != "cpu" else "no device"
    click.echo(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for shape in shapes or ("qwen", "mixtral"):
        run_shape(SHAPES[shape], device)
        gc.collect()


def run_shape(shape: Shape, device: str) -> None:
    """Measure both ways for every number of tokens, evenly routed and not."""
    with tempfile.TemporaryDirectory() as directory:
        model = open_model(write_hollow(shape, Path(directory), shape.top_k))
        arms = {title: open_arm(model, shape, device, in_place=title == "in place") for title in ("loads", "in place")}
    size = model.layout.bytes
    click.echo(f"\n{shape.name}: {shape.experts} experts of {size / 1e6:.1f} MB a layer, top {shape.top_k}")
    click.echo("routing  tokens  loads only  in place too  ratio  computed in place  loads per layer   difference")
    for routing in ("even", "skewed"):
        for tokens in TOKENS:
            compare(shape, arms, routing, tokens, device)
    ways = arms["in place"].residency.ways
    told = ", ".join(f"{n} tokens {1e6 * (ways.processor.seconds(n) or 0):.0f}" for n in (1, 4, 16, 64))
    click.echo(f"µs: a load {1e6 * ways.load((0, 0)).seconds:.0f}; an expert in host memory: {told}")


def open_arm(model: Model, shape: Shape, device: str, *, in_place: bool) -> Arm:
    """Make a residency with every record in host memory."""
    layout = model.layout
    every = shape.layers * shape.experts
    residency = Residency(
        layout,
        {"device": round(SHARE * every) * layout.bytes, "host": every * layout.bytes},
        device=device,
        max_slots=every,
        caching=Caching(shape.layers, shape.experts, prefetch=False, in_place=in_place),
        is_apart=True,
    )
    row = layout.parts[1].shape[1] * 2
    for layer in range(shape.layers):
        for expert in range(shape.experts):
            source = RandomRecord((layer, expert), row)
            record = bytearray(layout.bytes)
            view, parts, start = memoryview(record), [], 0
            for part in layout.parts:
                parts.append(view[start : start + 2 * part.elements])
                start += 2 * part.elements
            source.read_into(parts, check=False)
            residency.put((layer, expert), "host", record, source)
    return Arm(residency, [], {})


def draw(shape: Shape, routing: str, tokens: int, steps: int) -> NDArray[np.int64]:
    """Return experts [steps, layers, tokens, top_k], evenly or with favourites that change slowly."""
    generator = np.random.default_rng(0)
    odds = generator.gumbel(size=(steps, shape.layers, tokens, shape.experts))
    if routing == "skewed":
        odds += 2.5 * generator.standard_normal((1, shape.layers, 1, shape.experts))
    return np.argsort(-odds, axis=-1)[..., : shape.top_k]


def compare(shape: Shape, arms: dict[str, Arm], routing: str, tokens: int, device: str) -> None:
    """Run the same steps both ways by turns, and print a line."""
    steps = 64 if tokens <= 16 else 8
    chosen = draw(shape, routing, tokens, steps)
    hidden = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    for arm in arms.values():
        arm.seconds, arm.rows = [], {}
    loads = {title: sum(arm.residency.counts.loads) for title, arm in arms.items()}
    worst, began = 0.0, time.perf_counter()
    for index in range(10_000):
        step = index % steps
        answers = [run_step(arm, chosen[step], hidden) for arm in arms.values()]
        scale = answers[0].abs().max().item()
        worst = max(worst, (answers[0] - answers[1]).abs().max().item() / scale)
        if index >= 4 and time.perf_counter() - began > 2 * SECONDS:
            break
    times = {title: 1e3 * statistics.median(arm.seconds[shape.layers :]) for title, arm in arms.items()}
    per_layer = {
        title: (sum(arm.residency.counts.loads) - loads[title]) / len(arm.seconds) for title, arm in arms.items()
    }
    rows = arms["in place"].rows
    share = rows.get("in place", 0) / max(1, sum(rows.values()))
    click.echo(
        f"{routing:7}  {tokens:6}  {times['loads']:7.2f} ms  {times['in place']:9.2f} ms  "
        f"{times['in place'] / times['loads']:5.2f}  {share:16.0%}  {per_layer['loads']:6.2f}, {per_layer['in place']:5.2f}"
        f"  {worst:11.1e}"
    )


def run_step(arm: Arm, chosen: NDArray[np.int64], hidden: torch.Tensor) -> torch.Tensor:
    """Run every layer once; returns the last one's sums, [T, D] float32."""
    found = arm.residency.counts.found["host"]
    tokens, top_k = chosen.shape[1:]
    answer = hidden
    for layer, experts in enumerate(chosen):
        flat = experts.T.reshape(-1)  # [K * T]
        order = flat.argsort(kind="stable")
        rows = Rows(order % tokens, flat[order], torch.full((len(flat),), 1 / top_k, device=hidden.device))
        before, began = found[layer], time.perf_counter()
        tiers: dict[Tier, int] = {}
        answer = compute_rows(arm.residency, layer, rows, hidden, combine="partial", tier_rows=tiers)
        if hidden.is_cuda:
            torch.cuda.synchronize()
        arm.seconds.append(time.perf_counter() - began)
        arm.rows["in place"] = arm.rows.get("in place", 0) + found[layer] - before
        arm.rows["other"] = arm.rows.get("other", 0) + len(set(flat.tolist())) - found[layer] + before
    return answer


if __name__ == "__main__":
    main()
