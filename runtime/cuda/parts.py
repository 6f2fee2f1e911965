"""What the layers of a model are made of, as far as a step can be run with them: their tensors, and how they are used.

Decides which models are made of such parts, and of which: queries and keys normed each head alone, all heads together
or not at all; biases of their projections; an expert that every token uses. Must not know how anything is computed.
Axes: D hidden, E experts, S ffn of the shared expert, H query and G key heads, d of a head.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from runtime.cuda.buffers import LOOK_AHEAD
from runtime.cuda.shapes import HeadNorms, Heads, Lanes, RouterShape, Scale, SharedExpert
from runtime.loading import Trunk
from runtime.pool import SlotPool
from runtime.routers import router_rule
from runtime.skeleton import RoutedExperts
from schemas.store import RecordLayout

_ROUNDED_WEIGHTS: Final = {"mixtral": False, "olmoe": True, "qwen2_moe": True, "qwen3_moe": True}
"""Families whose layers are made of these parts; whether their routers' weights are rounded to the model's dtype."""
_CHANGING_ROTARY: Final = ("dynamic", "longrope")  # their angles depend on how long the sequence is
_SHARED: Final = {"shared_expert", "shared_expert_gate"}


@dataclass(frozen=True)
class LayerParts:
    """The tensors of a decoder layer.

    Attributes
    ----------
    qkv, qkv_bias
        Of queries, keys and values, [(H + 2 G) d, D] and [(H + 2 G) d].
    routers
        [E, D]; behind it those of the layers after, whose product with what this layer's experts get is a guess of what
        they will choose; and behind these what weighs the shared expert, [1, D], where there is one.
    """

    first_norm: Scale
    second_norm: Scale
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    routers: torch.Tensor
    norms: HeadNorms | None
    heads: Heads
    shared: SharedExpert | None


@dataclass(frozen=True)
class StepParts:
    """The tensors of a range of layers.

    Attributes
    ----------
    first_layer
        Of the range, counted among layers with experts.
    """

    trunk: Trunk
    layers: tuple[LayerParts, ...]
    router: RouterShape
    first_layer: int
    activated: int


def step_parts(trunk: Trunk, layout: RecordLayout) -> StepParts | None:
    """Return the parts of a trunk whose steps can be run like this; None for any other.

    Joins in memory what is one product: q, k and v; gate and up of a shared expert.
    """
    config = trunk.model.config
    is_rounded = _ROUNDED_WEIGHTS.get(config.model_type)
    form = layout.form
    is_plain = form.kind == "swiglu" and form.activation == "silu" and layout.dtype == str(trunk.dtype)[6:]
    layers = list(trunk.model.model.layers)
    if (
        is_rounded is None
        or not is_plain
        or any(trunk.decoder.windows)
        or getattr(config, "clip_qkv", None) is not None
        or getattr(trunk.model.model.rotary_emb, "rope_type", "default") in _CHANGING_ROTARY
        or any(_is_odd_mixture(layer.mlp, trunk.dtype) for layer in layers)
        or any(_is_odd_attention(layer.self_attn, trunk.dtype) for layer in layers)
    ):
        return None
    return StepParts(
        trunk,
        tuple(_parts_of(layers, index) for index in range(len(layers))),
        RouterShape(trunk.spec.experts, layers[0].mlp.gate.top_k, router_rule(config).is_normalised, is_rounded),
        layers[0].mlp.experts.layer,
        layout.parts[1].shape[1],
    )


def _is_odd_mixture(mixture: Any, dtype: torch.dtype) -> bool:
    """Whether there is anything but routed experts, a router, and perhaps a shared expert without biases."""
    children = dict(mixture.named_children())
    beside = children.keys() - {"experts", "gate"}
    if not isinstance(children.get("experts"), RoutedExperts) or beside not in (set(), _SHARED):
        return True
    linear = [module for name in beside for module in children[name].modules() if isinstance(module, nn.Linear)]
    return any(_is_odd(each, dtype, may_have_bias=False) for each in linear)


def _is_odd_attention(attention: Any, dtype: torch.dtype) -> bool:
    """Whether biases or norms are others than these parts have, or heads' size is no power of two of 16 or more."""
    size, projections = attention.head_dim, _qkv_of(attention)
    counts = [len(each.weight) for each in projections[:2]]
    return (
        any(_is_odd(each, dtype, may_have_bias=True) for each in projections)
        or _is_odd(attention.o_proj, dtype, may_have_bias=False)
        or len({each.bias is None for each in projections}) > 1
        or (hasattr(attention, "q_norm") and _norm_sizes(attention) not in ([size, size], counts))
        or size < 16
        or bool(size & (size - 1))
    )


def _is_odd(linear: Any, dtype: torch.dtype, *, may_have_bias: bool) -> bool:
    has_bias = linear.bias is not None
    return linear.weight.dtype != dtype or (has_bias and (not may_have_bias or linear.bias.dtype != dtype))


def _qkv_of(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _norm_sizes(attention: Any) -> list[int]:
    return [len(attention.q_norm.weight), len(attention.k_norm.weight)]


def _parts_of(layers: list[Any], index: int) -> LayerParts:
    layer = layers[index]
    attention, mixture = layer.self_attn, layer.mlp
    size, projections = attention.head_dim, _qkv_of(attention)
    queries, kv = (len(each.weight) // size for each in projections[:2])
    has_shared = hasattr(mixture, "shared_expert")
    routers = [each.mlp.gate.weight for each in layers[index : index + 1 + LOOK_AHEAD]]
    whole = torch.cat([*routers, mixture.shared_expert_gate.weight] if has_shared else routers)
    return LayerParts(
        _scale(layer.input_layernorm),
        _scale(layer.post_attention_layernorm),
        _joined([each.weight for each in projections]),
        None if projections[0].bias is None else _joined([each.bias for each in projections]),
        attention.o_proj.weight,
        whole,
        _norms_of(attention) if hasattr(attention, "q_norm") else None,
        Heads(queries, kv, size, attention.scaling),
        _shared_of(mixture.shared_expert, whole[-1:]) if has_shared else None,
    )


def _norms_of(attention: Any) -> HeadNorms:
    is_whole = _norm_sizes(attention) != [attention.head_dim] * 2
    return HeadNorms(
        attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon, is_whole=is_whole
    )


def _shared_of(expert: Any, weigh: torch.Tensor) -> SharedExpert:
    return SharedExpert(_joined([expert.gate_proj.weight, expert.up_proj.weight]), expert.down_proj.weight, weigh)


def _scale(norm: Any) -> Scale:
    return Scale(norm.weight, norm.variance_epsilon)


def _joined(parameters: list[Any]) -> torch.Tensor:
    """Return parameters as one tensor, which they are views of from then on."""
    parts: list[torch.Tensor] = [each.detach() for each in parameters]
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    ends = [part.data_ptr() + part.nbytes for part in parts]
    is_one = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    if is_one and all(end == part.data_ptr() for end, part in zip(ends, parts[1:], strict=False)):
        return parts[0].as_strided(shape, parts[0].stride())
    whole = torch.cat(parts)
    for parameter, part in zip(parameters, whole.split([len(part) for part in parts]), strict=True):
        parameter.data = part
    return whole


def lanes_of(pool: SlotPool, parts: StepParts) -> Lanes:
    """Return where the weights of experts lie."""
    memory, stride, starts = pool.lanes()
    return Lanes(memory, stride, starts[0], starts[1], parts.trunk.spec.hidden_size, parts.activated)
