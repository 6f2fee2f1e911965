"""A decoder layer for tokens that come one by one: what its module computes, in as few operations as give its bits.

Decides the order of operations only: whether they are taken in place of the module is `runtime.leaning`'s, by a probe.
Functions of tensors, on any device. Flow: hidden → norm → heads, turned by their position → each session's own cache →
attention → router → experts through the step's dispatch → hidden. Must not know sessions, or where experts are.

Axes: B sessions, one token each; D hidden, H query heads, G key heads, d of a head, S tokens in a cache, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from runtime.quick import Norm

Dispatch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
See = Callable[[Any, torch.Tensor], None]


@dataclass(slots=True)
class Beat:
    """What the layers of one decode step share.

    Attributes
    ----------
    caches
        The sessions' caches, B.
    cosine, sine
        [B, 1, 1, d] as the model's rotary embedding gives them, `sine` with the first half of d negated; empty where no
        attention is replaced.
    dispatch
        Runs the routed experts of a layer.
    see
        Takes (router, logits) of each layer, where somebody wants them.
    module_options
        What a layer's own attention is called with, where it is not replaced.
    masks
        What each layer's own attention masks, by layer.
    """

    caches: Sequence[Any]
    cosine: torch.Tensor
    sine: torch.Tensor
    dispatch: Dispatch
    see: See | None
    module_options: dict[str, Any]
    masks: Sequence[torch.Tensor | None]


def turn(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate halves against each other by position, [..., d]: x cos + (-x2, x1) sin, with the sign in the sine."""
    first, second = heads.chunk(2, -1)
    return (heads * cosine).add_(torch.cat((second, first), -1).mul_(sine))


def signed(sine: torch.Tensor) -> torch.Tensor:
    """Return [..., d] with its first half negated."""
    half = sine.shape[-1] // 2
    return torch.cat((-sine[..., :half], sine[..., half:]), -1)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of many query heads to the keys of fewer, torch's own.

    Attributes
    ----------
    qkv, bias
        Query, key and value projections in one, [(H + 2 G) d, D], and their biases.
    out, out_bias
        [D, H d].
    norm, norm_shape
        Normalises queries and keys together, seen as [B, *norm_shape]; as [B, H + G, 1, d] where that is None.
    """

    layer: int
    qkv: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    norm: Norm | None
    norm_shape: tuple[int, int] | None
    heads: int
    groups: int
    size: int
    scaling: float

    def __call__(self, x: torch.Tensor, beat: Beat) -> torch.Tensor:
        """Attend from [B, D], which is appended to the caches; returns [B, D]."""
        queries, keys, values = self.project(x, beat.cosine, beat.sine)
        layer = self.layer
        if len(beat.caches) == 1:
            attended = self.attend(queries, *beat.caches[0].layers[layer].update(keys, values))
        else:
            each_alone = (torch.unbind(states.unsqueeze(1)) for states in (queries, keys, values))
            rows = zip(beat.caches, *each_alone, strict=True)
            attended = torch.cat([self.attend(q, *cache.layers[layer].update(k, v)) for cache, q, k, v in rows])
        return functional.linear(attended, self.out, self.out_bias)

    def project(
        self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries [B, H, 1, d], keys and values [B, G, 1, d] of x [B, D]."""
        shape = (x.shape[0], -1, 1, self.size)
        heads = functional.linear(x, self.qkv, self.bias).view(shape)
        turned, values = heads.split_with_sizes((self.heads + self.groups, self.groups), 1)
        if self.norm_shape is not None and self.norm is not None:
            turned = self.norm(turned.reshape(x.shape[0], *self.norm_shape)).view(shape)
        elif self.norm is not None:
            turned = self.norm(turned)
        queries, keys = turn(turned, cosine, sine).split_with_sizes((self.heads, self.groups), 1)
        return queries, keys, values

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return what one session's queries [1, H, 1, d] find in its keys and values [1, G, S, d]: [1, H d]."""
        found = functional.scaled_dot_product_attention(
            queries, keys, values, scale=self.scaling, enable_gqa=self.groups != self.heads
        )
        return found.reshape(1, -1)


@dataclass(frozen=True, slots=True)
class Router:
    """Scores experts and chooses the best.

    Attributes
    ----------
    is_normalised
        The chosen weights are scaled to add up to 1.
    is_wide
        Weights stay in float32.
    """

    weight: torch.Tensor
    top_k: int
    is_normalised: bool
    is_wide: bool

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [B, E], weights and indices [B, K]."""
        logits = functional.linear(x, self.weight)
        weights, index = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), self.top_k)
        if self.is_normalised:
            weights.div_(weights.sum(-1, keepdim=True))
        return logits, weights if self.is_wide else weights.to(logits.dtype), index


@dataclass(frozen=True, slots=True)
class Shared:
    """An expert that every token uses, weighted by a gate of its own (Qwen2-MoE)."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]
    weigh: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return what it adds, [B, D]."""
        linear = functional.linear
        hidden = self.activation(linear(x, self.gate)) * linear(x, self.up)
        return torch.sigmoid(linear(x, self.weigh)) * linear(hidden, self.down)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Routed experts, and a shared one where the model has it.

    Attributes
    ----------
    layer
        Counted among layers with experts.
    router, router_module
        Returns logits, weights and indices; and the model's own, for whoever looks at logits.
    """

    layer: int
    router: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    router_module: Any
    shared: Shared | None

    def __call__(self, x: torch.Tensor, beat: Beat) -> torch.Tensor:
        """Return what the experts make of x [B, D], [B, D]."""
        logits, weights, index = self.router(x)
        if beat.see is not None:
            beat.see(self.router_module, logits)
        routed = beat.dispatch(self.layer, x, index, weights)
        return routed if self.shared is None else routed + self.shared(x)


Part = Callable[[torch.Tensor, Beat], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """Norm, attention, norm, experts, each added to what came in."""

    before_attention: Norm
    attention: Part
    before_experts: Norm
    experts: Part

    def __call__(self, hidden: torch.Tensor, beat: Beat) -> torch.Tensor:
        """Return the next layer's hidden states, [B, D]; modifies the sessions' caches."""
        hidden = hidden + self.attention(self.before_attention(hidden), beat)
        return hidden + self.experts(self.before_experts(hidden), beat)
