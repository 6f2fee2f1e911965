"""Where the trunk runs, on emulated links and on loopback: ``python -m tests.bench.trunk``.

Four uneven agents, each with a workload of its own, hold one model. The planner's own choice (`--trunk move`) is held
against the trunk at the ingress (its own placement and DanceMoE's) and against both pipelines: time per token and of a
512-token prompt, beside what the model costs on one node and what the links cost on the path, and beside what
`planner simulate` says. Then the same on loopback, and the throughput of eight sessions over three agents.

Emulated links need Linux, root and /dev/net/tun (`tests.bench.lab`); everything that is compared runs in turn, in one
run; figures are medians over rounds.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import torch
import yaml

from runtime.loading import load_tokenizer
from runtime.recorder import read_texts, record_trace
from runtime.store import prepare_store
from schemas.checkpoint import read_checkpoint
from schemas.model import ModelSpec
from schemas.plan import Plan, load_plan
from tests.bench.calibration import Experts
from tests.bench.emulated import load_average
from tests.bench.lab import Lab, NoLab
from tests.bench.site import Grounds, Scene, Site, running_site
from tests.cluster import Stream, wait_for

SHARED: Final = Path(__file__).parents[3] / "shared"
SHARES: Final = {"small": 0.15, "low": 0.20, "mid": 0.25, "large": 0.40}
WORKLOADS: Final = ("code", "math", "dialogue", "prose")
ARMS: Final = {
    "ours, trunk moves": ("--trunk", "move"),
    "ours, trunk stays": ("--trunk", "stay"),
    "dancemoe, trunk stays": ("--trunk", "stay", "--solver", "dancemoe"),
    "pipeline by memory": ("--solver", "pipeline"),
    "pipeline by speed": ("--solver", "pipeline-speed"),
}
OURS, DANCEMOE = "ours, trunk moves", "dancemoe, trunk stays"
PROMPT_TOKENS: Final = 512


class Loopback:
    """A lab without emulation: every node on an address of this machine's loopback."""

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """Run where everything runs; loopback addresses of all nodes are there anyway."""
        del number
        return list(command)


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


@dataclass(frozen=True)
class Setting:
    """What every scene is made from."""

    model: Path
    texts: Path
    traces: Path
    fill: float
    latency_ms: float
    compute: Mapping[str, float]

    @property
    def spec(self) -> ModelSpec:
        return read_checkpoint(self.model).model_spec.held_as("float32")


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=SHARED / "models" / "tinymoe-base")
@click.option("--texts", type=click.Path(exists=True, path_type=Path), default=SHARED / "data" / "text")
@click.option("--fill", default=1.3, show_default=True, help="Memory for experts over all experts.")
@click.option("--latency-ms", default=5.0, show_default=True, help="One way, of every link.")
@click.option("--tokens", default=48, show_default=True, help="Of each answer.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--arm", "chosen", type=click.Choice(tuple(ARMS)), multiple=True, help="On links; all by default.")
@click.option("--part", type=click.Choice(("links", "loopback", "sessions")), multiple=True, help="All by default.")
def main(
    model: Path,
    texts: Path,
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
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        prepare_store(model, path / "store", dtype="float32")
        record(path, model, texts)
        compute = measure_compute(path, model, texts)
        click.echo(f"node times: {', '.join(f'{name} {value:.1f}' for name, value in compute.items())}")
        setting = Setting(model, texts, path, fill, latency_ms, compute)
        if "links" in parts:
            print_links(path, setting, {arm: ARMS[arm] for arm in chosen or ARMS}, tokens=tokens, rounds=rounds)
        if "loopback" in parts:
            print_loopback(path, setting, tokens=tokens, rounds=rounds)
        if "sessions" in parts:
            print_sessions(path, setting)


def record(path: Path, model: Path, texts: Path) -> None:
    """Record a trace of each workload's calibration text."""
    for workload in WORKLOADS:
        text = read_texts([texts / workload / "calibration.jsonl"])
        record_trace(model, text, workload=workload, max_tokens=3000, dtype="float32").write(
            path / f"{workload}.safetensors"
        )


def measure_compute(path: Path, model: Path, texts: Path) -> dict[str, float]:
    """Measure a node's compute block on loopback.

    One agent that holds everything, the same with every expert at another agent, and one expert by itself.
    """
    guess = Setting(model, texts, path, 1.0, 0.05, {"expert_us": 50.0})
    alone = write_scene(path / "alone", guess, {"only": 1.0}, sessions=1, tokens=768)
    calling = write_scene(path / "calling", guess, {"only": 0.0, "other": 1.0}, sessions=1, tokens=768)
    token_s, calling_s = (loopback_s(path, scene, guess) for scene in (alone, calling))
    experts = Experts(path / "store")
    experts.measure()
    spec, tiers = guess.spec, experts.by_tier()
    return {
        "expert_us": tiers["device"] * 1e6,
        "host_expert_us": tiers["host"] * 1e6,
        "trunk_layer_us": max(token_s / spec.layers - spec.top_k * tiers["device"], 0.0) * 1e6,
        "call_overhead_us": max(calling_s - token_s, 0.0) / spec.layers * 1e6,
    }


def loopback_s(path: Path, scene: Scene, setting: Setting) -> float:
    """Seconds per token at node `only` of a scene on loopback, the trunk at the ingress."""
    site = Site(Loopback(), scene, path / f"{scene.path.name}-site", path / "store", 7400)
    with running_site(site, "--solver", "dancemoe"):
        prompts = prompts_of(setting.texts, "code") * 3
        return statistics.median(decode_s(site.generate("only", prompt, 64)) for prompt in prompts)


def write_scene(path: Path, setting: Setting, shares: Mapping[str, float], *, sessions: int, tokens: int) -> Scene:
    """Write topology and configs of nodes that share memory for `fill` times all experts, beside trunk and KV cache."""
    path.mkdir()
    spec, nodes = setting.spec, []
    beside = spec.trunk_bytes + spec.kv_bytes(tokens=tokens, sessions=sessions)
    for (node, share), workload in zip(shares.items(), WORKLOADS, strict=False):
        slots = -(-round(share * setting.fill * spec.layers * spec.experts * 1000) // 1000)
        memory = {"device": f"{beside + slots * spec.expert_bytes} B", "host": "0 B", "disk": "0 B"}
        ingress = {"workload": workload, "tokens_per_s": 1}
        nodes.append({"id": node, "memory": memory, "compute": dict(setting.compute), "ingress": ingress})
        config = {
            "node": node,
            "memory": memory,
            "dtype": "float32",
            "context": {"tokens": tokens, "sessions": sessions},
        }
        if len(nodes) == 1:
            config["store"] = "store"
        (path / f"{node}.yaml").write_text(yaml.safe_dump(config))
    names = list(shares)
    links = [
        {"between": [a, b], "latency": f"{setting.latency_ms} ms", "bandwidth": "500 Mbit/s"}
        for number, a in enumerate(names) for b in names[number + 1 :]
    ]  # fmt: skip
    document = {
        "cluster": "bench", "model": str(setting.model), "dtype": "float32", "nodes": nodes, "links": links,
        "context": {"tokens": tokens, "sessions": sessions},
        "workloads": {workload: str(setting.traces / f"{workload}.safetensors") for workload in WORKLOADS[: len(names)]},
    }  # fmt: skip
    (path / "topology.yaml").write_text(yaml.safe_dump(document))
    return Scene(path, setting.model)


def prompts_of(texts: Path, workload: str) -> list[str]:
    """Two short prompts of text that was kept apart."""
    lines = (texts / workload / "eval.jsonl").read_text().splitlines()[:2]
    return [str(json.loads(line)["text"])[:120] for line in lines]


def long_prompt(setting: Setting, workload: str) -> str:
    """Text of about 512 tokens."""
    tokenizer = load_tokenizer(setting.model)
    text = "\n".join(str(json.loads(line)["text"]) for line in (setting.texts / workload / "eval.jsonl").open())
    ids = tokenizer(text[: 5 * PROMPT_TOKENS])["input_ids"][:PROMPT_TOKENS]
    return str(tokenizer.decode(ids))


def decode_s(answer: dict[str, Any]) -> float:
    """Seconds per token after the first."""
    return float(answer["seconds"] - answer["prefill_s"]) / max(len(answer["tokens"]) - 1, 1)


def measure(sites: Mapping[str, Site], setting: Setting, *, tokens: int, rounds: int) -> dict[str, Seen]:
    """Decode every prompt on every cluster in turn; the first round warms up and is not kept."""
    found = {name: Seen() for name in sites}
    for turn in range(rounds + 1):
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


def sites_of(
    stack: ExitStack, lab: Grounds, path: Path, setting: Setting, name: str, arms: Mapping[str, tuple[str, ...]]
) -> dict[str, Site]:
    """Run a cluster per arm, and one node that holds everything, all at once."""
    scene = write_scene(path / name, setting, SHARES, sessions=1, tokens=768)
    alone = write_scene(path / f"{name}-one", setting, {"only": 1.0}, sessions=1, tokens=768)
    sites = {"one node": Site(lab, alone, path / f"{name}-site", path / "store", 7400)}
    for number, arm in enumerate(arms, start=1):
        sites[arm] = Site(lab, scene, path / f"{name}-site{number}", path / "store", 7400 + number)
    for arm, site in sites.items():
        stack.enter_context(running_site(site, *arms.get(arm, ())))
    return sites


def print_links(path: Path, setting: Setting, arms: Mapping[str, tuple[str, ...]], *, tokens: int, rounds: int) -> None:
    """Compare arms on emulated links."""
    with ExitStack() as stack:
        scene = write_scene(path / "lines", setting, SHARES, sessions=1, tokens=768)
        try:
            lab = stack.enter_context(Lab(len(SHARES), scene.lines()))
        except NoLab as error:
            raise click.ClickException(str(error)) from error
        sites = sites_of(stack, lab, path, setting, "links", arms)
        seen = measure(sites, setting, tokens=tokens, rounds=rounds)
        simulated = {arm: dict(simulate(sites[arm], setting)) for arm in arms}
    click.echo(f"\n{setting.latency_ms:g} ms links, 500 Mbit/s, fill {setting.fill}: ms per token, {load_average()}")
    print_table(sites, seen, setting)
    click.echo("\nsimulated ms per token / measured, by ingress")
    for arm in arms:
        ratios = {node: simulated[arm][node] / seen[arm].token_s_of(node) for node in SHARES}
        click.echo(f"{arm:24s}" + "  ".join(f"{node} {ratio:5.3f}" for node, ratio in ratios.items()))


def print_table(sites: Mapping[str, Site], seen: Mapping[str, Seen], setting: Setting) -> None:
    """Print decode and prefill of every arm beside what compute and hops alone would cost."""
    one = seen["one node"]
    click.echo(f"{'':24s}  decode  hops  compute+hops  ratio  dancemoe/this   prefill 512  compute+hops  ratio")
    for arm, found in seen.items():
        hops = 0.0 if arm == "one node" else statistics.fmean(ring_hops(load_plan(sites[arm].plan), n) for n in SHARES)
        link = hops * setting.latency_ms / 1e3
        floor, prefill_floor = one.token_s + link, one.prefill_s + link
        same = all(found.tokens[key] == one.tokens[key] for key in found.tokens)
        click.echo(
            f"{arm:24s}{found.token_s * 1e3:8.2f}{hops:6.1f}{floor * 1e3:14.2f}{found.token_s / floor:7.2f}"
            f"{seen[DANCEMOE].token_s / found.token_s if DANCEMOE in seen else float('nan'):15.2f}"
            f"{found.prefill_s * 1e3:14.1f}{prefill_floor * 1e3:14.1f}{found.prefill_s / prefill_floor:7.2f}"
            f"  {'same tokens as one node' if same else 'OTHER TOKENS than one node'}"
        )


def simulate(site: Site, setting: Setting) -> Iterator[tuple[str, float]]:
    """Yield what the simulator says of each ingress, in seconds per token."""
    for node in SHARES:
        yield node, float(site.simulate(node, dict(setting.compute), None)["mean_s"])


def print_loopback(path: Path, setting: Setting, *, tokens: int, rounds: int) -> None:
    """Compare the planner's own choice with both extremes where links cost next to nothing."""
    near = Setting(setting.model, setting.texts, setting.traces, setting.fill, 0.05, setting.compute)
    arms = {arm: ARMS[arm] for arm in (OURS, "ours, trunk stays", "pipeline by memory")}
    with ExitStack() as stack:
        sites = sites_of(stack, Loopback(), path, near, "loopback", arms)
        seen = measure(sites, near, tokens=tokens, rounds=rounds)
    click.echo(f"\nloopback, planned with 0.05 ms links: ms per token, {load_average()}")
    print_table(sites, seen, near)


def print_sessions(path: Path, setting: Setting) -> None:
    """Tokens per second of one session and of eight at once, three agents with whole layers each."""
    near = Setting(setting.model, setting.texts, setting.traces, 1.1, 0.05, setting.compute)
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
