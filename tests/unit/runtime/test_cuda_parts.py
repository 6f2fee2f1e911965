"""Which models are made of the parts that steps are run with, and where these lie."""

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.cuda.parts import StepParts, step_parts
from runtime.loading import TensorPool, Trunk, load_trunk
from runtime.models import open_model
from tests.families import config_of
from tests.unit.runtime.test_cuda_decode import CAPTURED

SLIDING = ["full_attention", "sliding_attention", "full_attention"]


def parts_of(path: Path, **options: Any) -> tuple[Trunk, StepParts | None]:
    trunk = load_trunk(path, **options)
    return trunk, step_parts(trunk, open_model(path).layout)


def odd(family: str, path: Path, changes: dict[str, Any]) -> Path:
    """Write a checkpoint whose config differs from its family's usual one."""
    from transformers import AutoModelForCausalLM

    config = config_of(family, layers=3)
    for name, value in changes.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", CAPTURED)
def test_parts_of_every_family(checkpoint: Any, family: str) -> None:
    trunk, parts = parts_of(checkpoint(family))
    assert parts is not None
    layer = parts.layers[1]
    assert (layer.norms is None) == (family in {"mixtral", "qwen2_moe"})
    assert (layer.norms is not None and layer.norms.is_whole) == (family == "olmoe")
    assert (layer.qkv_bias is not None) == (layer.shared is not None) == (family == "qwen2_moe")
    assert parts.router.is_normalised == (family == "mixtral")
    assert layer.routers.shape == (3 * 8 + (family == "qwen2_moe"), 64)
    assert parts.layers[3].routers.shape == (8 + (family == "qwen2_moe"), 64)
    assert layer.heads.kv == len(trunk.model.model.layers[1].self_attn.k_proj.weight) // 16


def test_what_is_one_product_lies_in_one_piece_and_only_once(checkpoint: Any) -> None:
    pool = TensorPool()
    trunk, parts = parts_of(checkpoint("qwen2_moe"), pool=pool)
    assert parts is not None
    attention, mixture = trunk.model.model.layers[2].self_attn, trunk.model.model.layers[2].mlp
    layer, expert = parts.layers[2], mixture.shared_expert
    assert layer.shared is not None
    assert layer.qkv_bias is not None
    pieces = {
        layer.qkv: [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight],
        layer.qkv_bias: [attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias],
        layer.shared.gate_up: [expert.gate_proj.weight, expert.up_proj.weight],
    }
    for whole, tensors in pieces.items():
        assert torch.equal(whole, torch.cat(tensors))
        assert {each.untyped_storage().data_ptr() for each in tensors} == {whole.untyped_storage().data_ptr()}
    again = parts_of(checkpoint("qwen2_moe"), first_layer=2, pool=pool)[1]  # a range that shares its tensors
    assert again is not None
    assert again.layers[0].shared is not None
    assert again.layers[0].shared.gate_up.data_ptr() == layer.shared.gate_up.data_ptr()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"attention_bias": True}),  # of the output too
        ("qwen2_moe", {"mlp_only_layers": [1]}),
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen2_moe", {"layer_types": SLIDING, "use_sliding_window": True, "sliding_window": 8}),
        ("qwen3_moe", {"head_dim": 24}),
        ("deepseek_v2", {}),
    ],
    ids=str,
)
def test_odd_models_are_left_to_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    assert parts_of(odd(family, tmp_path, changes))[1] is None


def test_a_range_without_what_is_odd(tmp_path: Path) -> None:
    path = odd("qwen2_moe", tmp_path, {"mlp_only_layers": [1]})
    trunk, parts = parts_of(path, first_layer=2)
    assert parts is not None
    assert (parts.first_layer, len(parts.layers), trunk.spec.layers) == (1, 1, 2)
