"""This machine's compute block for the benchmark of trunks, measured on loopback, in turn with what is compared.

Decides how node times follow: one agent that holds everything, two that have half of the layers each, one that calls
another for every expert; one expert, and a whole model with pauses between its steps, in this process. Nothing here has
seen an emulated link.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from planner.simulate.clock import COOLING_S
from runtime.loading import load_tokenizer
from tests.bench.calibration import Experts, idle_factor
from tests.bench.site import Site, running_site
from tests.bench.trunk_scene import (
    PROMPT_TOKENS,
    Loopback,
    Setting,
    decode_s,
    long_prompt,
    prompts_of,
    write_scene,
)

_HOPS: Final = 2  # of the ring of two
_TOKENS: Final = 32


@dataclass
class Probes:
    """Clusters on loopback, and what was measured on them so far. Every method but `compute` modifies it."""

    setting: Setting
    sites: Mapping[str, Site]
    experts: Experts
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    prompt_s: list[float] = field(default_factory=list)
    prompt_expert_s: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)

    def measure(self, workload: str) -> None:
        """Decode a prompt on every cluster."""
        prompt = prompts_of(self.setting.texts, workload)[0]
        for name, site in self.sites.items():
            self.seconds[name][workload].append(decode_s(site.generate(next(iter(site.nodes)), prompt, _TOKENS)))

    def measure_rest(self) -> None:
        """Run a long prompt, experts one by one and many, and steps after a pause."""
        whole = long_prompt(self.setting, "code")
        self.prompt_s.append(float(self.sites["alone"].generate("only", whole, 1)["prefill_s"]))
        self.experts.measure()
        self.prompt_expert_s.append(self.experts.prompt_expert_s())
        ids = load_tokenizer(self.setting.model)(prompts_of(self.setting.texts, "code")[0])["input_ids"]
        self.idle.append(idle_factor(self.setting.model, ids))

    def forget(self) -> None:
        """Begin anew: what was measured was to warm up."""
        self.seconds.clear()
        self.prompt_s, self.prompt_expert_s, self.idle = [], [], []

    def token_s(self, name: str) -> float:
        """Seconds per token, mean over prompts of medians."""
        return statistics.fmean(statistics.median(each) for each in self.seconds[name].values())

    def compute(self) -> dict[str, float]:
        """Return a topology's compute block."""
        spec, tiers, idle = self.setting.spec, self.experts.by_tier(), statistics.median(self.idle)
        alone, ring, calling = (self.token_s(name) for name in ("alone", "ring", "calling"))
        cold_s = alone * (idle - 1) * min(ring / 2 / COOLING_S, 1.0)  # the other half's time idles each of the two
        expert_s = statistics.median(self.prompt_expert_s)
        token_s = statistics.median(self.prompt_s) / PROMPT_TOKENS / spec.layers
        return {
            "expert_us": tiers["device"] * 1e6,
            "host_expert_us": tiers["host"] * 1e6,
            "trunk_layer_us": max(alone / spec.layers - spec.top_k * tiers["device"], 0.0) * 1e6,
            "call_overhead_us": max(calling - alone, 0.0) / spec.layers * 1e6,
            "hop_overhead_us": max(ring - alone - cold_s, 0.0) / _HOPS * 1e6,
            "idle_factor": idle,
            "prompt_layer_us": max(token_s - spec.top_k * expert_s, 0.0) * 1e6,
            "prompt_expert_us": min(expert_s, token_s / spec.top_k) * 1e6,
        }


@contextmanager
def running_probes(path: Path, setting: Setting) -> Iterator[Probes]:
    """Run the clusters."""
    shares = {
        "alone": ({"only": 1.0}, "dancemoe"),
        "ring": ({"first": 0.5, "second": 0.5}, "pipeline"),
        "calling": ({"only": 0.0, "other": 1.0}, "dancemoe"),
    }
    sites = {}
    with ExitStack() as stack:
        for number, (name, (nodes, solver)) in enumerate(shares.items()):
            scene = write_scene(path / f"probe-{name}", setting, nodes, sessions=1, tokens=768)
            site = Site(Loopback(), scene, path / f"probe-{name}-site", path / "store", 7300 + number)
            sites[name] = stack.enter_context(running_site(site, "--solver", solver))
        yield Probes(setting, sites, Experts(path / "store"))
