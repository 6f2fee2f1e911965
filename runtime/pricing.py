"""What replacing each expert costs beside the others: how strongly the loss of text depends on what it puts out.

Decides nothing; measures in one exact pass with gradients, from which `runtime.calibrate` makes prices. Must not know
budgets, nor what is at hand.

Axes: N pieces, T tokens, L layers, E experts, K top-k.
"""

from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from runtime.policy.eviction import Floats
from runtime.routers import routers_of

_BATCH: Final = 4  # pieces whose activations are kept at once
_DOUBT: Final = 50.0  # uses that an expert's own mean must outweigh its layer's with


def expert_prices(model: Any, pieces: torch.Tensor, *, layers: int, experts: int) -> Floats:
    """Return what replacing each expert costs, float64 [L, E], relative to the mean of all.

    An expert of weight w puts w O into its layer's output, and the loss changes by ``g . O`` for each unit of w. Taking
    it away, or another whose output is all but orthogonal in its place, therefore changes predictions by about
    ``w^2 (g . O)^2 / 2`` nats of divergence (the Fisher information in that direction): so the price is the mean of
    ``(g . O)^2`` over the tokens that use the expert, other than as their first, which is hardly ever replaced. Seldom
    used ones are taken to be like their layer.

    Parameters
    ----------
    pieces
        Token ids int64 [N, T + 1].
    """
    square, uses = np.zeros((layers, experts)), np.zeros((layers, experts))
    tap = _Weights()
    hooks = [router.register_forward_hook(tap) for router in routers_of(model)]
    try:
        for batch in torch.split(pieces, _BATCH):
            tap.weights, tap.index = [], []
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            for layer, slope in enumerate(torch.autograd.grad(loss, tap.weights)):
                weights = tap.weights[layer].detach()
                light = weights < weights.max(dim=-1, keepdim=True).values
                index = tap.index[layer][light].numpy()
                np.add.at(square[layer], index, slope[light].double().numpy() ** 2)
                np.add.at(uses[layer], index, 1.0)
    finally:
        for hook in hooks:
            hook.remove()
    typical = square.sum(1, keepdims=True) / np.maximum(uses.sum(1, keepdims=True), 1.0)
    price = (square + _DOUBT * typical) / (uses + _DOUBT)
    return np.asarray(price / price.mean() if price.any() else np.ones_like(price))


class _Weights:
    """A hook on routers by whose weights the loss can be differentiated, layer after layer."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []

    def __call__(
        self, _: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the router returned, with weights that keep their gradient."""
        logits, weights, index = output
        self.weights.append(weights.detach().requires_grad_())
        self.index.append(index)
        return logits, self.weights[-1], index
