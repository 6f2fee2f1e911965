"""The same bits in fewer operations: what in transformers' models is worth replacing while tokens come one by one.

Decides nothing by name alone: a replacement is taken where a probe shows that it gives the module's own bits. Must not
know layers, sessions or experts. Axes: N heads, D normalised over.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

_PROBED: Final = 16  # vectors


class Scale(NamedTuple):
    """The constants of an RMS norm; as tensors too, which operations take in half the time that numbers need.

    Attributes
    ----------
    weight
        [D], or [N, D] where heads have weights of their own.
    """

    weight: torch.Tensor
    epsilon: float
    epsilon_tensor: torch.Tensor  # [] float32
    size: torch.Tensor  # [] float32: D


Rule = Callable[[Scale, torch.Tensor], torch.Tensor]
"""(constants, hidden [..., D]) -> hidden normalised over D and scaled."""
Norm = Callable[[torch.Tensor], torch.Tensor]


def quicken(model: Any, dtype: torch.dtype) -> None:
    """Let the RMS norms of a loaded model compute in as few operations as give their own bits. Modifies.

    Parameters
    ----------
    dtype
        Of the hidden states, which a norm's weight may differ from.
    """
    for module in model.modules():
        if is_norm(module) and (rule := norm_rule(module, dtype)) is not None:
            module.forward = make_norm(rule, module.weight, module.variance_epsilon)


def is_norm(module: Any) -> bool:
    """Whether a module is an RMS norm of transformers' kind."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def norm_rule(module: Any, dtype: torch.dtype) -> Rule | None:
    """Return the quickest rule that gives the bits of an RMS norm on hidden states of `dtype`; None if none does."""
    is_wide = dtype == torch.float32 == module.weight.dtype
    rules: tuple[Rule, ...] = (_short, _fused) if is_wide else (_short_half, _widened, _short_wide, _wide)
    if module.weight.device.type != "cpu":  # where torch's own operation is one, and not made of others
        rules = (_fused, _short) if is_wide else (_fused, _widened, _short_half, _wide, _short_wide)
    return next((rule for rule in rules if _is_same(module, rule, dtype)), None)


def make_norm(rule: Rule, weight: torch.Tensor, epsilon: float) -> Norm:
    """Return the norm with these constants."""
    tensors = torch.tensor([epsilon, weight.shape[-1]], dtype=torch.float32, device=weight.device)
    return partial(rule, Scale(weight, epsilon, tensors[0], tensors[1]))


def _root(scale: Scale, wide: torch.Tensor) -> torch.Tensor:
    """Return 1 / sqrt(mean of squares + epsilon), [..., 1]."""
    return torch.addcdiv(scale.epsilon_tensor, (wide * wide).sum(-1, keepdim=True), scale.size).rsqrt_()


def _short(scale: Scale, hidden: torch.Tensor) -> torch.Tensor:
    root = torch.addcdiv(scale.epsilon_tensor, (hidden * hidden).sum(-1, keepdim=True), scale.size).rsqrt_()
    return hidden * root * scale.weight


def _short_half(scale: Scale, hidden: torch.Tensor) -> torch.Tensor:
    """Normalise in float32, scale in the weight's own dtype, as most families do in half precision."""
    wide = hidden.float()
    return (wide * _root(scale, wide)).to(hidden.dtype) * scale.weight


def _short_wide(scale: Scale, hidden: torch.Tensor) -> torch.Tensor:
    """Normalise and scale in float32, as gpt_oss does."""
    wide = hidden.float()
    return (wide * _root(scale, wide) * scale.weight).to(hidden.dtype)


def _fused(scale: Scale, hidden: torch.Tensor) -> torch.Tensor:
    return _torch_norm(scale, hidden, scale.weight)


def _widened(scale: Scale, hidden: torch.Tensor) -> torch.Tensor:
    """Do what `_short_half` does, where torch's norm is one operation."""
    wide = functional.rms_norm(hidden.float(), scale.weight.shape[-1:], None, scale.epsilon)
    return scale.weight * wide.to(hidden.dtype)


def _wide(scale: Scale, hidden: torch.Tensor) -> torch.Tensor:
    """Do what `_short_wide` does, where torch's norm is one operation."""
    return _torch_norm(scale, hidden.float(), scale.weight.float()).to(hidden.dtype)


def _torch_norm(scale: Scale, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim == 1:
        return functional.rms_norm(hidden, weight.shape, weight, scale.epsilon)
    return functional.rms_norm(hidden, weight.shape[-1:], None, scale.epsilon) * weight


def _is_same(module: Any, rule: Rule, dtype: torch.dtype) -> bool:
    weight = module.weight
    drawn = torch.randn((_PROBED, *weight.shape), generator=torch.Generator().manual_seed(0))
    scales = torch.logspace(-3, 3, _PROBED)[:, None]
    with torch.inference_mode():
        probe = (drawn * scales).to(weight.device, dtype)
        want, got = module(probe), make_norm(rule, weight, module.variance_epsilon)(probe)
        return want.dtype == got.dtype and torch.equal(want, got)
