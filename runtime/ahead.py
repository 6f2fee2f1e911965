"""Guesses of what the next layer will ask for, from whatever a running step knows.

Decides nothing: 81 to 89 % of a gate's guesses come true (RUNTIME.md), whether they are worth a load is
`policy.prefetch`'s. Must not know what is resident.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from runtime.policy.guessing import Predictor, best
from runtime.predictors import predictor_for
from runtime.routers import routers_of
from runtime.skeleton import RoutedExperts
from schemas.model import ModelSpec

_POPULAR: Final = 0.02  # of a prompt's tokens
_SEEN: Final = 64  # tokens of a step: to count more of a prompt's takes longer than it is worth


class Foresight(Protocol):
    """Guesses the experts of the next layer while a step runs."""

    def see(self, layer: int, top_k_index: torch.Tensor) -> None:
        """Learn what the router of a layer chose, [T, K]. Modifies."""
        ...

    def guess(self, layer: int, hidden: torch.Tensor) -> Sequence[int]:
        """Return the experts that `layer` would choose, given what the layer's experts before it get, [T, D]."""
        ...


class NextRouters:
    """The routers of a model by layer: each on the hidden state that the experts of the layer before it get."""

    def __init__(self, model: Any) -> None:
        layers = [module.layer for module in model.modules() if isinstance(module, RoutedExperts)]
        self._routers = dict(zip(layers, routers_of(model), strict=True))

    def see(self, layer: int, top_k_index: torch.Tensor) -> None:
        """Learn nothing: a router knows."""

    def guess(self, layer: int, hidden: torch.Tensor) -> Sequence[int]:
        """Return the experts that `layer` would choose, the most popular first; none where it is not run here.

        What hardly any of many tokens would choose is left out: of the rest 99 % come true (tinymoe-base, 256 tokens),
        of all 97 %.
        """
        router: Any = self._routers.get(layer)
        if router is None:
            return ()
        chosen: list[int] = router.forward(hidden)[2].flatten().tolist()  # past the hooks: this is no routing
        return [expert for expert, tokens in Counter(chosen).most_common() if tokens >= _POPULAR * len(hidden)]


class Learnt:
    """A predictor, which sees choices and no hidden states.

    Parameters
    ----------
    layers, top_k
        Of the model.
    """

    def __init__(self, predictor: Predictor, layers: int, top_k: int) -> None:
        self._predictor = predictor
        self._layers = layers
        self._top_k = top_k

    def see(self, layer: int, top_k_index: torch.Tensor) -> None:
        """Let the predictor see a choice; of a prompt, its last tokens'."""
        self._predictor.observe(layer, top_k_index[-_SEEN:].cpu().numpy())

    def guess(self, layer: int, hidden: torch.Tensor) -> Sequence[int]:  # noqa: ARG002
        """Return as many experts as each token will choose; none behind the last layer."""
        if layer >= self._layers:
            return ()
        guessed: list[int] = best(self._predictor.scores(layer), self._top_k).tolist()
        return guessed


def learnt_from(file: Path, spec: ModelSpec) -> Learnt:
    """Return what guesses by a predictor file for a model; raises `InvalidFile`, or `InvalidInput` if of another."""
    predictor = predictor_for(file, layers=spec.layers, experts=spec.experts, top_k=spec.top_k)
    return Learnt(predictor, spec.layers, spec.top_k)
