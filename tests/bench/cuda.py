"""Decoding on one CUDA device: ``python -m tests.bench.cuda [STAGE …]``.

Stages: ``families`` (the same greedy tokens as transformers with all experts on the device), ``resident`` (a token when
every expert has a slot, against transformers), ``capped`` (a quarter of the experts has slots, routing of a recorded
trace), ``large`` (experts of 352 MB, bound by the link), ``prompts`` (of 512 and 2048 tokens, with all experts on the
device and with a quarter), ``small`` (both again, for shapes of models that small machines run). Figures are of one run
on the machine that is named first.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from runtime.alone import Alone
from runtime.cuda.copies import DeviceCopies
from runtime.engine import Segment
from runtime.generation import generate
from runtime.importance import Importance
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import MassBudget
from tests.bench.cuda_models import (
    MIXTRAL,
    OLMOE,
    QWEN,
    QWEN_SHARED,
    Forced,
    Shape,
    fill_trunk,
    grouped,
    open_shape,
    read_forced,
    spoil_guesses,
    write_hollow,
)
from tests.bench.cuda_split import distance_of_ways, drawn_prompts, prompts_of_model, prompts_of_segment, split_of
from tests.bench.given import TRACES
from tests.families import FAMILIES, make_checkpoint

TRACE = TRACES / "qwen.route.csv"
WRONG_GUESSES = (0.15, 0.22)  # RUNTIME.md: of real routers one layer ahead, 81 to 89 % come true; two ahead, fewer
STAGES = ("families", "resident", "capped", "large", "prompts", "small")
_PROFILED = 32
_LARGE_TOKENS = 64
_PROMPTS = (512, 2048)
_TURNS = 9
_BY_ROUNDING = 0.1  # some tokens get other experts, whose scores are nearly the same
_PROMPT = [5, 17, 99, 3, 42, 7, 12, 80]


@click.command()
@click.argument("stages", nargs=-1, type=click.Choice(STAGES))
@click.option("--device", default="cuda", show_default=True)
@click.option("--trace", type=click.Path(path_type=Path), default=TRACE, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--no-accelerate", is_flag=True, help="Leave accelerate's offload out, which takes a while.")
def main(stages: tuple[str, ...], device: str, trace: Path, json_file: Path | None, no_accelerate: bool) -> None:
    """Measure and print."""
    found: dict[str, Any] = {"machine": machine(device)}
    click.echo(found["machine"])
    run: dict[str, Callable[[], Any]] = {
        "families": lambda: families(device),
        "resident": lambda: resident(QWEN, device),
        "capped": lambda: capped(QWEN, device, trace, with_accelerate=not no_accelerate),
        "large": lambda: large(MIXTRAL, device, trace),
        "prompts": lambda: prompts(QWEN, device),
        "small": lambda: {shape.name: small(shape, device) for shape in (OLMOE, QWEN_SHARED)},
    }
    for stage in stages or STAGES:
        click.echo(f"\n{stage}")
        began = time.perf_counter()
        found[stage] = run[stage]()
        click.echo(f"  ({time.perf_counter() - began:.0f} s)")
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=1))


def machine(device: str) -> str:
    """Name the device and what runs on it."""
    import transformers

    name = torch.cuda.get_device_name(torch.device(device))
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


@contextmanager
def cleared() -> Iterator[None]:
    """Let the device's memory be free afterwards."""
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def families(device: str) -> dict[str, Any]:
    """Generate greedily from small random checkpoints, with few slots and with many."""
    from runtime.loading import load_whole

    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory, cleared():
            path = make_checkpoint(family, Path(directory))
            model = load_whole(path, dtype="float32", device=device)
            ids = torch.tensor([_PROMPT], device=device)
            with torch.inference_mode():
                want = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None,
                    pad_token_id=0,
                )[0, len(_PROMPT) :].tolist()  # fmt: skip
            equal, captured = {}, False
            for slots in (None, 7):
                alone = Alone(path, device=device, max_tokens=64)
                spec = alone.segment.trunk.spec
                captured = alone.segment.captured is not None
                if slots is not None:
                    alone = Alone(
                        path, device=device, max_tokens=64,
                        budget=_trunk_bytes(alone.segment, 64) + slots * spec.expert_bytes,
                    )  # fmt: skip
                got = list(alone.generate(_PROMPT, max_tokens=24, stop_ids=frozenset()))
                equal["all" if slots is None else slots] = got == want
                assert alone.fallen == "", alone.fallen
            found[family] = {"captured": captured, "equal": equal}
            click.echo(f"  {family:12s} {'captured' if captured else 'ordinary':10s} same tokens: {equal}")
    return found


def _trunk_bytes(segment: Segment, tokens: int) -> int:
    spec = segment.trunk.spec
    layers = range(spec.num_decoder_layers)
    return spec.range_bytes(layers) + spec.kv_bytes_per_token_layer * len(layers) * tokens


def timed(step: Callable[[int], Any], count: int, *, skip: int = 8) -> list[float]:
    """Return the milliseconds of each step but the first few, each ended by reading its token."""
    took = []
    for number in range(count):
        began = time.perf_counter()
        step(number)
        took.append(1e3 * (time.perf_counter() - began))
    return took[skip:]


def decoding(segment: Segment, count: int, forced: Forced | None = None) -> Iterator[int]:
    """Return the tokens that `generate` makes of a prompt of 32 tokens, the prompt read: `count` steps are left."""
    prompt = range(32) if forced is None else range(len(forced.experts) - 32, len(forced.experts))
    tokens = generate(segment, list(prompt), max_tokens=count + 1, stop_ids=frozenset())
    assert next(tokens) == 0 or forced is None  # a forced head says the next of the trace's tokens
    return tokens


def of_steps(segment: Segment, count: int, forced: Forced | None = None) -> float:
    """Return the mean milliseconds of a step of `generate`, behind the prompt."""
    tokens = decoding(segment, count, forced)
    torch.cuda.synchronize()
    began = time.perf_counter()
    made = list(tokens)
    took = 1e3 * (time.perf_counter() - began) / count
    assert forced is None or made == [(number + 1) % len(forced.experts) for number in range(count)]
    return took


def of_model(model: Any, device: str) -> Callable[[int], int]:
    """Return what decodes with transformers."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.arange(32, device=device)[None], past_key_values=cache)

    @torch.inference_mode()
    def step(number: int) -> int:
        output = model(torch.tensor([[number]], device=device), past_key_values=cache)
        return int(output.logits[0, -1].argmax())

    return step


def whole_model(shape: Shape, device: str, top_k: int | None = None) -> Any:
    """Make transformers' own model, all on one device."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(top_k), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def resident(shape: Shape, device: str) -> dict[str, Any]:
    """Time a token when every expert is on the device."""
    found: dict[str, Any] = {}
    with cleared():
        model = whole_model(shape, device)
        for name, steps in (("grouped_mm", 40), ("batched_mm", 40), ("eager", 20)):
            model.set_experts_implementation(name)
            found[f"transformers {name}"] = statistics.median(timed(of_model(model, device), steps))
        del model
    with cleared(), tempfile.TemporaryDirectory() as directory:
        path = write_hollow(shape, Path(directory), shape.top_k)
        segment = open_shape(path, device, forced=None, share=1.0)
        fill_slots(segment)
        of_steps(segment, 8)
        found["ours"] = of_steps(segment, 100)
        captured, segment.captured = segment.captured, None
        of_steps(segment, 8)
        found["ours, operation by operation"] = of_steps(segment, 20)
        segment.captured = captured
        found["ours, head left out"] = headless(segment, device)
        del segment, captured
    _print_ms(found, "transformers grouped_mm")
    return found


def headless(segment: Segment, device: str) -> float:
    """Time a step without vocabulary: layers alone."""
    segment.open("bench", 128)
    segment.step("bench", torch.arange(32, device=device))
    times = []
    for number in range(60):
        torch.cuda.synchronize()
        began = time.perf_counter()
        segment.step("bench", torch.tensor([number], device=device), keep="none")
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    segment.close("bench")
    return statistics.median(times[8:])


def fill_slots(segment: Segment) -> None:
    """Load every expert that there is a slot for."""
    spec, residency = segment.trunk.spec, segment.residency
    for layer in range(spec.layers):
        for _ in residency.lend(layer, range(spec.experts)):
            pass
    torch.cuda.synchronize()


def capped(shape: Shape, device: str, trace: Path, *, with_accelerate: bool) -> dict[str, Any]:
    """Time tokens when a quarter of the experts has slots and the others are in host memory."""
    forced = read_forced(trace, shape.layers)
    found: dict[str, Any] = {"top_k": forced.top_k}
    with tempfile.TemporaryDirectory() as directory:
        path = write_hollow(shape, Path(directory), forced.top_k)
        with cleared():
            segment = open_shape(path, device, forced=forced, share=1.0)
            fill_slots(segment)
            of_steps(segment, 8, forced)
            found["resident_ms"] = of_steps(segment, len(forced.experts), forced)
            _print_head(found["resident_ms"])
            del segment
        for name, options in {
            "rates, looking ahead": {},
            "rates": {"prefetch": False},
            "lru": {"eviction": "lru", "prefetch": False},
        }.items():
            with cleared():
                segment = open_shape(path, device, forced=forced, share=0.25, **options)  # type: ignore[arg-type]
                spoil_guesses(segment, forced, WRONG_GUESSES)
                found[name] = under_load(segment, device, forced, found["resident_ms"])
                _print_arm(name, found[name])
                del segment
    if with_accelerate:
        with cleared():
            found["accelerate_ms"] = accelerated(shape, device, forced)
    _print_accelerate(found)
    return found


def under_load(segment: Segment, device: str, forced: Forced, resident_ms: float) -> dict[str, Any]:
    """Run the trace once to fill slots and host memory, and time it the second time."""
    of_steps(segment, len(forced.experts), forced)
    counts, tokens = segment.residency.counts, decoding(segment, count := len(forced.experts), forced)
    torch.cuda.synchronize()
    loads, bytes_before, waited = sum(counts.loads), sum(counts.load_bytes), sum(counts.waited_s)
    begun_before, true_before = sum(counts.prefetched), sum(counts.prefetch_hits)
    before, began = segment.counters.snapshot(), time.perf_counter()
    made = list(tokens)
    mean = 1e3 * (time.perf_counter() - began) / count
    assert made == [(number + 1) % count for number in range(count)]
    after = segment.counters.snapshot()
    routed = (after.routed - before.routed).sum()
    link = link_rate(segment)
    num_bytes = (sum(counts.load_bytes) - bytes_before) / count
    link_ms = 1e3 * num_bytes / link
    waited_ms = 1e3 * (sum(counts.waited_s) - waited) / count
    loads = sum(counts.loads) - loads
    ahead = sum(counts.prefetched) - begun_before, sum(counts.prefetch_hits) - true_before
    assert segment.captured is not None
    profiled = decoding(segment, _PROFILED, forced)
    return {
        "ms": mean,
        "split": split_of(lambda: list(profiled), _PROFILED, ms=mean, waited_ms=waited_ms),
        "services": dict(segment.captured.services),
        "loads_per_token": loads / count,
        "hit_rate": 1 - loads / routed,
        "bytes_per_token": num_bytes,
        "link_bytes_per_s": link,
        "link_ms": link_ms,
        "prefetched_per_token": ahead[0] / count,
        "prefetch_hits_per_token": ahead[1] / count,
        "waited_ms": waited_ms,
        "against_floor": mean / max(resident_ms, link_ms),
        "floor_ms": max(resident_ms, link_ms),
        "replaced_share": (after.replaced_rows - before.replaced_rows) / routed,
        "lost_mass_share": (after.lost_mass - before.lost_mass) / max(1, after.events - before.events),
    }


def link_rate(segment: Segment) -> float:
    """Return bytes a second that whole slots are copied with, from pinned memory, one after the other."""
    inside = segment.residency.inside
    copies: DeviceCopies = inside.loader.copies  # type: ignore[assignment]
    pool = inside.pool
    with copies.staged() as (staging, slot):
        source = staging.whole(slot)
        targets = [torch.empty_like(source, device=pool.whole(0).device) for _ in range(2)]
        rates = []
        for _ in range(3):
            torch.cuda.synchronize()
            count = max(4, int(2e9 / len(source)))
            began = time.perf_counter()
            with torch.cuda.stream(copies.stream):
                for number in range(count):
                    targets[number % 2].copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            rates.append(count * len(source) / (time.perf_counter() - began))
    return max(rates)


def accelerated(shape: Shape, device: str, forced: Forced) -> float:
    """Time accelerate's offload to host memory; milliseconds a token."""
    from accelerate import cpu_offload

    model = whole_model(shape, device, forced.top_k)
    fill_trunk(model, forced)
    model = model.to("cpu")
    model.set_experts_implementation("grouped_mm")
    cpu_offload(model, execution_device=torch.device(device))
    return statistics.median(timed(of_model(model, device), 4, skip=1))


def large(shape: Shape, device: str, trace: Path) -> dict[str, Any]:
    """Time tokens of experts so large that the link is all that counts; host memory is filled once for each eviction."""
    found: dict[str, Any] = {}
    whole = grouped(read_forced(trace, shape.layers), shape.layers, shape.experts)
    forced = Forced(whole.experts[:_LARGE_TOKENS], whole.weights[:_LARGE_TOKENS])
    arms: dict[str, dict[str, Importance | None]] = {
        "lru": {"lru": None},
        "rates": {"rates": None, "rates, substitution": substitution(shape)},
    }
    with tempfile.TemporaryDirectory() as directory:
        path = write_hollow(shape, Path(directory), shape.top_k)
        with cleared():
            segment = open_shape(path, device, forced=forced, share=1.0)
            fill_slots(segment)
            of_steps(segment, 8, forced)
            found["resident_ms"] = of_steps(segment, len(forced.experts), forced)
            _print_head(found["resident_ms"])
            del segment
        for eviction, variants in arms.items():
            with cleared():
                segment = open_shape(
                    path, device, forced=forced, share=0.5, eviction=eviction, prefetch=eviction != "lru"
                )
                spoil_guesses(segment, forced, WRONG_GUESSES)
                for share in (0.5, 0.25):
                    segment.residency.set_budget("device", round(share * segment.trunk.spec.total_expert_bytes))
                    for name, segment.importance in variants.items():
                        arm = found[f"{share:.0%} {name}"] = under_load(segment, device, forced, found["resident_ms"])
                        _print_arm(f"{share:.0%} {name}", arm)
                del segment
    for share in ("50%", "25%"):
        ratios = (
            f"{each}: {found[f'{share} lru']['ms'] / found[f'{share} {each}']['ms']:.2f}" for each in arms["rates"]
        )
        click.echo(f"  lru's time over that of, {share}: {' · '.join(ratios)}")
    return found


def substitution(shape: Shape) -> Importance:
    """Return a router-mass policy that is not held to a budget: a random model has no quality to lose."""
    allowance = Allowance(budget=1.0, nll=(1.0,) * shape.layers, nll_per_mass=(1.0,) * shape.layers, warmup=16)
    return Importance(MassBudget((0.2,) * shape.layers), Controller(allowance), is_whole=False)


def prompts(shape: Shape, device: str) -> dict[int, dict[str, float]]:
    """Time prompts, each another one, when every expert is on the device and when a quarter has slots."""
    found: dict[int, dict[str, float]] = {tokens: {} for tokens in _PROMPTS}
    drawn = {tokens: drawn_prompts(tokens, 3 + _TURNS, device) for tokens in _PROMPTS}
    with cleared():
        model = whole_model(shape, device)
        for name in ("grouped_mm", "eager"):
            model.set_experts_implementation(name)
            for tokens, each in drawn.items():
                prompts_of_model(model, each[:2])
                found[tokens][f"transformers {name}"] = prompts_of_model(model, each[3:])
        del model
    with tempfile.TemporaryDirectory() as directory:
        path = write_hollow(shape, Path(directory), shape.top_k)
        for share in (1.0, 0.25):
            with cleared():
                segment = open_shape(path, device, forced=None, share=share)
                fill_slots(segment)  # and host memory, where it is a quarter
                for tokens, each in drawn.items():
                    _time_prompts(segment, share, each, found[tokens])
                    distance = distance_of_ways(segment, each[0])
                    click.echo(
                        f"  {tokens} tokens, {share:.0%} in slots: logits {distance:.2%} from transformers' layers'"
                    )
                    assert distance < _BY_ROUNDING
                del segment
    for tokens, figures in found.items():
        click.echo(f"  {tokens} tokens")
        _print_ms(figures, "transformers grouped_mm", "a prompt")
    return found


def small(shape: Shape, device: str) -> dict[str, Any]:
    """Time tokens and prompts of a shape."""
    click.echo(f"  {shape.name}")
    return {"resident": resident(shape, device), "prompts": prompts(shape, device)}


def _time_prompts(segment: Segment, share: float, drawn: list[torch.Tensor], found: dict[str, float]) -> None:
    """Time all prompts but the first three; adds to `found`."""
    prompts_of_segment(segment, drawn[:3])
    counts = segment.residency.counts
    before = sum(counts.load_bytes)
    found[f"ours, {share:.0%} of the experts in slots"] = prompts_of_segment(segment, drawn[3:])
    if share < 1:
        num_bytes = (sum(counts.load_bytes) - before) / (len(drawn) - 3)
        found["  its bytes over the link alone"] = 1e3 * num_bytes / link_rate(segment)


def _print_ms(found: dict[str, float], against: str, of_what: str = "a token") -> None:
    for name, value in found.items():
        click.echo(f"  {name:36s}{value:9.3f} ms {of_what}{found[against] / value:9.2f} ×")


_COLUMNS = (
    "ms",
    "trunk",
    "experts",
    "waits",
    "host",
    "loads",
    "hits %",
    "MB",
    "link",
    "GB/s",
    "floor",
    "× floor",
    "ahead",
)


def _print_head(resident_ms: float) -> None:
    click.echo(f"  all experts resident: {resident_ms:.3f} ms a token; below: ms a token, and columns of it")
    click.echo(f"  {'':26s}" + "".join(f"{head:>9s}" for head in _COLUMNS) + "  came true, replaced, by")


def _print_arm(name: str, arm: dict[str, Any]) -> None:
    figures = [arm["ms"], *arm["split"].values(), arm["loads_per_token"], 100 * arm["hit_rate"]]
    figures += [arm["bytes_per_token"] / 1e6, arm["link_ms"], arm["link_bytes_per_s"] / 1e9, arm["floor_ms"]]
    figures += [arm["against_floor"], arm["prefetched_per_token"]]
    rest = f"{arm['prefetch_hits_per_token']:.1f}, {arm['replaced_share']:.1%}, {arm['services']}"
    click.echo(f"  {name:26s}" + "".join(f"{figure:9.2f}" for figure in figures) + "  " + rest)


def _print_accelerate(found: dict[str, Any]) -> None:
    if "accelerate_ms" in found:
        ratio = found["accelerate_ms"] / found["rates, looking ahead"]["ms"]
        click.echo(f"  accelerate, offload to host memory: {found['accelerate_ms']:.0f} ms, {ratio:.0f} × ours")


if __name__ == "__main__":
    main()
