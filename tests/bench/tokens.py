"""Decode speed across agents against one node, and what an expert call costs: ``python -m tests.bench.tokens``.

Real processes on loopback. Everything that is compared runs in turn, in one run; figures are medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
import zmq

from agent.client import locate
from agent.peers import Patience, PeerCaller
from agent.routes import EpochRoutes
from runtime.experts import ExpertCall, execute_call
from runtime.loading import load_tokenizer, load_whole
from runtime.slots import Residency
from runtime.store import Store, prepare_store
from schemas.messages import Endpoints
from schemas.wire import AnswerHeader, CallHeader, Limits, pack_answer, pack_call
from tests.cluster import MODEL, PROMPTS, Cluster, make_plan, running, save, spec, spread

NUM_TOKENS = 96
ROUNDS = 5
CALLS = 3000


@click.command()
def main() -> None:
    """Measure and print both tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        prepare_store(MODEL, path / "store", dtype="float32")
        with (
            running(path / "one", 1, store=path / "store") as one,
            running(path / "three", 3, store=path / "store") as three,
        ):
            for cluster in (one, three):
                plan = make_plan(cluster, spread(cluster.nodes))
                done = cluster.apply(save(cluster, plan))
                if done.returncode:
                    raise SystemExit(done.stderr)
            print_decode(one, three)
            print_calls(path / "store", locate(zmq.Context(), "n1", three.coordinator))


def print_decode(one: Cluster, three: Cluster) -> None:
    """Decode the same prompts on one agent, across three, and with transformers, in turn."""
    arms: dict[str, Callable[[str], float]] = {
        "transformers, one process": transformers_speed(),
        "one agent": lambda prompt: agent_speed(one, prompt),
        "three agents, 2/3 of the experts elsewhere": lambda prompt: agent_speed(three, prompt),
    }
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(ROUNDS):
        for name, arm in arms.items():
            speeds[name].append(arm(PROMPTS[turn % len(PROMPTS)]))
    base = statistics.median(speeds["one agent"])
    for name, values in speeds.items():
        median = statistics.median(values)
        click.echo(f"{name:46s} {median:7.1f} tokens/s  {median / base:6.1%} of one agent")


def agent_speed(cluster: Cluster, prompt: str) -> float:
    """Tokens per second after the first, as the client counts them."""
    return float(cluster.generate("n0", prompt, "--max-tokens", str(NUM_TOKENS))["tokens_per_s"])


def transformers_speed() -> Callable[[str], float]:
    """Return what measures one-node greedy decoding by transformers' own `generate`, eager experts."""
    tokenizer, model = load_tokenizer(MODEL), load_whole(MODEL, dtype="float32")

    def timed(ids: torch.Tensor, tokens: int) -> float:
        began = time.perf_counter()
        model.generate(
            ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, attention_mask=torch.ones_like(ids)
        )
        return time.perf_counter() - began

    def speed(prompt: str) -> float:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            return (NUM_TOKENS - 1) / (timed(ids, NUM_TOKENS) - timed(ids, 1))

    return speed


def print_calls(store: Path, where: Endpoints) -> None:
    """Compare calls of one token at one expert of a running agent with a bare echo of the same bytes."""
    model = spec()
    limits = Limits(model.layers, model.experts, model.top_k, model.hidden_size, tokens=64)
    expert = next(e for e in range(model.experts) if (0 + e) % 3 == 1)  # layer 0: dealt out to node 1
    hidden = torch.randn(1, model.hidden_size)
    call = ExpertCall(
        holder="n1", epoch=1, layer=0, combine="partial", hidden=hidden,
        token=np.zeros(1, np.int32), expert=np.array([expert], np.int32), weight=torch.ones(1),
    )  # fmt: skip
    residency = Residency(Store.open(store).manifest.layout, {"device": 1 << 20}, None)
    residency.put((0, expert), "device", record_of(Store.open(store), expert))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    caller = PeerCaller(
        context, endpoints=lambda: {"n1": where}, routes=no_routes, residency=lambda: residency,
        limits=limits, patience=Patience(),
    )  # fmt: skip
    with bare_echo(call) as echo:
        rows = interleaved(
            {
                "echo": echo,
                "call": lambda: caller.begin(call).result(),
                "compute": lambda: execute_call(residency, call),
            }
        )
    caller.close()
    context.destroy(linger=0)
    echo_us, call_us, compute_us = rows["echo"], rows["call"], rows["compute"]
    click.echo(f"\nexpert call, 1 token × 1 expert, D = {model.hidden_size}, float32; median of {CALLS}")
    click.echo(f"  bare ZeroMQ echo of the same bytes        {echo_us:7.1f} µs")
    click.echo(f"  expert call to a running agent            {call_us:7.1f} µs  overhead {call_us - echo_us:.1f} µs")
    click.echo(f"    of which the expert itself              {compute_us:7.1f} µs")
    click.echo(f"    checks, headers, tensors, locks         {call_us - echo_us - compute_us:7.1f} µs")


def no_routes() -> EpochRoutes:
    """Fail: the holder is there, so nobody asks for another."""
    raise AssertionError("the call was not answered")


def record_of(store: Store, expert: int) -> bytes:
    """Bytes of layer 0's `expert`."""
    return store.read(next(r.sha256 for r in store.manifest.records if r.key == (0, expert)))


def interleaved(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median µs of each arm, called in turn."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(CALLS + 200):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            if turn >= 200:
                spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) * 1e6 for name, values in spent.items()}


class bare_echo:  # noqa: N801  # reads as the function it is
    """A process that answers each message with the bytes of an answer, and nothing else."""

    def __init__(self, call: ExpertCall) -> None:
        size = call.hidden.shape[1]
        self._answer = pack_answer(AnswerHeader(1, 1, "float32", 1, size), bytes(size * 4))
        header = CallHeader(1, 1, 0, "partial", "float32", "float32", 1, 1, size)
        self._frame = pack_call(
            header, call.token.data, call.expert.data, call.weight.numpy().data, call.hidden.numpy().data
        )

    def __enter__(self) -> Callable[[], object]:
        processes = get_context("spawn")
        here, there = processes.Pipe()
        self._process = processes.Process(target=_echo, args=(there, self._answer), daemon=True)
        self._process.start()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{here.recv()}")

        def once() -> object:
            socket.send(self._frame)
            return socket.recv_multipart(copy=False)

        return once

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)
        self._process.terminate()
        self._process.join()


def _echo(pipe: object, answer: bytes) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    pipe.send(socket.bind_to_random_port("tcp://127.0.0.1"))  # type: ignore[attr-defined]
    while True:
        frames = socket.recv_multipart(copy=False)
        socket.send_multipart([frames[0], answer])


if __name__ == "__main__":
    main()
