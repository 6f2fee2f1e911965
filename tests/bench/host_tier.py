"""Greedy tokens with experts in host memory beside a device, every way there is: ``python -m tests.bench.host_tier``.

Half of the experts, or all of them, are put in host memory; slots of the device are for all, for half, or for few.
Answers must be those of transformers in float32 on the processor.
"""

from itertools import product
from typing import Any

import click
import torch

from runtime.alone import expert_sources
from runtime.engine import Segment
from runtime.generation import generate
from runtime.loading import load_tokenizer, load_trunk, load_whole
from runtime.models import open_model
from runtime.routing import EpochBoard, Routing
from runtime.slots import Caching, Residency
from tests.cluster import MODEL, PROMPTS

WAYS: dict[str, dict[str, bool]] = {
    "loads": {"is_captured": False, "in_place": False, "prefetch": False},
    "loads, ahead": {"is_captured": False, "in_place": False, "prefetch": True},
    "in place": {"is_captured": False, "in_place": True, "prefetch": True},
    "captured": {"is_captured": True, "in_place": False, "prefetch": False},
    "captured, ahead": {"is_captured": True, "in_place": True, "prefetch": True},
}


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--tokens", default=32, show_default=True)
def main(device: str, tokens: int) -> None:
    """Compare all ways; ends with an error where one differs."""
    prompts, want = references(tokens)
    is_wrong = False
    for (title, way), (share, slots) in product(WAYS.items(), ((0.5, 64), (1.0, 64), (1.0, 32), (1.0, 12))):
        segment = opened(device, share, slots, **way)
        right = [
            sum(a == b for a, b in zip(answer(segment, ids, tokens), tokens_of, strict=True))
            for ids, tokens_of in zip(prompts * 2, want * 2, strict=True)
        ]
        is_wrong |= right != [tokens] * len(right)
        services = segment.captured.services if segment.captured is not None else "-"
        click.echo(f"{title:16} {share:4.0%} in host, {slots} slots: {right} of {tokens} right; steps {services}")
    if is_wrong:
        raise SystemExit("some tokens are others than the processor's")


def references(tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts, and what follows them."""
    tokenizer, model = load_tokenizer(MODEL), load_whole(MODEL, dtype="float32")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    want = []
    for ids in prompts:
        given = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                given, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
                attention_mask=torch.ones_like(given),
            )  # fmt: skip
        want.append(out[0, len(ids) :].tolist())
    return prompts, want


def opened(device: str, share: float, slots: int, *, is_captured: bool, in_place: bool, prefetch: bool) -> Segment:
    """Open the model with a share of its experts put in host memory."""
    model = open_model(MODEL, "float32")
    spec, size = model.spec, model.layout.bytes
    count = spec.layers * spec.experts
    residency = Residency(
        model.layout,
        {"device": slots * size, "host": count * size},
        device=device,
        max_slots=count,
        caching=Caching(spec.layers, spec.experts, prefetch=prefetch, in_place=in_place),
        is_apart=True,
    )
    for number, (key, source) in enumerate(expert_sources(MODEL, model).items()):
        record = bytearray(size)
        source.read_into(parts_of(model, record), check=False)
        residency.put(key, "host" if share == 1 or number % 2 else "device", record, source)
    board = EpochBoard(Routing.all_local(1, layers=spec.layers, experts=spec.experts))
    segment = Segment(load_trunk(MODEL, dtype="float32", device=device), residency, board)
    if not is_captured:
        segment.captured = None
    return segment


def parts_of(model: Any, record: bytearray) -> list[memoryview]:
    """Return the parts of a record as bytes to be written."""
    parts, start, view = [], 0, memoryview(record)
    for part in model.layout.parts:
        parts.append(view[start : start + 4 * part.elements])
        start += 4 * part.elements
    return parts


def answer(segment: Segment, ids: list[int], tokens: int) -> list[int]:
    """Generate greedily."""
    return list(generate(segment, ids, max_tokens=tokens, stop_ids=frozenset()))


if __name__ == "__main__":
    main()
