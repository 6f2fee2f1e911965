"""What this machine's compute block is: trunk, experts by tier and the software of a call, from runs on loopback.

Decides how the simulator's node times follow from measurements: an agent that holds everything decodes a token in
layers × (trunk + K experts); with all experts at another agent each layer takes one call more; one expert alone is
timed in this process. Nothing here has seen an emulated link.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.alone import open_alone
from runtime.experts import ExpertCall, execute_call
from runtime.generation import generate
from runtime.slots import Residency
from runtime.store import Store
from schemas.topology import TIERS, Tier
from tests.cluster import Cluster, make_plan, running, save, spec, spread


@dataclass
class Measured:
    """Decode seconds of every prompt by round, and the tokens that came.

    The same statistic judges real agents and calibrates the simulator: load is skewed, so that a median over rounds and
    a mean over prompts are not interchangeable.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, prompt: str, answer: dict[str, Any]) -> None:
        self.seconds[prompt].append(float(answer["seconds"] - answer["prefill_s"]))
        self.answers[prompt] = answer

    @property
    def token_s(self) -> float:
        """Seconds per forward of one token over all prompts; an answer's first token comes from its prompt."""
        total = sum(statistics.median(each) for each in self.seconds.values())
        return total / sum(len(answer["tokens"]) - 1 for answer in self.answers.values())


@dataclass
class Loopback:
    """Agents on plain loopback: one that holds everything, and one that holds nothing but the trunk."""

    whole: Cluster
    calling: Cluster
    whole_seen: Measured = field(default_factory=Measured)
    calling_seen: Measured = field(default_factory=Measured)

    def measure(self, prompt: str, tokens: int) -> None:
        """Decode a prompt on both; modifies."""
        for cluster, seen in ((self.whole, self.whole_seen), (self.calling, self.calling_seen)):
            seen.add(prompt, cluster.generate("n0", prompt, "--max-tokens", str(tokens)))

    def compute(self, tiers: dict[Tier, float]) -> dict[str, Any]:
        """Return a topology's `compute` block, given seconds of one expert by tier."""
        model = spec()
        whole, calling = self.whole_seen.token_s, self.calling_seen.token_s
        return {
            "expert_us": tiers["device"] * 1e6,
            "host_expert_us": tiers["host"] * 1e6,
            "disk_bandwidth": f"{model.expert_bytes / max(tiers['disk'] - tiers['host'], 1e-6) / 1e6:.3f} MB/s",
            "trunk_layer_us": max(whole / model.layers - model.top_k * tiers["device"], 0.0) * 1e6,
            "call_overhead_us": max(calling - whole, 0.0) / model.layers * 1e6,
        }


@contextmanager
def loopback(path: Path, store: Path) -> Iterator[Loopback]:
    """Run both clusters on loopback."""
    with ExitStack() as stack:
        whole = stack.enter_context(running(path / "whole", 1, store=store))
        calling = stack.enter_context(running(path / "calling", 2, store=store))
        for cluster in (whole, calling):
            plan = make_plan(cluster, spread(cluster.nodes[-1:]))
            done = cluster.apply(save(cluster, plan))
            if done.returncode:
                raise SystemExit(done.stderr)
        yield Loopback(whole, calling)


@dataclass
class Experts:
    """Every expert in every tier, in this process, to be timed one call at a time."""

    store_dir: Path
    seconds: dict[tuple[Tier, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        store = Store.open(self.store_dir)
        self.model = store.manifest.model
        self._held = {}
        for tier in TIERS:
            budget, records = {tier: 1 << 30}, self.store_dir.parent / "records"
            self._held[tier] = Residency(store.manifest.layout, budget, records, max_slots=len(store.manifest.records))
            for record in store.manifest.records:
                self._held[tier].put(record.key, tier, store.read(record.sha256))

    def measure(self) -> None:
        """Time calls for one token at one and at two experts, tiers in turn; modifies."""
        model = self.model
        hidden = torch.randn(1, model.hidden_size)
        for layer in range(model.layers):
            for first in range(0, model.experts, 2):
                for tier, residency in self._held.items():
                    for count in (1, 2):
                        call = _call(layer, range(first, first + count), hidden)
                        began = time.perf_counter()
                        execute_call(residency, call)
                        self.seconds[tier, count].append(time.perf_counter() - began)

    def prompt_expert_s(self, tokens: int = 256) -> float:
        """Seconds of one token at one expert from the device, where a prompt asks each expert for many at once."""
        model, generator = self.model, torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, model.hidden_size, generator=generator)
        expert = np.sort(np.random.default_rng(0).integers(model.experts, size=tokens * model.top_k)).astype(np.int32)
        token = np.resize(np.arange(tokens, dtype=np.int32), len(expert))
        took = []
        for layer in range(model.layers):
            call = ExpertCall(
                holder="", epoch=1, layer=layer, combine="partial", hidden=hidden, token=token, expert=expert,
                weight=torch.full((len(expert),), 1 / model.top_k),
            )  # fmt: skip
            began = time.perf_counter()
            execute_call(self._held["device"], call)
            took.append(time.perf_counter() - began)
        return statistics.median(took) / len(expert)

    def by_tier(self) -> dict[Tier, float]:
        """Seconds that one more expert of a tier adds to a call.

        What a call costs whatever it holds is no expert's time: it is in the trunk, or in the software of a call.
        """
        took = {key: statistics.median(each) for key, each in self.seconds.items()}
        device = max(took["device", 2] - took["device", 1], 1e-6)
        return {tier: device + max(took[tier, 1] - took["device", 1], 0.0) for tier in TIERS}


def idle_factor(model: Path, prompt: Sequence[int], *, pause_s: float = 0.015, steps: int = 120) -> float:
    """How many times as long a step of a whole model takes after a pause as after another step; both in turn."""
    segment = open_alone(model, dtype="float32", max_tokens=len(prompt) + steps + 2)
    tokens = generate(segment, prompt, max_tokens=steps + 1, stop_ids=frozenset())
    took: dict[bool, list[float]] = {True: [], False: []}
    next(tokens)
    for step in range(steps):
        paused = step % 2 == 0
        if paused:
            time.sleep(pause_s)
        began = time.perf_counter()
        next(tokens)
        took[paused].append(time.perf_counter() - began)
    tokens.close()
    return max(statistics.median(took[True]) / statistics.median(took[False]), 1.0)


def _call(layer: int, experts: Sequence[int], hidden: torch.Tensor) -> ExpertCall:
    count = len(experts)
    return ExpertCall(
        holder="", epoch=1, layer=layer, combine="partial", hidden=hidden, token=np.zeros(count, np.int32),
        expert=np.array(experts, np.int32), weight=torch.full((count,), 1 / count),
    )  # fmt: skip
