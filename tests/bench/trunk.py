"""Where the trunk runs, on emulated links and on loopback: ``python -m tests.bench.trunk``.

Four uneven agents, each with a workload of its own, hold one model. The planner's own choice (`--trunk move`) is held
against the trunk at the ingress (its own placement and DanceMoE's) and against both pipelines: time per token and of a
512-token prompt, beside what the model costs on one node, what hops and waits cost on the links, and what `planner
simulate` says. Then the same on loopback, and the throughput of eight sessions over three agents.

Emulated links need Linux, root and /dev/net/tun (`tests.bench.lab`); everything that is compared runs in turn, in one
run, and so does what the simulator's node times follow from (`tests.bench.trunk_compute`); figures are medians over
rounds. `--layers-times 3` does the same with a model three times as deep.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import click
import torch

from runtime.store import prepare_store
from schemas.plan import Plan, load_plan
from tests.bench.deeper import repeat_layers
from tests.bench.emulated import load_average
from tests.bench.given import MODEL, TEXTS
from tests.bench.lab import Lab, NoLab
from tests.bench.site import Grounds, Site, running_site
from tests.bench.trunk_compute import Probes, running_probes
from tests.bench.trunk_scene import (
    PROMPT_TOKENS,
    SHARES,
    WORKLOADS,
    Loopback,
    Setting,
    decode_s,
    long_prompt,
    prompts_of,
    record,
    write_scene,
)
from tests.cluster import Stream, wait_for

QUICK: Final = ("--time-limit", "10")
ARMS: Final = {
    "ours, trunk moves": ("--trunk", "move", *QUICK),
    "ours, prompts counted": ("--trunk", "move", *QUICK),
    "ours, trunk stays": ("--trunk", "stay", *QUICK),
    "dancemoe, trunk stays": ("--trunk", "stay", "--solver", "dancemoe"),
    "pipeline by memory": ("--solver", "pipeline"),
    "pipeline by speed": ("--solver", "pipeline-speed"),
}
OURS, PROMPTS, DANCEMOE, ONE = "ours, trunk moves", "ours, prompts counted", "dancemoe, trunk stays", "one node"
_SIMULATED: Final = 3000  # tokens of each simulation
ASKED: Final = 0.15  # how far the simulator may be off


@dataclass
class Seen:
    """Seconds by (ingress, prompt) over rounds: per decoded token, and of the prompt."""

    decode: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    prefill: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    @property
    def token_s(self) -> float:
        """Seconds per token, mean over prompts of medians over rounds."""
        return statistics.fmean(statistics.median(each) for each in self.decode.values())

    def token_s_of(self, node: str) -> float:
        """The same of one ingress."""
        return statistics.fmean(statistics.median(v) for (name, _), v in self.decode.items() if name == node)

    @property
    def prefill_s(self) -> float:
        """Seconds of the long prompt, mean over ingresses of medians."""
        return statistics.fmean(statistics.median(each) for each in self.prefill.values())


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=MODEL)
@click.option("--texts", type=click.Path(exists=True, path_type=Path), default=TEXTS)
@click.option("--layers-times", default=1, show_default=True, help="Run every layer of the model so many times.")
@click.option("--fill", default=1.3, show_default=True, help="Memory for experts over all experts.")
@click.option("--latency-ms", default=5.0, show_default=True, help="One way, of every link.")
@click.option("--tokens", default=32, show_default=True, help="Of each answer.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--arm", "chosen", type=click.Choice(tuple(ARMS)), multiple=True, help="On links; four by default.")
@click.option("--part", type=click.Choice(("links", "loopback", "sessions")), multiple=True, help="All by default.")
def main(
    model: Path,
    texts: Path,
    layers_times: int,
    fill: float,
    latency_ms: float,
    tokens: int,
    rounds: int,
    chosen: tuple[str, ...],
    part: tuple[str, ...],
) -> None:
    """Measure, simulate, compare."""
    torch.set_num_threads(1)
    parts = part or ("links", "loopback", "sessions")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        path = Path(directory)
        if layers_times > 1:
            model = repeat_layers(model, layers_times, path / "model")
        prepare_store(model, path / "store", dtype="float32")
        record(path, model, texts)
        guess = Setting(model, texts, path, fill, latency_ms, {"expert_us": 50.0})
        probes = stack.enter_context(running_probes(path, guess))
        setting = replace(guess, compute=first_look(probes))
        if "links" in parts:
            arms = {arm: ARMS[arm] for arm in chosen or (OURS, PROMPTS, "pipeline by speed", DANCEMOE)}
            print_links(path, setting, probes, arms, tokens=tokens, rounds=rounds)
        if "loopback" in parts:
            print_loopback(path, setting, tokens=tokens, rounds=rounds)
        if "sessions" in parts:
            print_sessions(path, setting)


def first_look(probes: Probes) -> dict[str, float]:
    """Measure node times once to plan with."""
    for _ in range(2):
        probes.forget()
        probes.measure("code")
        probes.measure_rest()
    return told("node times planned with", probes.compute())


def told(what: str, compute: dict[str, float]) -> dict[str, float]:
    """Print a compute block and return it."""
    click.echo(f"{what}: {', '.join(f'{name} {value:.2f}' for name, value in compute.items())}")
    return compute


def measure(
    sites: Mapping[str, Site], setting: Setting, *, tokens: int, rounds: int, probes: Probes | None = None
) -> dict[str, Seen]:
    """Decode every prompt on every cluster in turn; the first round warms up and is not kept."""
    found = {name: Seen() for name in sites}
    for turn in range(rounds + 1):
        if turn == 1 and probes is not None:
            probes.forget()
        for node, workload in zip(SHARES, WORKLOADS, strict=True):
            for number, prompt in enumerate(prompts_of(setting.texts, workload)):
                for name, site in sites.items():
                    answer = site.generate(entry(site, node), prompt, tokens)
                    if turn:
                        found[name].decode[node, number].append(decode_s(answer))
                        found[name].tokens[node, number] = answer["tokens"]
            whole = long_prompt(setting, workload)
            for name, site in sites.items():
                answer = site.generate(entry(site, node), whole, 1)
                if turn:
                    found[name].prefill[node].append(float(answer["prefill_s"]))
            if probes is not None:
                probes.measure(workload)
        if probes is not None:
            probes.measure_rest()
        click.echo(f"round {turn} of {rounds}, {load_average()}", err=True)
    return found


def entry(site: Site, node: str) -> str:
    """Where a prompt enters: at its node, or at the only one."""
    return node if node in site.nodes else next(iter(site.nodes))


def ring_hops(plan: Plan, ingress: str) -> int:
    """Hops of a token's way round."""
    segments = next(path.segments for path in plan.trunk if path.ingress == ingress)
    nodes = [segment.node for segment in segments]
    return sum(a != b for a, b in zip(nodes, [*nodes[1:], nodes[0]], strict=True))


def layers_waiting(plan: Plan, ingress: str) -> float:
    """Layers in which a token waits for an expert elsewhere, as planned."""
    share = next(node.any_remote_share for node in plan.summary.nodes if node.id == ingress)
    return (share or 0.0) * plan.model.layers


def sites_of(
    stack: ExitStack,
    lab: Grounds,
    path: Path,
    setting: Setting,
    name: str,
    arms: Mapping[str, tuple[str, ...]],
    *,
    tokens: int,
) -> dict[str, Site]:
    """Run a cluster per arm, and one node that holds everything, all at once."""
    scene = write_scene(path / name, setting, SHARES, sessions=1, tokens=768)
    prompts = {"prompt_tokens": PROMPT_TOKENS, "answer_tokens": tokens}
    counted = write_scene(path / f"{name}-prompts", setting, SHARES, sessions=1, tokens=768, prompts=prompts)
    alone = write_scene(path / f"{name}-one", setting, {"only": 1.0}, sessions=1, tokens=768)
    sites = {ONE: Site(lab, alone, path / f"{name}-site", path / "store", 7400)}
    for number, arm in enumerate(arms, start=1):
        mine = counted if arm == PROMPTS else scene
        sites[arm] = Site(lab, mine, path / f"{name}-site{number}", path / "store", 7400 + number)
    for arm, site in sites.items():
        stack.enter_context(running_site(site, *arms.get(arm, ())))
    return sites


def print_links(
    path: Path, setting: Setting, probes: Probes, arms: Mapping[str, tuple[str, ...]], *, tokens: int, rounds: int
) -> None:
    """Compare arms on emulated links."""
    with ExitStack() as stack:
        scene = write_scene(path / "lines", setting, SHARES, sessions=1, tokens=768)
        try:
            lab = stack.enter_context(Lab(len(SHARES), scene.lines()))
        except NoLab as error:
            raise click.ClickException(str(error)) from error
        sites = sites_of(stack, lab, path, setting, "links", arms, tokens=tokens)
        seen = measure(sites, setting, tokens=tokens, rounds=rounds, probes=probes)
    compute = told("node times simulated with", probes.compute())
    simulated = {arm: simulate(sites[arm], compute, tokens) for arm in arms}
    click.echo(f"\n{setting.latency_ms:g} ms links, 500 Mbit/s, fill {setting.fill}: ms per token, {load_average()}")
    print_table(sites, seen, setting)
    print_agreement(seen, simulated)


def print_table(sites: Mapping[str, Site], seen: Mapping[str, Seen], setting: Setting) -> None:
    """Print decode and prefill of every arm beside what compute, hops and waits alone would cost.

    `waits` are the layers of a token that wait for an expert elsewhere, a round trip each; compute is that of one node.
    """
    one = seen[ONE]
    click.echo(
        f"{'':24s}  decode  hops  waits  compute+hops  ratio  +round trips  ratio  dancemoe/this"
        "   prefill 512  compute+hops  ratio"
    )
    for arm, found in seen.items():
        hops, waits = 0.0, 0.0
        if arm != ONE:
            plan = load_plan(sites[arm].plan)
            hops = statistics.fmean(ring_hops(plan, node) for node in SHARES)
            waits = statistics.fmean(layers_waiting(plan, node) for node in SHARES)
        link = hops * setting.latency_ms / 1e3
        floor, prefill_floor = one.token_s + link, one.prefill_s + link
        waited = floor + waits * 2 * setting.latency_ms / 1e3
        same = all(found.tokens[key] == one.tokens[key] for key in found.tokens)
        click.echo(
            f"{arm:24s}{found.token_s * 1e3:8.2f}{hops:6.1f}{waits:7.2f}"
            f"{floor * 1e3:14.2f}{found.token_s / floor:7.2f}{waited * 1e3:14.2f}{found.token_s / waited:7.2f}"
            f"{seen[DANCEMOE].token_s / found.token_s if DANCEMOE in seen else float('nan'):15.2f}"
            f"{found.prefill_s * 1e3:14.1f}{prefill_floor * 1e3:14.1f}{found.prefill_s / prefill_floor:7.2f}"
            f"  {'same tokens as one node' if same else 'OTHER TOKENS than one node'}"
        )


def simulate(site: Site, compute: dict[str, float], tokens: int) -> dict[str, tuple[float, float]]:
    """Return what the simulator says of each ingress: seconds per token, and of the long prompt."""
    prompts = {"prompt_tokens": PROMPT_TOKENS, "answer_tokens": tokens}
    found: dict[str, tuple[float, float]] = {}
    for node in SHARES:
        figures: dict[str, Any] = site.simulate(node, compute, None, prompts, tokens=_SIMULATED)
        found[node] = float(figures["mean_s"]), float(figures["first_token"]["mean_s"])
    return found


def print_agreement(seen: Mapping[str, Seen], simulated: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Print simulated over measured times of every arm and ingress."""
    for number, what in enumerate(("ms per token", "prompt of 512 tokens")):
        click.echo(f"\nsimulated {what} / measured, by ingress ({ASKED:.0%} are asked)")
        for arm, by_node in simulated.items():
            measured = [
                seen[arm].token_s_of(node) if number == 0 else statistics.median(seen[arm].prefill[node])
                for node in by_node
            ]
            ratios = [times[number] / took for times, took in zip(by_node.values(), measured, strict=True)]
            each = "  ".join(f"{node} {ratio:5.3f}" for node, ratio in zip(by_node, ratios, strict=True))
            click.echo(f"{arm:24s}{each}  mean {statistics.fmean(ratios):5.3f}")


def print_loopback(path: Path, setting: Setting, *, tokens: int, rounds: int) -> None:
    """Compare the planner's own choice with both extremes where links cost next to nothing."""
    near = replace(setting, latency_ms=0.05)
    arms = {arm: ARMS[arm] for arm in (OURS, "ours, trunk stays", "pipeline by memory")}
    with ExitStack() as stack:
        sites = sites_of(stack, Loopback(), path, near, "loopback", arms, tokens=tokens)
        seen = measure(sites, near, tokens=tokens, rounds=rounds)
    click.echo(f"\nloopback, planned with 0.05 ms links: ms per token, {load_average()}")
    print_table(sites, seen, near)


def print_sessions(path: Path, setting: Setting) -> None:
    """Tokens per second of one session and of eight at once, three agents with whole layers each."""
    near = replace(setting, fill=1.1, latency_ms=0.05)
    scene = write_scene(path / "three", near, {"a": 0.33, "b": 0.33, "c": 0.34}, sessions=8, tokens=256)
    with running_site(
        Site(Loopback(), scene, path / "three-site", path / "store", 7400), "--solver", "pipeline"
    ) as site:
        prompt = prompts_of(setting.texts, "code")[0]
        rates: dict[int, list[float]] = defaultdict(list)
        for _ in range(4):
            for sessions in (1, 8):
                rates[sessions].append(throughput(site, prompt, sessions))
        one, eight = (statistics.median(rates[n][1:]) for n in (1, 8))
        hops = ring_hops(load_plan(site.plan), "a")
    click.echo(f"\nthree agents on loopback, whole layers, {hops} hops, {load_average()}")
    click.echo(f"one session {one:.1f} tokens/s, eight sessions {eight:.1f} tokens/s: {eight / one:.2f} times")


def throughput(site: Site, prompt: str, sessions: int, tokens: int = 96) -> float:
    """Tokens per second of all sessions together, prompts left out."""
    streams = [Stream("a", site.coordinator, prompt, tokens) for _ in range(sessions)]
    wait_for(lambda: all(s.answer.tokens or s.error for s in streams), timeout_s=60, what="first tokens")
    began, before = time.perf_counter(), sum(len(s.answer.tokens) for s in streams)
    total = sum(len(stream.tokens()) for stream in streams)
    return (total - before) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
