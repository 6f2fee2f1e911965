"""A whole model whose experts are what a low precision makes of them, for as long as something is measured.

Decides nothing: it rounds the experts of a loaded model as packed records would have them (`runtime.precision`), and
puts the weights back. Holds what it rounds twice. Must not know what is measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch

from runtime.precision import rounded
from schemas.precision import LowPrecision, PartName, Precision

_MATRICES: Final[tuple[PartName, ...]] = ("gate_up_proj", "down_proj")


def fused_experts(model: Any) -> list[Any]:
    """Return the modules that hold the fused experts of a whole transformers model, in layer order."""
    return [m for m in model.modules() if all(getattr(getattr(m, name, None), "ndim", 0) == 3 for name in _MATRICES)]


@contextmanager
def degraded(model: Any, precision: LowPrecision, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Let experts of a model (of some layers with experts, all if None) be what `precision` makes of them meanwhile.

    Raises
    ------
    UnfitPrecision
        Their shape has no place for its groups. Nothing changes.
    """
    axis = 0 if model.config.model_type == "gpt_oss" else 1
    modules = fused_experts(model)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for module in modules if layers is None else [modules[layer] for layer in layers]:
                for name in _MATRICES:
                    weights = getattr(module, name).data
                    kept.append((weights, weights.clone()))
                    for expert in weights:
                        expert.copy_(rounded(expert, name=name, axis=axis, precision=precision))
        yield
    finally:
        with torch.no_grad():
            for weights, was in kept:
                weights.copy_(was)


def held_in(model: Any, precision: Precision) -> AbstractContextManager[None]:
    """Let a model be as it is where every expert is held in a precision; raises `UnfitPrecision` on entry."""
    return nullcontext() if precision == "checkpoint" else degraded(model, precision)
