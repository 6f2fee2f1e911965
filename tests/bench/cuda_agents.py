"""Agents on a CUDA device, against one process on the processor: ``python -m tests.bench.cuda_agents``.

A coordinator and two agents on loopback share one device. Greedy tokens must be those of transformers in float32 on the
processor: with every expert at one node, spread over both, and in host memory; with less of the device, live; and when
the device has no memory left for anybody, or is lost, in the middle of answers. Neither is feigned: another process
takes all that is free, and a kernel reads where it must not.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import click
import torch

from runtime.loading import load_tokenizer, load_whole
from runtime.store import prepare_store
from schemas.plan import Plan
from tests.cluster import AGENT, MODEL, PROMPTS, Cluster, Stream, call, make_plan, running, spread, wait_for

LONG = 600
SESSIONS = 8
FAILING = """
import os, sys, torch
from agent import cli
from runtime.slots import Residency

take = Residency.take
flag = next((each for each in sys.argv if each.endswith(".yaml")), "") + ".lose"

def failing(self, *given):
    if os.path.exists(flag):
        os.unlink(flag)
        torch.zeros(4, device=self.device)[torch.full((1,), 1 << 40, device=self.device)]
        torch.cuda.synchronize()
    return take(self, *given)

Residency.take = failing
cli.main()
"""


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--tokens", default=96, show_default=True)
def main(device: str, tokens: int) -> None:
    """Run everything; ends with an error where an answer differs."""
    torch.set_num_threads(1)
    want = references(tokens)
    context = {"tokens": 1024, "sessions": SESSIONS}
    settings = {"torch_device": device, "absence_timeout_s": 60, "context": context}
    memory = {"device": "64 MiB", "host": "64 MiB", "disk": "64 MiB"}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        prepare_store(MODEL, path / "store", dtype="float32")
        given = {"store": path / "store", "settings": settings, "memory": memory, "agent": ("-c", FAILING)}
        with running(path / "cluster", 2, **given) as cluster:
            click.echo(f"devices: {devices(cluster)}")
            plan = placements(cluster, want, tokens)
            budgets(cluster, want, tokens)
            if torch.cuda.is_available():
                fall(cluster, want, "n0", "out of memory", filled)
                fall(cluster, want, "n1", "lost", lost)
            cluster.reach(make_plan(cluster, spread(cluster.nodes), current=plan))
            require(cluster, want, tokens)
            click.echo(f"a plan applied after that; devices: {devices(cluster)}")


def references(tokens: int) -> dict[str, list[int]]:
    """Return what one process says on the processor, of the first prompt more."""
    tokenizer, model = load_tokenizer(MODEL), load_whole(MODEL, dtype="float32")
    want = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        count = LONG if prompt == PROMPTS[0] else tokens
        with torch.inference_mode():
            out = model.generate(ids, do_sample=False, max_new_tokens=count, attention_mask=torch.ones_like(ids))
        want[prompt] = out[0, ids.shape[1] :].tolist()
    return want


def devices(cluster: Cluster) -> dict[str, str]:
    """Return what each agent says it computes on, and why not on its device."""
    nodes = cluster.status()["nodes"]
    return {node["id"]: node["device_note"] or node["device"] for node in nodes}


def require(cluster: Cluster, want: dict[str, list[int]], tokens: int) -> float:
    """Ask every prompt twice and compare; returns the median of the second answers' milliseconds per token."""
    where, seconds = cluster.locate("n0"), []
    for prompt in PROMPTS * 2:
        began = time.perf_counter()
        got = Stream("n0", cluster.coordinator, prompt, min(tokens, len(want[prompt])), where).tokens()
        seconds.append((time.perf_counter() - began) / len(got))
        compare(got, want[prompt])
    return 1e3 * statistics.median(seconds[len(PROMPTS) :])


def compare(got: list[int], want: list[int]) -> None:
    """End with an error where tokens differ."""
    if got != want[: len(got)] or not got:
        place = next((n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), len(got))
        raise SystemExit(f"token {place} of {len(got)} is another than the processor's")


def placements(cluster: Cluster, want: dict[str, list[int]], tokens: int) -> Plan | None:
    """Apply placements one after the other; returns the last."""
    everything_at = {
        "every expert on n0's device": (lambda *_: ["n0"], "device"),
        "experts spread over n0 and n1": (spread(cluster.nodes), "device"),
        "every other expert in n0's host memory": (
            lambda layer, expert: ["n0" if (layer + expert) % 2 else "n0/host"],
            "device",
        ),
        "every expert in n0's host memory": (lambda *_: ["n0/host"], "device"),
        "three quarters on n0's device, the others at n1": (
            lambda layer, expert: ["n1" if (layer + expert) % 4 == 0 else "n0"],
            "device",
        ),
    }
    for title, (holders, tier) in everything_at.items():
        cluster.reach(make_plan(cluster, holders, current=cluster.active, tier=tier))
        click.echo(f"{title}: the same tokens, {require(cluster, want, tokens):.2f} ms per token")
    return cluster.active


def budgets(cluster: Cluster, want: dict[str, list[int]], tokens: int) -> None:
    """Take most of the device away while an answer is made, and give it back."""
    for budget in ("24 MiB", "64 MiB"):
        answer = cluster.begin("n0", PROMPTS[0], LONG)
        done = call(*AGENT, "budget", "n0", budget, "--coordinator", cluster.coordinator)
        if done.returncode:
            raise SystemExit(done.stderr)
        compare(answer.tokens(), want[PROMPTS[0]])
        click.echo(f"{done.stdout.strip()}: the same {LONG} tokens, {require(cluster, want, tokens):.2f} ms per token")


@contextmanager
def filled(cluster: Cluster, node: str) -> Iterator[None]:
    """Take all of the device's memory that is free."""
    taken = []
    for size in (1 << 30, 1 << 26, 1 << 21):
        with suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    click.echo(f"another process took {sum(map(len, taken)) / 2**30:.1f} GiB of the device, all there was")
    yield
    taken.clear()
    torch.cuda.empty_cache()


@contextmanager
def lost(cluster: Cluster, node: str) -> Iterator[None]:
    """Let a kernel of a node fail at its next expert."""
    (cluster.path / f"{node}.yaml.lose").touch()
    yield


def fall(
    cluster: Cluster,
    want: dict[str, list[int]],
    node: str,
    what: str,
    failing: Callable[[Cluster, str], AbstractContextManager[None]],
) -> None:
    """Let a node's device fail while it makes answers, and compare them."""
    where = cluster.locate("n0")
    answers: list[Stream] = [cluster.begin("n0", PROMPTS[0], LONG, where)]
    with failing(cluster, node):
        began = time.perf_counter()
        answers += [Stream("n0", cluster.coordinator, PROMPTS[0], LONG, where) for _ in range(SESSIONS - 1)]
        for answer in answers:
            compare(answer.tokens(), want[PROMPTS[0]])
        seconds = time.perf_counter() - began
        wait_for(lambda: cluster.node_status(node)["device"] == "cpu", timeout_s=20, what=f"{node} to say so")
    click.echo(
        f"{node}'s device {what}: {SESSIONS} answers of {LONG} tokens went on, {seconds:.1f} s; {devices(cluster)}"
    )
    shown = cluster.planner("status", "--coordinator", cluster.coordinator).stdout
    click.echo("\n".join(f"  {line}" for line in shown.splitlines() if line.startswith(f"{node}: ")))


if __name__ == "__main__":
    main()
