"""Small random checkpoints of every supported family, made on the spot, and pieces to run them with.

Importable by every test; `checkpoints` keeps one directory per family for the whole session.
"""

import atexit
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch

from runtime.dispatch import ExpertCall, execute_call
from runtime.engine import Segment
from runtime.loading import TensorPool, load_trunk
from runtime.routing import EpochBoard, Routing
from runtime.sampling import prefill_chunks
from runtime.slots import Residency
from runtime.store import Store, prepare_store
from schemas.placement import Route

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe", "deepseek_v2")

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.05,
}
_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def config_of(family: str, *, layers: int = 4) -> Any:
    """Return a small config: 8 experts, top-2, D 64, and what is peculiar to the family (dense layers, windows, …)."""
    import transformers as hf

    common = {**_COMMON, "num_hidden_layers": layers, "num_experts_per_tok": 2}
    grouped = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
    match family:
        case "qwen3_moe":
            return hf.Qwen3MoeConfig(**common, **grouped, moe_intermediate_size=32, num_experts=8)
        case "qwen2_moe":
            sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
            return hf.Qwen2MoeConfig(**common, num_key_value_heads=2, intermediate_size=64, num_experts=8, **sizes)
        case "mixtral":
            return hf.MixtralConfig(**common, num_key_value_heads=2, intermediate_size=32, num_local_experts=8)
        case "olmoe":
            return hf.OlmoeConfig(**common, num_key_value_heads=4, intermediate_size=32, num_experts=8)
        case "deepseek_v3":
            return hf.DeepseekV3Config(**common, **_LATENT, intermediate_size=64, first_k_dense_replace=1)
        case "deepseek_v2":
            more = {"first_k_dense_replace": 1, "topk_method": "greedy", "n_shared_experts": 1}
            return hf.DeepseekV2Config(**common, **_LATENT, intermediate_size=64, **more)
        case "gpt_oss":
            return hf.GptOssConfig(
                **common, **{**grouped, "intermediate_size": 32}, num_local_experts=8, sliding_window=16
            )
    raise ValueError(family)


def lasting_directory() -> Path:
    """Return a directory for what tests of a whole file share; it goes when the process ends."""
    path = Path(mkdtemp(prefix="expertmesh-test-"))
    atexit.register(rmtree, path, ignore_errors=True)
    return path


def make_checkpoint(family: str, path: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """Write a random checkpoint of a family, float32, whose experts are unlike each other."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, layers=layers)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in name and "inv_freq" not in name:
                tensor.normal_(std=0.05 if tensor.ndim > 1 else 0.02)
    model.save_pretrained(path)
    return path


def reference(model_dir: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load the one-node model: transformers alone, eager experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, experts_implementation="eager")
    return model.eval().requires_grad_(False)


def reference_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the one-node model, never stopping early."""
    inputs = torch.tensor([prompt])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@dataclass
class InProcessCaller:
    """An ExpertCaller whose holders are other residencies of this process; answers are computed when begun."""

    holders: dict[str, Residency]
    calls: list[ExpertCall] = field(default_factory=list)

    def begin(self, call: ExpertCall) -> "Answered":
        call.check()
        self.calls.append(call)
        return Answered(execute_call(self.holders[call.holder], call))


@dataclass
class Answered:
    """A call whose answer is there."""

    answer: torch.Tensor

    def result(self) -> torch.Tensor:
        return self.answer


@dataclass
class Split:
    """A model whose experts are spread over this node and others, all in this process."""

    segment: Segment
    caller: InProcessCaller
    board: EpochBoard


def split_model(model_dir: Path, store: Store, owners: dict[tuple[int, int], str], **options: Any) -> Split:
    """Load a trunk and put every expert at its owner; the ingress is called ``here``."""
    spec = store.manifest.model
    nodes = residencies(store, owners)
    routes = [
        Route(ingress="here", layer=layer, expert=expert, holder=name)
        for (layer, expert), name in sorted(owners.items())
        if name != "here"
    ]
    local = [key for key, name in owners.items() if name == "here"]
    board = EpochBoard(Routing.build(1, layers=spec.layers, experts=spec.experts, local=local, routes=routes))
    here = nodes.pop("here")
    segment = Segment(load_trunk(model_dir, dtype=store.manifest.dtype), here, board, **options)
    return Split(segment, InProcessCaller(nodes), board)


@dataclass
class Chain:
    """Segments in a row, each on a node of its own, whose experts lie anywhere among these nodes."""

    segments: list[Segment]
    caller: InProcessCaller

    def open(self, name: str, max_tokens: int) -> None:
        for segment in self.segments:
            segment.open(name, max_tokens)

    def close(self, name: str) -> None:
        for segment in self.segments:
            segment.close(name)

    def step(self, name: str, inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        for segment in self.segments:
            inputs = segment.step(name, inputs, caller=self.caller, **options)
        return inputs

    def prefill(self, name: str, prompt: list[int], **options: Any) -> torch.Tensor:
        """Run a prompt in its chunks; returns the logits of its last token."""
        *first, last = [torch.tensor(prompt[chunk]) for chunk in prefill_chunks(len(prompt))]
        for chunk in first:
            assert not len(self.step(name, chunk, keep="none", **options))
        return self.step(name, last, **options)

    def step_batch(self, names: list[str], inputs: torch.Tensor) -> torch.Tensor:
        for segment in self.segments:
            inputs = segment.step_batch(names, inputs, caller=self.caller)
        return inputs


def chain_model(model_dir: Path, store: Store, cuts: list[int], owners: dict[tuple[int, int], int]) -> Chain:
    """Cut a model before each of the layers `cuts`, and put every expert at the node whose index `owners` tells."""
    spec, pool = store.manifest.model, TensorPool()
    starts = [0, *cuts]
    budget = {"device": spec.total_expert_bytes}
    nodes = [f"n{index}" for index in range(max(len(starts), *(owner + 1 for owner in owners.values())))]
    held = {name: Residency(store.manifest.layout, budget) for name in nodes}
    for key, owner in owners.items():
        held[nodes[owner]].put(key, "device", store.read(store.by_key[key].sha256))
    segments = []
    for node, first, after in zip(nodes, starts, [*cuts, spec.num_decoder_layers], strict=False):
        routes = [Route(ingress=node, layer=k[0], expert=k[1], holder=nodes[owner]) for k, owner in owners.items()]
        routing = Routing.build(1, layers=spec.layers, experts=spec.experts, local=[], routes=routes)
        trunk = load_trunk(model_dir, dtype=store.manifest.dtype, first_layer=first, last_layer=after - 1, pool=pool)
        segments.append(Segment(trunk, held[node], EpochBoard(routing)))
    return Chain(segments, InProcessCaller(held))


def residencies(store: Store, owners: dict[tuple[int, int], str]) -> dict[str, Residency]:
    """Put every expert at its owner."""
    budget = {"device": store.manifest.model.total_expert_bytes}
    nodes = {name: Residency(store.manifest.layout, budget) for name in sorted({"here", *owners.values()})}
    for key, name in owners.items():
        nodes[name].put(key, "device", store.read(store.by_key[key].sha256))
    return nodes


def all_here(store: Store) -> dict[tuple[int, int], str]:
    """Own every expert at the ingress."""
    return {record.key: "here" for record in store.manifest.records}


def spread(store: Store, nodes: int = 3) -> dict[tuple[int, int], str]:
    """Own experts in turn at ``here``, ``n1``, …"""
    names = ["here", *(f"n{index}" for index in range(1, nodes))]
    return {record.key: names[(record.expert + record.layer) % nodes] for record in store.manifest.records}


def make_store(model_dir: Path, path: Path, dtype: Any = "checkpoint", precisions: tuple[Any, ...] = ()) -> Store:
    """Prepare and open a store."""
    prepare_store(model_dir, path, dtype=dtype, precisions=precisions)
    return Store.open(path)
