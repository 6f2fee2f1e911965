"""Who waits for another node, under a quality budget: ``python -m tests.bench.waits``.

Three uneven agents (25, 30 and 45 % of 1.6 times the memory of all experts), one with code, one with math and dialogue,
one with prose and French. Text that calibration and placement never saw is scored token by token, through the agents as
they run: under DanceMoE's placement with exact routing, and under the planner's own placement while agents spend a
quality budget, which was calibrated on calibration text alone. Then both again with the trunk moving. Perplexity is of
the same pieces of text in every row, so that its rise is known better than itself; intervals are 95 %.
"""

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
import torch
import yaml

from agent.client import Answer, stream
from planner.control.transport import ControlClient
from runtime.calibrate import Rise
from runtime.forcing import cut_pieces
from runtime.loading import load_tokenizer
from runtime.recorder import read_texts, record_trace
from runtime.store import prepare_store
from schemas.checkpoint import read_checkpoint
from schemas.messages import StatusReport, StatusRequest
from schemas.model import HeldDtype
from schemas.plan import load_plan, write_plan
from tests.bench.emulated import load_average
from tests.bench.given import MODEL, TEXTS
from tests.bench.site import Scene, Site
from tests.bench.trunk import Loopback
from tests.cluster import AGENT, call, free_port

SHARES: Final = {"n1": 0.25, "n2": 0.30, "n3": 0.45}
DOMAINS: Final = {"n1": ("code",), "n2": ("math", "dialogue"), "n3": ("prose", "french")}
_WINDOW: Final = 256
_TRACED: Final = 6000
_HEARTBEATS_S: Final = 1.5


@dataclass(frozen=True)
class Seen:
    """What the agents of an arm met.

    Attributes
    ----------
    nll
        Mean negative log-likelihood of each piece of text, by node.
    waits, calls, wait_s, hops
        Share of (token, layer) events that waited for another node, by node; expert calls, seconds of waits for them,
        and hops of a token, over all nodes.
    """

    nll: Mapping[str, list[float]]
    waits: Mapping[str, float]
    calls: float
    wait_s: float
    hops: float
    standing: Mapping[str, str]

    @property
    def any_remote(self) -> float:
        """Mean share of events that waited."""
        return statistics.fmean(self.waits.values())


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=MODEL)
@click.option("--texts", type=click.Path(exists=True, path_type=Path), default=TEXTS)
@click.option("--fill", default=1.6, show_default=True, help="Memory for experts over all experts.")
@click.option("--latency-ms", default=5.0, show_default=True, help="One way, of every link, to plan with.")
@click.option("--budget", default="0.5 %", show_default=True)
@click.option("--calibrated", default=12288, show_default=True, help="Tokens of calibration text for each node.")
@click.option("--tokens", default=3072, show_default=True, help="To score at each node.")
@click.option("--part", type=click.Choice(("stay", "move")), multiple=True, help="Both by default.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep plans and calibrations here, and use them again.")
def main(
    model: Path,
    texts: Path,
    fill: float,
    latency_ms: float,
    budget: str,
    calibrated: int,
    tokens: int,
    part: tuple[str, ...],
    keep: Path | None,
) -> None:
    """Place, calibrate, score, compare."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        prepare_store(model, path / "store", dtype="float32")
        record(path, model, texts)
        exact = write_scene(path / "exact", model, path, fill=fill, latency_ms=latency_ms)
        spending = write_scene(path / "spending", model, path, fill=fill, latency_ms=latency_ms, budget=budget)
        pieces = {node: list(eval_pieces(model, texts, DOMAINS[node], tokens)) for node in SHARES}
        bench = Bench(path, model, texts, calibrated, pieces, keep)
        for trunk in part or ("stay", "move"):
            options = ("--trunk", trunk)
            base = (*options, "--solver", "dancemoe") if trunk == "stay" else options
            before = bench.run(f"{trunk}-exact", exact, base)
            after = bench.run(f"{trunk}-spending", spending, options)
            name = "DanceMoE's placement, exact" if trunk == "stay" else "the planner's, trunk moving, exact"
            show(name, before, before)
            show(f"the planner's, trunk {trunk}s, budget {budget}".replace("moves", "moving"), after, before)
        click.echo(load_average())


@dataclass
class Bench:
    """Runs arms one after another, each on agents of its own."""

    path: Path
    model: Path
    texts: Path
    calibrated: int
    pieces: Mapping[str, list[str]]
    keep: Path | None

    def run(self, name: str, scene: Scene, options: tuple[str, ...]) -> Seen:
        """Solve, calibrate where the plan has a budget, start agents, score the text."""
        site = Site(Loopback(), scene, self.path / f"site-{name}", self.path / "store", free_port())
        kept = self.keep / name if self.keep else None
        if kept and kept.exists():
            plan = load_plan(kept / "plan.json")
            write_plan(site.plan, plan.model_copy(update={"coordinator": site.coordinator}))
        else:
            site.solve(*options)
        if load_plan(site.plan).quality_budget:
            self.calibrate(site, kept if kept and kept.exists() else None)
        if kept and not kept.exists():
            kept.mkdir(parents=True)
            for file in (site.plan, *site.path.glob("calibration-*.json")):
                (kept / file.name).write_text(file.read_text())
        try:
            site.start()
            return self.score(site)
        finally:
            site.stop()

    def calibrate(self, site: Site, kept: Path | None) -> None:
        """Measure each node's shares on calibration text, under the site's plan."""
        plan, scene = load_plan(site.plan), site.scene
        for node, domains in DOMAINS.items():
            file = site.path / f"calibration-{node}.json"
            if kept is not None:
                file.write_text((kept / file.name).read_text())
            else:
                texts = [option for d in domains for option in ("--text", str(self.texts / d / "calibration.jsonl"))]
                run_agent(
                    "calibrate", str(self.model), *texts, "-o", str(file), "--plan", str(site.plan), "--node", node,
                    "--budget", f"{100 * (plan.quality_budget or 0)} %", "--tokens", str(self.calibrated),
                )  # fmt: skip
            found = json.loads(file.read_text())["settings"][0]
            click.echo(
                f"{node}: calibrated {found['rise']:+.2%} ({found['low']:+.2%} … {found['high']:+.2%}), "
                f"{found['waits_share']:.1%} of the waits"
            )
            config = scene.path / f"{node}.yaml"
            config.write_text(
                yaml.safe_dump({**yaml.safe_load(config.read_text()), "quality": {"calibration": str(file)}})
            )

    def score(self, site: Site) -> Seen:
        """Score every node's pieces, all nodes at once, one piece at a time each."""
        with ThreadPoolExecutor(len(self.pieces)) as pool:
            scored = pool.map(lambda node: list(score(site, node, self.pieces[node])), self.pieces)
            nll = dict(zip(self.pieces, scored, strict=True))
        time.sleep(_HEARTBEATS_S)
        with ControlClient(site.coordinator) as client:
            report = client.ask(StatusRequest())
        assert isinstance(report, StatusReport)
        ran = [node for node in report.nodes if node.any_remote_share is not None]
        tokens = sum(node.tokens for node in report.nodes)
        return Seen(
            nll=nll,
            waits={node.id: node.any_remote_share or 0.0 for node in ran},
            calls=sum((node.calls_per_token or 0.0) * node.ran_tokens for node in ran) / tokens,
            wait_s=sum((node.call_wait_per_token_s or 0.0) * node.ran_tokens for node in ran) / tokens,
            hops=sum((node.hops_per_token or 0.0) * node.ran_tokens for node in ran) / tokens,
            standing={node.id: node.quality.standing if node.quality else "exact" for node in ran},
        )


def score(site: Site, node: str, pieces: Sequence[str]) -> Iterator[float]:
    """Yield the mean negative log-likelihood of each piece of text, as the agents decode it."""
    for piece in pieces:
        answer = Answer()
        for _ in stream(node, site.coordinator, answer, prompt=piece, max_tokens=_WINDOW, score=True):
            pass
        yield statistics.fmean(answer.nll)


def show(name: str, seen: Seen, base: Seen) -> None:
    """Print an arm beside the one that it is held against."""
    rise = Rise.of(np.array([a - b for node in seen.nll for a, b in zip(seen.nll[node], base.nll[node], strict=True)]))
    low, high = (math.expm1(rise.mean + sign * 1.96 * rise.error) for sign in (-1, 1))
    waits = ", ".join(f"{node} {share:.3f} ({seen.standing[node]})" for node, share in seen.waits.items())
    ratio = f" = {seen.any_remote / base.any_remote:.1%} of it" if base.any_remote and seen is not base else ""
    click.echo(f"{name}")
    click.echo(f"  events that wait {seen.any_remote:.3f}{ratio}: {waits}")
    click.echo(
        f"  a token: {seen.calls:.2f} expert calls, {1e3 * seen.wait_s:.2f} ms of waits for them, {seen.hops:.2f} hops"
    )
    if seen is not base:
        click.echo(f"  perplexity {math.expm1(rise.mean):+.2%} ({low:+.2%} … {high:+.2%})")
        for node in seen.nll:
            own = Rise.of(np.array(seen.nll[node]) - np.array(base.nll[node]))
            click.echo(f"    {node}: {math.expm1(own.mean):+.2%} ± {1.96 * own.error:.2%}")


def write_scene(
    path: Path,
    model: Path,
    traces: Path,
    *,
    fill: float,
    latency_ms: float,
    budget: str | None = None,
    dtype: HeldDtype = "float32",
) -> Scene:
    """Write topology and configs of the three nodes; their traces are there."""
    path.mkdir()
    spec, nodes = read_checkpoint(model).model_spec.held_as(dtype), []
    context = {"tokens": 2 * _WINDOW, "sessions": 1}
    beside = spec.trunk_bytes + spec.kv_bytes(tokens=2 * _WINDOW, sessions=1)
    for node, share in SHARES.items():
        slots = round(share * fill * spec.layers * spec.experts)
        memory = {"device": f"{beside + slots * spec.expert_bytes} B", "host": "0 B", "disk": "0 B"}
        ingress = {"workload": node, "tokens_per_s": 1}
        nodes.append({"id": node, "memory": memory, "compute": {"expert_us": 100.0}, "ingress": ingress})
        config = {"node": node, "memory": memory, "dtype": dtype, "context": context, "peer_cache": False}
        if len(nodes) == 1:
            config["store"] = "store"
        (path / f"{node}.yaml").write_text(yaml.safe_dump(config))
    links = [
        {"between": [a, b], "latency": f"{latency_ms} ms", "bandwidth": "500 Mbit/s"}
        for a, b in itertools.combinations(SHARES, 2)
    ]
    document = {
        "cluster": "waits", "model": str(model), "dtype": dtype, "nodes": nodes, "links": links, "context": context,
        "workloads": {node: str(traces / f"{node}.safetensors") for node in SHARES},
        **({"quality": {"budget": budget}} if budget else {}),
    }  # fmt: skip
    (path / "topology.yaml").write_text(yaml.safe_dump(document))
    return Scene(path, model)


def record(path: Path, model: Path, texts: Path) -> None:
    """Record the routing of each node's calibration text, its domains by turns."""
    for node, domains in DOMAINS.items():
        each = (read_texts([texts / domain / "calibration.jsonl"]) for domain in domains)
        text = itertools.chain.from_iterable(zip(*each, strict=False))
        record_trace(model, text, workload=node, max_tokens=_TRACED, dtype="float32").write(
            path / f"{node}.safetensors"
        )


def eval_pieces(model: Path, texts: Path, domains: Sequence[str], tokens: int) -> Iterator[str]:
    """Yield pieces of evaluation text of about a window's tokens, an equal part of each domain."""
    tokenizer = load_tokenizer(model)
    for domain in domains:
        ids = (tokenizer(t, verbose=False)["input_ids"] for t in read_texts([texts / domain / "eval.jsonl"]))
        cut = cut_pieces(ids, window=_WINDOW - 1, max_tokens=tokens // len(domains))
        yield from (str(tokenizer.decode(piece)) for piece in cut.tolist())


def run_agent(*arguments: str) -> None:
    """Run an agent command that needs no cluster."""
    done = call(*AGENT, *arguments, timeout_s=1800)
    if done.returncode:
        raise SystemExit(f"agent {arguments[0]} failed: {done.stderr}")


if __name__ == "__main__":
    main()
