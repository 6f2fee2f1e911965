"""What the benchmarks of moving trunks are made of: uneven nodes with a workload each, prompts, and their topologies.

Decides shares of memory and texts. Must not know what is compared.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from runtime.loading import load_tokenizer
from runtime.recorder import read_texts, record_trace
from schemas.checkpoint import read_checkpoint
from schemas.model import ModelSpec
from tests.bench.site import Scene

SHARES: Final = {"small": 0.15, "low": 0.20, "mid": 0.25, "large": 0.40}
WORKLOADS: Final = ("code", "math", "dialogue", "prose")
PROMPT_TOKENS: Final = 512


class Loopback:
    """A lab without emulation: every node on an address of this machine's loopback."""

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """Run where everything runs; loopback addresses of all nodes are there anyway."""
        del number
        return list(command)


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


def record(path: Path, model: Path, texts: Path) -> None:
    """Record a trace of each workload's calibration text."""
    for workload in WORKLOADS:
        text = read_texts([texts / workload / "calibration.jsonl"])
        record_trace(model, text, workload=workload, max_tokens=3000, dtype="float32").write(
            path / f"{workload}.safetensors"
        )


def write_scene(
    path: Path,
    setting: Setting,
    shares: Mapping[str, float],
    *,
    sessions: int,
    tokens: int,
    prompts: Mapping[str, int] | None = None,
) -> Scene:
    """Write topology and configs of nodes that share memory for `fill` times all experts, beside trunk and KV cache.

    Parameters
    ----------
    prompts
        What a topology says of prompts: `prompt_tokens`, `answer_tokens`.
    """
    path.mkdir()
    spec, nodes = setting.spec, []
    beside = spec.trunk_bytes + spec.kv_bytes(tokens=tokens, sessions=sessions)
    for (node, share), workload in zip(shares.items(), WORKLOADS, strict=False):
        slots = -(-round(share * setting.fill * spec.layers * spec.experts * 1000) // 1000)
        memory = {"device": f"{beside + slots * spec.expert_bytes} B", "host": "0 B", "disk": "0 B"}
        ingress = {"workload": workload, "tokens_per_s": 1, **(prompts or {})}
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
