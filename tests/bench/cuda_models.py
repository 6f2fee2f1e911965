"""Models of a given shape without a checkpoint: weights are random, routing is that of a recorded trace.

Decides how routing is forced through the model's own routers: a token's embedding is one dimension that no layer writes
to, and a router's column of that dimension ranks the experts as the trace did, so that everything is computed as always.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.alone import available_host_bytes
from runtime.engine import Segment
from runtime.loading import Trunk, load_trunk
from runtime.models import Model, open_model
from runtime.route_csv import read_route_table, route_shape
from runtime.routing import EpochBoard, Routing
from runtime.skeleton import build_skeleton, held_tensors
from runtime.slots import Caching, Residency

CODES = 256  # dimensions that carry which token it is
_BLOCK = 1 << 27  # random weights that all experts are cut from


@dataclass(frozen=True)
class Shape:
    """A model's sizes; the rest is as in its family."""

    name: str
    family: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    shared_ffn: int = 0

    def config(self, top_k: int | None = None) -> Any:
        """Return transformers' config."""
        import transformers as hf

        common = {
            "num_hidden_layers": self.layers,
            "num_experts_per_tok": top_k or self.top_k,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 128,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "dtype": "bfloat16",
        }
        if self.family == "mixtral":
            return hf.MixtralConfig(
                **common, intermediate_size=self.ffn, num_local_experts=self.experts, sliding_window=None
            )
        if self.family == "olmoe":
            return hf.OlmoeConfig(**common, intermediate_size=self.ffn, num_experts=self.experts)
        if self.family == "qwen2_moe":
            return hf.Qwen2MoeConfig(
                **common, moe_intermediate_size=self.ffn, num_experts=self.experts,
                shared_expert_intermediate_size=self.shared_ffn, intermediate_size=self.shared_ffn,
            )  # fmt: skip
        return hf.Qwen3MoeConfig(
            **common, moe_intermediate_size=self.ffn, num_experts=self.experts, norm_topk_prob=True,
            intermediate_size=self.ffn, num_local_experts=self.experts,
        )  # fmt: skip


QWEN = Shape("Qwen3-30B-A3B, 12 layers", "qwen3_moe", 12, 128, 8, 2048, 768, 32, 4, 151_936)
MIXTRAL = Shape("Mixtral-8x7B, 4 layers", "mixtral", 4, 8, 2, 4096, 14_336, 32, 8, 32_000)
OLMOE = Shape("OLMoE-1B-7B, 8 layers", "olmoe", 8, 64, 8, 2048, 1024, 16, 16, 50_304)
QWEN_SHARED = Shape("Qwen1.5-MoE-A2.7B, 8 layers", "qwen2_moe", 8, 60, 4, 2048, 1408, 16, 16, 151_936, 5632)


@dataclass(frozen=True, eq=False)
class Forced:
    """Routing of T tokens: experts [T, L, K], best first, and their weights."""

    experts: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]


def read_forced(path: Path, layers: int) -> Forced:
    """Read the decode steps of a route trace, of so many layers evenly taken from its own."""
    header, rows = read_route_table(path)
    _, all_layers, _, top_k = route_shape(path, header)
    rows = rows[rows[:, 1] == 1]
    rows = rows[np.lexsort((rows[:, 4], rows[:, 3], rows[:, 2]))].reshape(-1, all_layers, top_k, 7)
    taken = np.arange(layers) * all_layers // layers
    experts, weights = rows[:, taken][..., 5].astype(np.int64), rows[:, taken][..., 6]
    order = np.argsort(-weights, axis=-1, kind="stable")
    return Forced(np.take_along_axis(experts, order, -1)[:CODES], np.take_along_axis(weights, order, -1)[:CODES])


def grouped(forced: Forced, layers: int, experts: int) -> Forced:
    """Make a trace of fewer, larger experts, all ranked: neighbours are one, which has their summed weights."""
    tokens, _, _ = forced.experts.shape
    mass = np.zeros((tokens, layers, experts))
    size = (int(forced.experts.max()) // experts) + 1
    for token in range(tokens):
        for layer in range(layers):
            np.add.at(mass[token, layer], forced.experts[token, layer] // size, forced.weights[token, layer])
    order = np.argsort(-mass, axis=-1, kind="stable")
    return Forced(order, np.take_along_axis(mass, order, -1) + 1e-2)


def write_hollow(shape: Shape, path: Path, top_k: int) -> Path:
    """Write a checkpoint whose weights are a hole in a file: it has every tensor's name and shape, and takes no room."""
    path.mkdir(parents=True, exist_ok=True)
    shape.config(top_k).save_pretrained(path)
    tensors = {
        name: tuple(held.shape)
        for name, held in held_tensors(build_skeleton(path, torch.bfloat16), torch.bfloat16).items()
    }
    for layer in range(shape.layers):
        for expert in range(shape.experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            for role in ("gate_proj", "up_proj"):
                tensors[f"{prefix}.{role}.weight"] = (shape.ffn, shape.hidden)
            tensors[f"{prefix}.down_proj.weight"] = (shape.hidden, shape.ffn)
    header, end = {}, 0
    for name, size in tensors.items():
        start, end = end, end + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


@cache
def _random_block() -> NDArray[np.uint8]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(_BLOCK // 2, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy()


@dataclass(frozen=True)
class RandomRecord:
    """The weights of one expert, which write to none of the dimensions that carry tokens."""

    key: tuple[int, int]
    bytes_per_row: int

    def read_into(self, parts: Any, *, check: bool) -> None:
        block = _random_block()
        at = (self.key[0] * 7919 + self.key[1] * 104_729) * 4096 % (_BLOCK // 2)
        for part in parts:
            target, done = np.frombuffer(part, dtype=np.uint8), 0
            while done < len(target):
                count = min(len(target) - done, _BLOCK - at)
                target[done : done + count] = block[at : at + count]
                done, at = done + count, (at + count) % _BLOCK
        np.frombuffer(parts[1], dtype=np.uint8)[: CODES * self.bytes_per_row] = 0


def random_trunk(path: Path, device: str, forced: Forced | None) -> Trunk:
    """Load a hollow checkpoint's trunk and fill it."""
    trunk = load_trunk(path, device=device)
    fill_trunk(trunk.model, forced)
    return trunk


def fill_trunk(model: Any, forced: Forced | None) -> None:
    """Fill a model's parameters at random, with routers that rank experts as `forced` says."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".experts." in name:
                continue
            if tensor.ndim > 1:
                tensor.normal_(std=0.02)
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        if forced is None:
            return
        tokens = len(forced.experts)
        embedding = model.model.embed_tokens.weight
        embedding[:CODES].zero_()
        embedding[torch.arange(CODES), torch.arange(CODES)] = 8.0
        codes = torch.arange(tokens)
        model.lm_head.weight[:, :CODES] = 0
        model.lm_head.weight[(codes + 1) % tokens, codes] = 8.0  # the next token is the trace's next
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight[:CODES] = 0
            router = layer.mlp.gate.weight
            router.zero_()
            ranks = torch.zeros(len(router), tokens)
            experts = torch.from_numpy(forced.experts[:, index])  # [T, K]
            weights = torch.from_numpy(forced.weights[:, index]).float().clamp_min(1e-3)
            odds = weights.log() - math.log(1e-3) + 1  # whoever is not among them has 0
            ranks.scatter_(0, experts.T, odds.T / 45)  # what a code of 8 is after its norm
            router[:, :tokens] = ranks.to(router)


def open_shape(
    path: Path,
    device: str,
    *,
    forced: Forced | None,
    share: float,
    eviction: str = "rates",
    prefetch: bool = True,
    importance: Any = None,
    host_room: bool = True,
) -> Segment:
    """Open a hollow checkpoint with random weights; a share of its experts fits into the device's slots."""
    model: Model = open_model(path)
    spec = model.spec
    slots = round(share * spec.layers * spec.experts)
    host = spec.total_expert_bytes if host_room and share < 1 else 0
    assert host < available_host_bytes(), "not enough memory"
    residency = Residency(
        model.layout,
        {"device": slots * spec.expert_bytes, "host": host},
        device=device,
        max_slots=spec.layers * spec.experts,
        caching=Caching(spec.layers, spec.experts, eviction=eviction, prefetch=prefetch),
    )
    row = model.layout.parts[1].shape[1] * 2
    for layer in range(spec.layers):
        for expert in range(spec.experts):
            residency.place((layer, expert), RandomRecord((layer, expert), row))
    board = EpochBoard(Routing.all_local(1, layers=spec.layers, experts=spec.experts))
    return Segment(random_trunk(path, device, forced), residency, board, importance=importance)


def spoil_guesses(segment: Segment, forced: Forced, shares: Sequence[float]) -> None:
    """Let shares of the guesses of what layers after choose name other experts: forced routers know too much."""
    assert segment.captured is not None
    rng = np.random.default_rng(0)
    layers = segment.captured.parts.layers
    count = segment.trunk.spec.experts
    for index, layer in enumerate(layers):
        for ahead, guess in enumerate(layer.routers.split(count)[1:], start=1):
            columns = guess.T[: len(forced.experts)].clone()  # [T, E]
            for token, experts in enumerate(forced.experts[:, index + ahead]):
                for expert in experts[rng.random(len(experts)) < shares[ahead - 1]].tolist():
                    other = int(rng.integers(count))
                    columns[token, [expert, other]] = columns[token, [other, expert]]
            guess.T[: len(columns)] = columns
