"""Guesses of what the next layer will ask for: its router, on the hidden state that this layer's experts get.

Decides nothing: 81 to 89 % of the guesses come true (RUNTIME.md), whether they are worth a load is `policy.prefetch`'s.
Must not know what is resident.
"""

from collections.abc import Sequence
from typing import Any

import torch

from runtime.routers import routers_of
from runtime.skeleton import RoutedExperts


class NextRouters:
    """The routers of a model by layer."""

    def __init__(self, model: Any) -> None:
        layers = [module.layer for module in model.modules() if isinstance(module, RoutedExperts)]
        self._routers = dict(zip(layers, routers_of(model), strict=True))

    def guess(self, layer: int, hidden: torch.Tensor) -> Sequence[int]:
        """Return the experts that `layer` would choose for [T, D]; none where it is not run here."""
        router: Any = self._routers.get(layer)
        if router is None:
            return ()
        chosen: list[int] = router.forward(hidden)[2].flatten().tolist()  # past the hooks: this is no routing
        return list(dict.fromkeys(chosen))
