"""Where a token's time on a CUDA device goes, by the names of the kernels that take it; and prompts timed."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from runtime.engine import Segment
from runtime.sampling import chunk_of, prefill_chunks

_EXPERTS = ("_gate_up", "_down")
_BRINGING = ("_fetch", "_ahead", "_wait", "Memcpy")


def split_of(run: Callable[[], Any], count: int, *, ms: float, waited_ms: float) -> dict[str, float]:
    """Return milliseconds a token of trunk, experts at hand, waits for loads, and the rest, which is the host's.

    Parameters
    ----------
    run, count
        Runs so many steps, which are profiled: that gives what kernels of trunk and experts take.
    ms, waited_ms
        A token and what it waits, measured without a profiler.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    trunk = experts = 0.0
    for kernel in seen.key_averages():
        took = kernel.self_device_time_total / 1e3 / count
        if kernel.key.startswith(_EXPERTS):
            experts += took
        elif not kernel.key.startswith(_BRINGING):
            trunk += took
    return {"trunk": trunk, "experts": experts, "waits": waited_ms, "host": max(0.0, ms - trunk - experts - waited_ms)}


def drawn_prompts(tokens: int, count: int, device: str) -> list[torch.Tensor]:
    """Draw prompts, each another one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 1000, (tokens,), generator=generator).to(device) for _ in range(count)]


def prompts_of_segment(segment: Segment, prompts: Sequence[torch.Tensor]) -> float:
    """Return the median milliseconds of a prompt."""

    def run(ids: torch.Tensor) -> None:
        segment.open("prompt", len(ids) + 1)
        for chunk in prefill_chunks(len(ids), chunk_of(ids.device)):
            segment.step("prompt", ids[chunk], keep="last" if chunk.stop >= len(ids) else "none")
        segment.close("prompt")

    return median_ms(run, prompts)


def distance_of_ways(segment: Segment, ids: torch.Tensor) -> float:
    """Return how far the logits behind a prompt are from those of transformers' own layers, as a share of their norm."""
    made, own = [], segment.prompts
    for segment.prompts in (own, None):
        segment.open("prompt", len(ids) + 1)
        made.append(segment.step("prompt", ids)[-1].float())
        segment.close("prompt")
    segment.prompts = own
    return float((made[0] - made[1]).norm() / made[1].norm())


def prompts_of_model(model: Any, prompts: Sequence[torch.Tensor]) -> float:
    """Return the median milliseconds of a prompt through transformers."""

    @torch.inference_mode()
    def run(ids: torch.Tensor) -> None:
        model(ids[None], logits_to_keep=1)

    return median_ms(run, prompts)


def median_ms(run: Callable[[torch.Tensor], None], prompts: Sequence[torch.Tensor]) -> float:
    """Return the median milliseconds of what a device computes from each prompt."""
    took = []
    for ids in prompts:
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(ids)
        torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took)
