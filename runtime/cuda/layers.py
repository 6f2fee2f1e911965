"""The operations of one decode step, in order: embedding, layers, final norm, on tensors that stay where they are.

Decides which models a step can be run for like this, and nothing while it runs: no value is read by the host, so that
the whole step can be captured as one graph. Where a layer lacks experts the device waits in it (`ops.wait`). Must not
know who brings them. Axes: B tokens, D hidden, F ffn, K top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

from runtime.cuda.buffers import LOOK_AHEAD, Buffers
from runtime.cuda.shapes import Heads, Lanes, RouterShape, Scale
from runtime.cuda.supply import Service
from runtime.errors import RuntimeFault
from runtime.loading import Trunk
from runtime.pool import SlotPool
from runtime.skeleton import RoutedExperts
from schemas.store import RecordLayout

_ROUNDED_WEIGHTS: Final = {"qwen3_moe": True, "mixtral": False}  # of families whose layers are made of these parts
_CHANGING_ROTARY: Final = ("dynamic", "longrope")  # their angles depend on how long the sequence is


@dataclass(frozen=True)
class LayerParts:
    """The tensors of a decoder layer.

    Attributes
    ----------
    routers
        [E, D], and behind it those of the layers after, whose product with what this layer's experts get is a guess of
        what they will choose.
    norms
        Weights and epsilon of the norms of queries and keys.
    """

    first_norm: Scale
    second_norm: Scale
    qkv: torch.Tensor
    output: torch.Tensor
    routers: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor, float] | None
    heads: Heads


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
    """Return the parts of a trunk whose steps can be run like this; None for any other. Joins q, k and v in memory."""
    config = trunk.model.config
    is_rounded = _ROUNDED_WEIGHTS.get(config.model_type)
    form = layout.form
    is_plain = form.kind == "swiglu" and form.activation == "silu" and layout.dtype == str(trunk.dtype)[6:]
    layers = list(trunk.model.model.layers)
    rotary = trunk.model.model.rotary_emb
    if (
        is_rounded is None
        or not is_plain
        or getattr(config, "sliding_window", None) is not None
        or getattr(rotary, "rope_type", "default") in _CHANGING_ROTARY
        or not all(isinstance(getattr(layer.mlp, "experts", None), RoutedExperts) for layer in layers)
        or any(_is_odd(layer.self_attn, trunk.dtype) for layer in layers)
    ):
        return None
    router = layers[0].mlp.gate
    is_normalised = config.model_type == "mixtral" or bool(config.norm_topk_prob)
    return StepParts(
        trunk,
        tuple(_parts_of(layers, index) for index in range(len(layers))),
        RouterShape(trunk.spec.experts, router.top_k, is_normalised, is_rounded),
        layers[0].mlp.experts.layer,
        layout.parts[1].shape[1],
    )


def _is_odd(attention: Any, dtype: torch.dtype) -> bool:
    """Whether an attention has a bias, another dtype, or heads whose size is no power of two of 16 or more."""
    size = attention.head_dim
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    has_bias = any(each.bias is not None for each in projections)
    return has_bias or any(each.weight.dtype != dtype for each in projections) or size < 16 or bool(size & (size - 1))


def _parts_of(layers: list[Any], index: int) -> LayerParts:
    layer = layers[index]
    attention = layer.self_attn
    size = attention.head_dim
    queries, kv = (each.weight.shape[0] // size for each in (attention.q_proj, attention.k_proj))
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
    return LayerParts(
        _scale(layer.input_layernorm),
        _scale(layer.post_attention_layernorm),
        _joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        attention.o_proj.weight,
        torch.cat([each.mlp.gate.weight for each in layers[index : index + 1 + LOOK_AHEAD]]),
        norms,
        Heads(queries, kv, size, attention.scaling),
    )


def _scale(norm: Any) -> Scale:
    return Scale(norm.weight, norm.variance_epsilon)


def _joined(projections: list[Any]) -> torch.Tensor:
    """Return the weights of projections as one matrix, which they are views of from then on."""
    weights: list[torch.Tensor] = [each.weight.detach() for each in projections]
    rows, columns = sum(map(len, weights)), weights[0].shape[1]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    is_one = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if is_one and all(end == weight.data_ptr() for end, weight in zip(ends, weights[1:], strict=False)):
        return weights[0].as_strided((rows, columns), (columns, 1))
    whole = torch.cat(weights)
    for projection, part in zip(projections, whole.split([len(weight) for weight in weights]), strict=True):
        projection.weight.data = part
    return whole


def lanes_of(pool: SlotPool, parts: StepParts) -> Lanes:
    """Return where the weights of experts lie."""
    memory, stride, starts = pool.lanes()
    return Lanes(memory, stride, starts[0], starts[1], parts.trunk.spec.hidden_size, parts.activated)


class Answer(NamedTuple):
    """Hidden states [B, D], normalised at the end of the model; logits [B, V] and best tokens [B] int64 there.

    Where the best tokens are all that is asked for, the others are those of whatever step is run last.
    """

    hidden: torch.Tensor
    logits: torch.Tensor | None = None
    best: torch.Tensor | None = None

    def tokens(self) -> torch.Tensor:
        """Return the best tokens."""
        if self.best is None:
            raise RuntimeFault("layers without the model's head choose no tokens")
        return self.best

    def own(self, *, wants_logits: bool) -> "Answer":
        """Return it in memory of its own, as far as somebody may ask for it."""
        if self.logits is None or self.best is None:
            return Answer(self.hidden.clone())
        return self._replace(logits=self.logits.clone() if wants_logits else self.logits, best=self.best.clone())


class Step:
    """The operations of a step of B tokens over fixed buffers.

    Parameters
    ----------
    ops
        `runtime.cuda.kernels`, or `runtime.cuda.reference`.

    Attributes
    ----------
    inputs
        What goes in: tokens [B] int64, or hidden states [B, D] where the range does not begin with tokens. A step of a
        whole model leaves the best tokens behind each here.
    """

    def __init__(self, parts: StepParts, lanes: Lanes, buffers: Buffers, ops: Any) -> None:
        self._parts = parts
        self._lanes = lanes
        self._buffers = buffers
        self._ops = ops
        rows, device = buffers.slots.shape[1], buffers.control.device
        is_first = parts.trunk.has_embedding
        size, dtype = ((rows,), torch.int64) if is_first else ((rows, lanes.hidden), parts.trunk.dtype)
        self.inputs = torch.zeros(size, dtype=dtype, device=device)
        self._active = torch.zeros((*buffers.slots.shape[1:], lanes.ffn), dtype=parts.trunk.dtype, device=device)

    def run(self, kv: Any, *, service: Service, lacking: Callable[[int], None] | None = None) -> "Answer":
        """Run the step.

        Parameters
        ----------
        service
            Who brings what layers lack.
        lacking
            Called in each layer when it has chosen, where the host runs the operations itself.
        """
        ops, trunk = self._ops, self._parts.trunk
        inner = trunk.model.model
        total = functional.embedding(self.inputs, inner.embed_tokens.weight) if trunk.has_embedding else self.inputs
        cos, sin = ops.angles(inner.rotary_emb, kv.positions, total.dtype)
        delta = None
        for index, layer in enumerate(self._parts.layers):
            qkv, _, total = ops.normed_product(total, delta, layer.first_norm, layer.qkv)
            queries = ops.rotate_store(qkv, cos, sin, layer.norms, layer.heads, kv, index)
            attended = ops.product(ops.attend(queries, layer.heads, kv, index), layer.output)
            logits, normed, total = ops.normed_product(total, attended, layer.second_norm, layer.routers)
            delta = self._experts(index, normed, logits, service, lacking)
        if service == "device":
            ops.join_all(self._buffers)
        if not trunk.has_head:
            return Answer(total if delta is None else total + delta)
        normed, _ = ops.add_norm(total, delta, *_scale(inner.norm))
        logits = functional.linear(normed, trunk.model.lm_head.weight, trunk.model.lm_head.bias)
        best = logits.argmax(-1)
        if trunk.has_embedding:
            self.inputs.copy_(best)
        return Answer(normed, logits, best)

    def _experts(
        self,
        index: int,
        normed: torch.Tensor,
        logits: torch.Tensor,
        service: Service,
        lacking: Callable[[int], None] | None,
    ) -> torch.Tensor:
        ops, buffers, active = self._ops, self._buffers, self._active
        ops.route(logits, self._parts.router, buffers, index, is_told=service != "device" or lacking is not None)
        if lacking is not None:
            lacking(index)
        brought = None
        if service == "device":
            brought = ops.bring(buffers, index)
            if index + 1 < len(self._parts.layers):
                ops.bring_ahead(buffers, index)
        ops.gate_up(normed, self._lanes, buffers, index, active, late=False)
        if service == "device":
            ops.join(brought)
        elif service == "host":
            ops.wait(buffers, index)
        if service != "none":
            ops.gate_up(normed, self._lanes, buffers, index, active, late=True)
        answer: torch.Tensor = ops.down(active, self._lanes, buffers, index)
        return answer
