"""What the eviction policy gets to know of routing, and when.

Decides that few rows are noted and learnt when somebody asks what may go, since mostly nobody does; that many are
learnt at once, since they take memory; and that none are where nothing can ever have to go. Must not know what the
policy makes of it. Flow: a layer's rows → `Deferred`.
"""

import threading
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.policy.eviction import Deferred
from runtime.shelf import Shelf

_FEW_ROWS: Final = 64  # what may be learnt later, since it takes little memory to note


class Learner:
    """Tells the eviction policy of one residency. Thread-safe."""

    def __init__(self, eviction: Deferred, shelf: Shelf, changed: threading.Condition) -> None:
        self._eviction = eviction
        self._shelf = shelf
        self._changed = changed

    def observe_token(self, layer: int, experts: list[int], weights: NDArray[np.float32]) -> None:
        """Note the routing of one token, weights [R]. Modifies."""
        if self._shelf.lacking:
            self._eviction.note(layer, experts, weights)

    def observe(self, layer: int, token: NDArray[Any], expert: NDArray[Any], weight: torch.Tensor) -> None:
        """Note or learn the routing of some tokens, as `Residency.observe` says. Modifies."""
        if not self._shelf.lacking:
            return
        is_few = len(expert) <= _FEW_ROWS
        if not is_few and self._fits:
            return  # nothing has to go
        scores = weight.float().cpu().numpy()
        if is_few:
            self._eviction.note(layer, expert, scores, token)
            return
        with self._changed:
            self._eviction.learn(layer, expert, scores, token)

    def observe_ranked(self, layer: int, experts: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        """Learn the routing of some tokens, as `Residency.observe_ranked` says. Modifies."""
        if not self._shelf.lacking or self._fits:
            return
        with self._changed:
            self._eviction.observe(layer, experts, weights.astype(np.float64), experts.shape[1])

    @property
    def _fits(self) -> bool:
        """Whether all that is in no slot now would find a free one."""
        shelf = self._shelf
        return sum(map(shelf.unused, shelf.cached_in)) >= sum(map(len, list(shelf.absent.values())))
