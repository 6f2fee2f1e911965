"""The same bits in fewer operations: what in transformers' models is worth replacing while tokens come one by one.

Decides nothing by name alone: a replacement is taken where a probe shows that it gives the module's own bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

_PROBED: Final = 16  # vectors

Norm = Callable[[Any, torch.Tensor], torch.Tensor]


def quicken(model: Any, dtype: torch.dtype) -> None:
    """Let the RMS norms of a loaded model compute in one operation (a third of the time of six). Modifies.

    Parameters
    ----------
    dtype
        Of the hidden states, which a norm's weight may differ from.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norms = (_fused, _widened, _wide) if module.weight.dtype == dtype else (_widened, _wide)
            quick = next((norm for norm in norms if _is_same(module, norm, dtype)), None)
            if quick is not None:
                module.forward = partial(quick, module)


def _fused(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _widened(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Normalise in float32, scale in the weight's own dtype, as most families do in half precision."""
    wide = functional.rms_norm(hidden.float(), norm.weight.shape, None, norm.variance_epsilon)
    scaled: torch.Tensor = norm.weight * wide.to(hidden.dtype)
    return scaled


def _wide(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Normalise and scale in float32, as gpt_oss does."""
    wide = functional.rms_norm(hidden.float(), norm.weight.shape, norm.weight.float(), norm.variance_epsilon)
    return wide.to(hidden.dtype)


def _is_same(module: Any, quick: Norm, dtype: torch.dtype) -> bool:
    weight = module.weight
    drawn = torch.randn((_PROBED, *weight.shape), generator=torch.Generator().manual_seed(0))
    scales = torch.logspace(-3, 3, _PROBED)[:, None]
    with torch.inference_mode():
        probe = (drawn * scales).to(weight.device, dtype)
        want, got = module(probe), quick(module, probe)
        return want.dtype == got.dtype and torch.equal(want, got)
