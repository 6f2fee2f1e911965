"""What replacing an expert costs beside the others, and to a token beside others: how strongly the loss depends on it.

Decides nothing; measures in one exact pass with gradients. Must not know budgets, nor what is at hand.

Axes: N pieces, T tokens, L layers, E experts, K top-k.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from runtime.policy.eviction import Floats
from runtime.policy.sensitivity import Sensitivity, fit
from runtime.routers import RouterRule, rank_experts, router_rule, routers_of

_BATCH: Final = 4  # pieces whose activations are kept at once
_DOUBT: Final = 50.0  # uses that an expert's own mean must outweigh its layer's with


class Prices(NamedTuple):
    """What replacements cost.

    Attributes
    ----------
    experts
        Replacing each expert, float64 [L, E], relative to the mean of all.
    sensitivity
        One token's replacements, beside those of others.
    """

    experts: Floats
    sensitivity: Sensitivity


def measure_prices(model: Any, pieces: torch.Tensor, *, layers: int, experts: int) -> Prices:
    """Return what replacements cost.

    An expert of weight w puts w O into its layer's output, and the loss changes by ``g . O`` for each unit of w. Taking
    it away, or another whose output is all but orthogonal in its place, therefore changes predictions by about
    ``w^2 (g . O)^2 / 2`` nats of divergence (the Fisher information in that direction): so the price is the mean of
    ``(g . O)^2`` over the tokens that use the expert, other than as their first, which is hardly ever replaced. Seldom
    used ones are taken to be like their layer. What a token's own ``(g . O)^2`` are, beside those prices, is what its
    sensitivity is fitted to.

    Parameters
    ----------
    pieces
        Token ids int64 [N, T + 1].
    """
    square, uses = np.zeros((layers, experts)), np.zeros((layers, experts))
    tap, seen = _Weights(router_rule(model.config)), [_Seen([], [], []) for _ in range(layers)]
    hooks = [router.register_forward_hook(tap) for router in routers_of(model)]
    try:
        for batch in torch.split(pieces, _BATCH):
            tap.weights, tap.index, tap.scores = [], [], []
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            for layer, slope in enumerate(torch.autograd.grad(loss, tap.weights)):
                weights = tap.weights[layer].detach()
                light = weights < weights.max(dim=-1, keepdim=True).values
                index = tap.index[layer][light].numpy()
                np.add.at(square[layer], index, slope[light].double().numpy() ** 2)
                np.add.at(uses[layer], index, 1.0)
                seen[layer].chosen.append(tap.index[layer].numpy())
                seen[layer].square.append((slope * light).double().numpy() ** 2)
                seen[layer].scores.append(tap.scores[layer])
    finally:
        for hook in hooks:
            hook.remove()
    typical = square.sum(1, keepdims=True) / np.maximum(uses.sum(1, keepdims=True), 1.0)
    price = (square + _DOUBT * typical) / (uses + _DOUBT)
    price = np.asarray(price / price.mean() if price.any() else np.ones_like(price))
    mattered = [each.mattered(of_experts) for each, of_experts in zip(seen, price, strict=True)]
    return Prices(price, fit([np.concatenate(each.scores) for each in seen], mattered))


class _Seen(NamedTuple):
    """What one layer's tokens chose, by batch: [T, K], squared slopes of it [T, K], and scores of all [T, E]."""

    chosen: list[NDArray[np.int64]]
    square: list[Floats]
    scores: list[NDArray[np.float32]]

    def mattered(self, price: Floats) -> Floats:
        """Return how much each token's experts mattered beside what they cost on average, [T]."""
        return np.asarray((np.concatenate(self.square) / np.maximum(price[np.concatenate(self.chosen)], 1e-12)).sum(1))


class _Weights:
    """A hook on routers by whose weights the loss can be differentiated, layer after layer."""

    def __init__(self, rule: RouterRule) -> None:
        self.weights: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []
        self.scores: list[NDArray[np.float32]] = []
        self._rule = rule

    def __call__(
        self, router: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the router returned, with weights that keep their gradient."""
        logits, weights, index = output
        self.weights.append(weights.detach().requires_grad_())
        self.index.append(index)
        ids, scores = rank_experts(self._rule, router, logits.detach(), index, width=logits.shape[-1])
        self.scores.append(torch.zeros_like(scores).scatter_(1, ids, scores).float().numpy())
        return logits, self.weights[-1], index
