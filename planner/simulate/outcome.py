"""From what every token met to what a reader wants: latency by ingress, use of nodes and links.

Decides the figures of a simulation. The first tokens, which meet an empty cluster, are simulated but not counted in
latencies. Must not know how the clock works.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.objective import Routing
from planner.problem import Events, Floats, Ints, Problem
from planner.simulate.arrivals import Arrivals, Requests, draw_requests
from planner.simulate.clock import TokenTimes, run
from planner.simulate.network import Network, directed_ends
from planner.simulate.prefill import prompt_use
from planner.simulate.script import Script, build_script

WARM_UP: Final = 0.05  # share of tokens, by start


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Where the mean token's time goes, seconds: free links, queues, evaluation, software of calls and hops.

    `hops_s` is the part of `network_s` that its path takes from node to node; the rest are calls.
    """

    network_s: float
    hops_s: float
    queue_s: float
    compute_s: float
    overhead_s: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds per token: mean, percentiles, and where the mean goes."""

    tokens: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    waits: Waits


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """Seconds until the first token of an answer, behind its prompt."""

    prompts: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, kw_only=True)
class NodeUse:
    """A node's compute: seconds busy, share of the simulated time, and the share its arrivals ask for."""

    id: str
    busy_s: float
    utilisation: float
    offered: float


@dataclass(frozen=True, kw_only=True)
class LinkUse:
    """One direction of a link."""

    source: str
    target: str
    bytes: int
    bytes_per_token: float
    utilisation: float
    offered: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """Figures of one simulation.

    Attributes
    ----------
    total, ingresses
        Latency over all tokens and by node where they enter.
    first_tokens
        Time of prompts by node where they enter; empty without prompts.
    elapsed_s
        From 0 until the last token ended.
    overloaded
        Names of nodes and links whose arrivals ask for more than they can do: latencies there grow with the length of
        the simulation.
    """

    tokens: int
    events: int
    elapsed_s: float
    total: Latency
    ingresses: dict[str, Latency]
    first_tokens: dict[str, FirstToken]
    nodes: tuple[NodeUse, ...]
    links: tuple[LinkUse, ...]
    overloaded: tuple[str, ...]


def simulate(
    problem: Problem,
    routing: Routing,
    network: Network,
    arrivals: Arrivals | None = None,
    events: tuple[Events, ...] | None = None,
) -> Simulation:
    """Replay recorded events against a placement's routing.

    Parameters
    ----------
    events
        Chosen experts ``[T, L, K]`` by ingress; the problem's own where None.
    """
    arrivals = arrivals or Arrivals()
    replayed = problem.events if events is None else events
    script = build_script(problem, routing, network, replayed, arrivals.seed)
    requests = draw_requests(problem.tokens_per_s, [len(seen) for seen in replayed], arrivals)
    return summarise(problem, script, requests, run(script, requests), network)


def summarise(problem: Problem, script: Script, requests: Requests, times: TokenTimes, network: Network) -> Simulation:
    """Turn token times into figures."""
    elapsed = float(times.end_s.max())
    finite = requests.arrival_s[np.isfinite(requests.arrival_s)]
    horizon = float(finite.max()) if len(finite) == len(requests.arrival_s) and len(finite) > 1 else elapsed
    runs = _times_run(script, requests)
    prompt_busy, prompt_sent = _prompt_use(script, requests, times, network)
    busy, messages = runs @ script.compute_s + prompt_busy, runs @ script.messages
    sent: Floats = messages * script.message_bytes + _hop_bytes(script, requests) + prompt_sent
    nodes = tuple(
        NodeUse(id=name, busy_s=float(seconds), utilisation=float(seconds) / elapsed, offered=float(seconds) / horizon)
        for name, seconds in zip(problem.node_ids, busy, strict=True)
    )
    links = tuple(_link_uses(problem, network, sent, elapsed=elapsed, horizon=horizon, tokens=len(times.end_s)))
    measured = times.start_s >= np.quantile(times.start_s, WARM_UP)
    entered = requests.ingress[times.request]
    hops = np.array([sum(hop.network_s for hop in filter(None, path)) for path in script.hops])[entered]
    return Simulation(
        tokens=len(times.end_s),
        events=int(runs.sum()),
        elapsed_s=elapsed,
        total=_latency(times, hops, measured),
        ingresses={
            problem.node_ids[node]: _latency(times, hops, measured & (entered == ingress))
            for ingress, node in enumerate(problem.ingress_node.tolist())
            if (measured & (entered == ingress)).any()
        },
        first_tokens=dict(_first_tokens(problem, requests, times)),
        nodes=nodes,
        links=links,
        overloaded=(
            *(node.id for node in nodes if node.offered > 1),
            *(f"{link.source} → {link.target}" for link in links if link.offered > 1),
        ),
    )


def _prompt_use(script: Script, requests: Requests, times: TokenTimes, network: Network) -> tuple[Floats, Floats]:
    """Seconds of compute at each node and bytes over each directed link of all prompts."""
    count = np.bincount(requests.ingress[times.prompt_request], minlength=len(script.chunks))
    busy, sent = np.zeros(script.num_nodes), np.zeros(script.num_links)
    for prompts, chunks in zip(count.tolist(), script.chunks, strict=True):
        if prompts:
            each_busy, each_sent = prompt_use(chunks, network)
            busy, sent = busy + prompts * each_busy, sent + prompts * each_sent
    return busy, sent


def _first_tokens(problem: Problem, requests: Requests, times: TokenTimes) -> Iterator[tuple[str, FirstToken]]:
    entered = requests.ingress[times.prompt_request]
    for ingress, node in enumerate(problem.ingress_node.tolist()):
        seconds = times.prompt_s[entered == ingress]
        if len(seconds):
            p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist()
            yield (
                problem.node_ids[node],
                FirstToken(prompts=len(seconds), mean_s=float(seconds.mean()), p50_s=p50, p95_s=p95, p99_s=p99),
            )


def _times_run(script: Script, requests: Requests) -> Ints:
    """How often each kind of work was done, int64 ``[W]``."""
    total = np.zeros(len(script.works), dtype=np.int64)
    for ingress, work_of in enumerate(script.work_of):
        tokens = _times_replayed(requests, ingress, len(work_of))
        total += np.bincount(work_of.ravel(), weights=np.repeat(tokens, work_of.shape[1]), minlength=len(total)).astype(
            np.int64
        )
    return total


def _times_replayed(requests: Requests, ingress: int, ring: int) -> Ints:
    """How often each recorded token of an ingress was replayed, int64 ``[ring]``."""
    mine = requests.ingress == ingress
    first, length = requests.first_token[mine], requests.num_tokens[mine]
    change = np.zeros(ring + 1, dtype=np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, (first + length) % ring, -1)
    whole = ((first + length) // ring).sum()  # each passing of the ring's end starts once more at its beginning
    change[0] += whole
    return np.cumsum(change[:-1])


def _hop_bytes(script: Script, requests: Requests) -> Floats:
    """Bytes of moving trunks on each directed link, float64 ``[2U]``."""
    total = np.zeros(script.num_links)
    for ingress, hops in enumerate(script.hops):
        tokens = int(requests.num_tokens[requests.ingress == ingress].sum())
        for hop in filter(None, hops):
            for link, _, _ in hop.path:
                total[link] += tokens * hop.bytes
    return total


def _link_uses(
    problem: Problem, network: Network, sent: Floats, *, elapsed: float, horizon: float, tokens: int
) -> Iterator[LinkUse]:
    for link, (start, end) in enumerate(directed_ends(problem).tolist()):
        busy = float(sent[link] / network.link_bandwidth[link // 2])
        yield LinkUse(
            source=problem.node_ids[start],
            target=problem.node_ids[end],
            bytes=int(sent[link]),
            bytes_per_token=float(sent[link]) / tokens,
            utilisation=busy / elapsed,
            offered=busy / horizon,
        )


def _latency(times: TokenTimes, hops: Floats, chosen: np.ndarray) -> Latency:
    latency = times.latency_s[chosen]
    p50, p95, p99 = np.percentile(latency, (50, 95, 99)).tolist()
    return Latency(
        tokens=len(latency),
        mean_s=float(latency.mean()),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        waits=Waits(
            network_s=float(times.network_s[chosen].mean()),
            hops_s=float(hops[chosen].mean()),
            queue_s=max(float(times.queue_s[chosen].mean()), 0.0),
            compute_s=float(times.compute_s[chosen].mean()),
            overhead_s=float(times.overhead_s[chosen].mean()),
        ),
    )
