"""The simulator against real agents on emulated links, for the quickstart: ``python -m tests.bench.emulated``.

Coordinator and agents of the quickstart run in network namespaces whose links have the topology's latency and
bandwidth (`tests.bench.lab`: Linux, root, /dev/net/tun). Prompts of each ingress's workload are decoded greedily, one
at a time; what a token took is held against `planner simulate` of the same plan on the same topology. The simulator
gets node times that were measured on plain loopback in the same run (`tests.bench.calibration`), and the routing of
the very tokens that were decoded, so that only its timing is judged; a second column replays the workload's recorded
trace instead. A second cluster runs DanceMoE's plan. Everything is measured in turn; an answer's time is the median
over rounds.
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
import torch

from runtime.loading import load_tokenizer, load_whole
from runtime.recorder import Trace, record_pieces
from runtime.store import prepare_store
from tests.bench.calibration import Experts, Loopback, Measured, loopback
from tests.bench.lab import Lab, NoLab
from tests.bench.quickstart import PROMPTS, SCENE
from tests.bench.site import Site, running_site
from tests.cluster import MODEL, spec

ASKED = 0.15
ARMS = {"default": (), "dancemoe": ("--solver", "dancemoe")}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often every prompt is decoded.")
@click.option("--tokens", default=40, show_default=True, help="Of each answer.")
def main(rounds: int, tokens: int) -> None:
    """Measure, simulate, compare."""
    torch.set_num_threads(1)
    topology = SCENE.topology()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        path = Path(directory)
        prepare_store(MODEL, path / "store", dtype="float32")
        try:
            lab = stack.enter_context(Lab(len(topology.nodes), SCENE.lines()))
        except NoLab as error:
            raise click.ClickException(str(error)) from error
        print_links(lab, "nothing running yet")
        sites = {
            name: stack.enter_context(
                running_site(Site(lab, SCENE, path / name, path / "store", 7400 + number), *options)
            )
            for number, (name, options) in enumerate(ARMS.items())
        }
        plain = stack.enter_context(loopback(path, path / "store"))
        experts = Experts(path / "store")
        measured = measure(sites, plain, experts, rounds=rounds, tokens=tokens)
        compute = plain.compute(experts.by_tier())
        print_compute(plain, compute)
        print_links(lab, "all agents running")
        traces = record(path, measured["default"])
        simulated = {name: print_agreement(name, site, measured[name], compute, traces) for name, site in sites.items()}
        print_plans(measured, simulated)


def measure(
    sites: dict[str, Site], plain: Loopback, experts: Experts, *, rounds: int, tokens: int
) -> dict[str, dict[str, Measured]]:
    """Decode every prompt on every cluster in turn; by arm and ingress. The first round warms up and is not kept."""
    found = {name: {node.id: Measured() for node in SCENE.topology().nodes} for name in sites}
    for turn in range(rounds + 1):
        for number in range(len(PROMPTS["code"])):
            for node in SCENE.topology().nodes:
                assert node.ingress
                prompt = PROMPTS[node.ingress.workload][number]
                for name, site in sites.items():
                    answer = site.generate(node.id, prompt, tokens)
                    if turn:
                        found[name][node.id].add(prompt, answer)
            if turn:
                plain.measure(list(PROMPTS.values())[number % len(PROMPTS)][number], tokens)
                experts.measure()
        click.echo(f"round {turn} of {rounds}, {load_average()}", err=True)
    return found


def record(path: Path, measured: dict[str, Measured]) -> dict[str, tuple[str, Path]]:
    """Record the routing of the tokens that were decoded, prompts left out, as a trace; (workload, file) by ingress."""
    model, tokenizer, shape = load_whole(MODEL, dtype="float32"), load_tokenizer(MODEL), spec()
    traces = {}
    for node in SCENE.topology().nodes:
        assert node.ingress
        workload, answers = node.ingress.workload, measured[node.id].answers
        prompts = [tokenizer(prompt)["input_ids"] for prompt in answers]
        pieces = [ids + answer["tokens"][:-1] for ids, answer in zip(prompts, answers.values(), strict=True)]
        chosen = record_pieces(model, pieces, width=shape.top_k)
        decoded = [slice(len(ids), None) for ids in prompts]
        lengths = [len(piece) - len(ids) for piece, ids in zip(pieces, prompts, strict=True)]
        trace = Trace(
            model=shape.id, experts=shape.experts, top_k=shape.top_k, workload=workload,
            expert_ids=np.concatenate([each.expert_ids[part] for each, part in zip(chosen, decoded, strict=True)]),
            scores=np.concatenate([each.scores[part] for each, part in zip(chosen, decoded, strict=True)]),
            sequence=np.repeat(np.arange(len(pieces), dtype=np.int32), lengths),
        )  # fmt: skip
        traces[node.id] = workload, path / f"decoded-{workload}.safetensors"
        trace.write(traces[node.id][1])
    return traces


def print_links(lab: Lab, when: str) -> None:
    """Say what the emulator makes of each link."""
    topology = SCENE.topology()
    click.echo(f"\n{load_average()}, {when}")
    click.echo("link                declared round trip   measured (TCP, 900 B each way)")
    for link, (pair, line) in zip(topology.links, SCENE.lines().items(), strict=True):
        declared = 2 * line.delay_s + 2 * 900 / line.bandwidth
        took = lab.round_trip_s(*pair)
        click.echo(f"{' – '.join(link.between):20s}{declared * 1e3:12.3f} ms{took * 1e3:16.3f} ms")


def print_compute(plain: Loopback, compute: dict[str, Any]) -> None:
    whole, calling = plain.whole_seen.token_s, plain.calling_seen.token_s
    click.echo(f"\non loopback: {whole * 1e3:.3f} ms per token with all experts here, {calling * 1e3:.3f} ms with none")
    click.echo("node times for the simulator: " + ", ".join(f"{name} {show(value)}" for name, value in compute.items()))


def print_agreement(
    arm: str, site: Site, measured: dict[str, Measured], compute: dict[str, Any], traces: dict[str, tuple[str, Path]]
) -> dict[str, float]:
    """Print measured and simulated ms per token by ingress, and their ratio; return what was simulated, in seconds."""
    heading = f"{arm} plan, ms per token"
    click.echo(f"\n{heading:28s}measured  simulated  ratio  (network  software  compute)  workload's trace  ratio")
    found, others = {}, {}
    for node, seen in measured.items():
        same, recorded = (site.simulate(node, compute, trace) for trace in (traces[node], None))
        found[node], others[node] = same["mean_s"], recorded["mean_s"]
        network, software, evaluation = (
            same["waits"][f"{part}_s"] * 1e3 for part in ("network", "overhead", "compute")
        )
        click.echo(
            f"{node:28s}{seen.token_s * 1e3:8.3f}{found[node] * 1e3:11.3f}{found[node] / seen.token_s:7.3f}"
            f"{network:10.3f}{software:10.3f}{evaluation:9.3f}"
            f"{others[node] * 1e3:19.3f}{others[node] / seen.token_s:7.3f}"
        )
    ratios = [found[node] / seen.token_s for node, seen in measured.items()]
    off = fmean(abs(ratio - 1) for ratio in ratios)
    click.echo(f"{'mean ratio':47s}{fmean(ratios):7.3f}  off by {off:.1%} on average, {ASKED:.0%} are allowed"
               f"{fmean(others[node] / seen.token_s for node, seen in measured.items()):16.3f}")  # fmt: skip
    return found


def print_plans(measured: dict[str, dict[str, Measured]], simulated: dict[str, dict[str, float]]) -> None:
    """Compare the two plans on real agents, ingresses weighted by their token rates as in the objective."""
    rates = {node.id: node.ingress.tokens_per_s for node in SCENE.topology().nodes if node.ingress}
    click.echo("\nms per token on real agents   default   dancemoe  ratio  simulated ratio")
    took = {arm: {node: each.token_s for node, each in found.items()} for arm, found in measured.items()}
    for node in rates:
        print_pair(node, *(took[arm][node] for arm in ARMS), *(simulated[arm][node] for arm in ARMS))
    total = {
        name: [sum(rate * found[arm][node] for node, rate in rates.items()) / sum(rates.values()) for arm in ARMS]
        for name, found in (("took", took), ("simulated", simulated))
    }
    print_pair("by token rate", *total["took"], *total["simulated"])


def print_pair(name: str, ours: float, theirs: float, ours_simulated: float, theirs_simulated: float) -> None:
    ratio = ours_simulated / theirs_simulated
    click.echo(f"{name:28s}{ours * 1e3:9.3f}{theirs * 1e3:11.3f}{ours / theirs:7.3f}{ratio:17.3f}")


def load_average() -> str:
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"


def show(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}"


if __name__ == "__main__":
    main()
