"""Which layers of a loaded model decode leanly: those for which a probe shows that it gives the module's own bits.

Decides by comparison, not by the name of a family: a lean layer is built from what a module looks like, run beside it
for a few tokens of a made-up session, and taken if outputs, routing and cache are the same to the bit. Where a part
(attention, experts) cannot be had leanly, the module's own is called in its place. Must not know sessions.
"""

import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from runtime.caches import session_cache
from runtime.lean import Attention, Beat, Layer, Mixture, Part, Router, Shared, signed
from runtime.quick import Norm, is_norm, make_norm, norm_rule
from runtime.skeleton import LayerDispatch, RoutedExperts

log = logging.getLogger(__name__)

_PROMPT: Final = 5  # tokens
_STEPS: Final = 6
_ALIGNMENT: Final = 64  # bytes: what begins elsewhere may be summed in another order

Step = Callable[[torch.Tensor, Beat], torch.Tensor]
"""A layer: (hidden [B, D], beat) -> [B, D]."""


@dataclass(frozen=True, slots=True)
class ModuleAttention:
    """A module's own attention."""

    index: int
    module: Any

    def __call__(self, x: torch.Tensor, beat: Beat) -> torch.Tensor:
        """Attend from [B, D]."""
        mask = beat.masks[self.index]
        attended: torch.Tensor = self.module(hidden_states=x[:, None], attention_mask=mask, **beat.module_options)[0]
        return attended[:, 0]


@dataclass(frozen=True, slots=True)
class ModuleExperts:
    """A module's own experts, or what it has in their place; routed ones go to the dispatch that its trunk has."""

    module: Any

    def __call__(self, x: torch.Tensor, _: Beat) -> torch.Tensor:
        """Return what the experts make of [B, D]."""
        output = self.module(x[:, None])
        made: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return made[:, 0]


@dataclass(frozen=True, slots=True)
class ModuleLayer:
    """A decoder layer as it is."""

    index: int
    module: Any

    def __call__(self, hidden: torch.Tensor, beat: Beat) -> torch.Tensor:
        """Return the next layer's hidden states, [B, D]."""
        mask = beat.masks[self.index]
        output: torch.Tensor = self.module(hidden[:, None], attention_mask=mask, **beat.module_options)
        return output[:, 0]


def module_options(inner: Any, hidden: torch.Tensor, positions: torch.Tensor, cache: Any) -> dict[str, Any]:
    """Return what the modules of a layer are called with, but for the mask."""
    rotary = inner.rotary_emb(hidden, position_ids=positions)
    return {"position_ids": positions, "past_key_values": cache, "use_cache": True, "position_embeddings": rotary}


def angles(rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and signed sine, [B, 1, 1, d], of what a rotary embedding returns; empty for another kind."""
    if not isinstance(rotary, tuple):
        return torch.empty(0), torch.empty(0)
    return rotary[0][:, None], signed(rotary[1])[:, None]


def lean_layers(model: Any, dtype: torch.dtype, dispatch: ContextVar[LayerDispatch]) -> list[Step]:
    """Return the leanest equal of every layer of a loaded model, in order.

    Parameters
    ----------
    dtype
        Of the hidden states.
    dispatch
        What the model's `RoutedExperts` call.
    """
    return [
        leanest(model, index, list(_candidates(model.config, index, layer, dtype)), dtype, dispatch)
        for index, layer in enumerate(model.model.layers)
    ]


def leanest(
    model: Any, index: int, candidates: list[Step], dtype: torch.dtype, dispatch: ContextVar[LayerDispatch]
) -> Step:
    """Return the first of some candidates that computes what the module of layer `index` does, else the module."""
    module = ModuleLayer(index, model.model.layers[index])
    if not candidates:
        return module
    want = _trial(model, index, module, dtype, dispatch)
    for candidate in candidates:
        try:
            got = _trial(model, index, candidate, dtype, dispatch)
        except RuntimeError as error:  # shapes that only look like the usual ones
            log.info("layer %s: cannot be run leanly: %s", index, error)
            continue
        if len(want) == len(got) and all(map(_is_same, want, got)):
            return candidate
    return module


def _candidates(config: Any, index: int, layer: Any, dtype: torch.dtype) -> Iterator[Step]:
    """Yield what may stand in for a layer, the leanest first."""
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    if {name for name, _ in layer.named_children()} != set(names):
        return
    attentions: list[Part] = [ModuleAttention(index, layer.self_attn)]
    if config._attn_implementation == "sdpa" and (lean := _attention(index, layer.self_attn, dtype)) is not None:
        attentions.insert(0, lean)
    mixtures: list[Part] = [ModuleExperts(layer.mlp)]
    if (mixture := _mixture(layer.mlp)) is not None:
        mixtures.insert(0, mixture)
    first, second = layer.input_layernorm.forward, layer.post_attention_layernorm.forward
    for attention in attentions:
        for experts in mixtures:
            yield Layer(first, attention, second, experts)


def _attention(index: int, module: Any, dtype: torch.dtype) -> Attention | None:
    """Return a module's attention as products of tensors, if it is made of the usual parts."""
    children = dict(module.named_children())
    linear = [children.pop(f"{name}_proj", None) for name in "qkvo"]
    norms = [children.pop(f"{name}_norm", None) for name in "qk"]
    is_usual = not children and all(type(each) is nn.Linear for each in linear)
    if not is_usual or getattr(module.config, "clip_qkv", None) is not None:
        return None
    query, key, value, out = linear
    size = module.head_dim
    heads, groups = query.out_features // size, key.out_features // size
    qkv, bias = (joined([getattr(each, name) for each in (query, key, value)]) for name in ("weight", "bias"))
    normed = _Normed(None, None) if norms == [None, None] else _normed(norms, (heads, groups), size, dtype)
    if qkv is None or normed is None or (bias is None and query.bias is not None):
        return None
    return Attention(index, qkv, bias, out.weight, out.bias, *normed, heads, groups, size, module.scaling)


class _Normed(NamedTuple):
    """A norm of queries and keys together, and as what it sees them, see `Attention`."""

    norm: Norm | None
    shape: tuple[int, int] | None


def _normed(norms: list[Any], heads: tuple[int, int], size: int, dtype: torch.dtype) -> _Normed | None:
    """Return the norms of queries and of keys as one, over each head (Qwen3) or over all of them (OLMoE)."""
    if not all(map(is_norm, norms)) or norms[0].variance_epsilon != norms[1].variance_epsilon:
        return None
    rule, weights = norm_rule(norms[0], dtype), [each.weight for each in norms]
    sizes = [len(weight) for weight in weights]
    if rule is None or sizes not in ([size, size], [heads[0] * size] * 2) or (sizes[0] > size and heads[0] != heads[1]):
        return None
    if sizes[0] > size:
        return _Normed(make_norm(rule, torch.stack(weights), norms[0].variance_epsilon), (2, sizes[0]))
    whole = torch.cat([weight.expand(count, 1, -1) for weight, count in zip(weights, heads, strict=True)])
    return _Normed(make_norm(rule, whole, norms[0].variance_epsilon), None)


def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return parts that lie behind each other in memory as one tensor, None where they do not."""
    tensors = [part for part in parts if part is not None]
    if len(tensors) < len(parts):
        return None
    first, ends = tensors[0], tensors[0].data_ptr()
    if len({part.untyped_storage().data_ptr() for part in tensors}) > 1:
        return None  # neighbours by chance
    for part in tensors:
        if part.data_ptr() != ends or not part.is_contiguous():
            return None
        ends += part.nbytes
    rows = sum(len(part) for part in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def join_projections(model: Any) -> None:
    """Lay query, key and value projections behind each other, so that one product makes all three. Modifies.

    Nothing but where they lie changes. Those that lie so already, since another range shares them, stay.
    """
    for module in model.modules():
        projections = [getattr(module, f"{name}_proj", None) for name in "qkv"]
        if all(type(each) is nn.Linear for each in projections):
            _join(projections, "weight")
            _join(projections, "bias")


def _join(projections: list[Any], name: str) -> None:
    tensors = [getattr(each, name) for each in projections]
    if any(each is None or each.is_meta or each.nbytes % _ALIGNMENT for each in tensors) or joined(tensors) is not None:
        return
    whole = torch.cat([each.detach() for each in tensors])
    parts = torch.split(whole, [len(each) for each in tensors])
    for projection, part in zip(projections, parts, strict=True):
        setattr(projection, name, nn.Parameter(part, requires_grad=False))


def _mixture(module: Any) -> Mixture | None:
    """Return a module's routed experts, if it has them and nothing unusual beside."""
    children = dict(module.named_children())
    routers = [children.pop(name) for name in ("gate", "router") if name in children]
    shared, weigh = children.pop("shared_expert", None), children.pop("shared_expert_gate", None)
    experts = children.pop("experts", None)
    if children or len(routers) != 1 or not isinstance(experts, RoutedExperts) or (shared is None) != (weigh is None):
        return None
    router = routers[0]
    beside = None
    if shared is not None:
        parts = (shared.gate_proj, shared.up_proj, shared.down_proj, weigh)
        if any(type(part) is not nn.Linear or part.bias is not None for part in parts):
            return None
        gate, up, down, weight = (part.weight for part in parts)
        beside = Shared(gate, up, down, shared.act_fn, weight)
    return Mixture(experts.layer, _router(router), router, beside)


def _router(module: Any) -> Any:
    """Return the router in fewer steps, if it is one of those that are known; else the module's own."""
    if {name for name, _ in module.named_parameters()} != {"weight"} or not hasattr(module, "top_k"):
        return module.forward
    with torch.inference_mode():
        probe = torch.randn((16, module.weight.shape[1]), generator=torch.Generator().manual_seed(2)).to(module.weight)
        want = module.forward(probe)
        for is_normalised in (True, False):
            for is_wide in (True, False):  # nothing is done to float32 to keep it so
                router = Router(module.weight, module.top_k, is_normalised, is_wide)
                if all(map(_is_same, want, router(probe))):
                    return router
    return module.forward


def _is_same(want: torch.Tensor, got: torch.Tensor) -> bool:
    return want.dtype == got.dtype and torch.equal(want, got)


def _trial(
    model: Any, index: int, step: Step, dtype: torch.dtype, dispatch: ContextVar[LayerDispatch]
) -> list[torch.Tensor]:
    """Run a made-up session through one layer; returns its outputs, what the router chose, and the cache."""
    seen: list[torch.Tensor] = []

    def routed(_: int, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        seen.extend((x, top_k_index, top_k_weights))
        return x * top_k_weights[:, :1].to(x.dtype)

    inner, config = model.model, model.config
    layer = inner.layers[index]
    device = next(layer.parameters()).device
    drawn = torch.randn((_PROMPT + _STEPS, config.hidden_size), generator=torch.Generator().manual_seed(index))
    drawn = (drawn * torch.logspace(-2, 2, len(drawn))[:, None]).to(device, dtype)
    cache = session_cache(config, len(drawn))
    active = dispatch.set(routed)
    try:
        with torch.inference_mode():
            positions = torch.arange(len(drawn), device=device)[None]
            begin = module_options(inner, drawn[None, :_PROMPT], positions[:, :_PROMPT], cache)
            layer(drawn[None, :_PROMPT], attention_mask=None, **begin)
            for at in range(_PROMPT, len(drawn)):
                options = module_options(inner, drawn[None, at : at + 1], positions[:, at : at + 1], cache)
                cosine, sine = angles(options["position_embeddings"])
                beat = Beat([cache], cosine, sine, routed, None, options, [None] * len(inner.layers))
                seen.append(step(drawn[at : at + 1], beat))
            return [*seen, cache.layers[index].keys, cache.layers[index].values]
    finally:
        dispatch.reset(active)
