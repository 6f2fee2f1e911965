"""Which experts many tokens at once will ask of a layer that has not run yet, so that their loads can be begun.

Decides from two sources how many tokens to expect at each expert: what the layer's router makes of the states that the
layer before works on, and what tokens asked of the layer lately. What an expectation is worth is learnt, by source,
layer and size: how often at least one token came. Hundreds of tokens ask for most of the experts that texts like theirs
use. Pure: no clock and no tensor. Axes: L layers, E experts, B sizes (powers of two).
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.policy.streaming import TRUSTED

_SIZES: Final = 12
_MEMORY: Final = 256.0  # tokens after which what was asked for counts half
_FADE: Final = 0.8
_PRIOR: Final = 4.0  # experts that are thought to have been expected before any was
_EXPECTED: Final = np.array([0.0, 0.5, 0.6, 0.7] + [0.85] * (_SIZES - 4))  # how many of them came, by size
_LEAD_S: Final = 4e-3  # from the last load of a layer to the first of the next, with a host that is slow

Sizes = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]


class Crowds:
    """What is expected of the layers of a model. A lost update between threads does no harm.

    >>> crowds = Crowds(2, 4)
    >>> crowds.expect(1, 100, np.array([0, 60, 1, 39]))
    [1, 3]
    >>> crowds.learn(1, 100, np.array([0, 80, 20, 0]))
    >>> crowds.expect(1, 100, np.array([0, 0, 98, 1]))
    [2, 1]
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._share = np.zeros((layers, experts))  # of recent tokens that chose an expert
        self._said = np.full((2, layers, _SIZES), _PRIOR)
        self._came = self._said * _EXPECTED
        self._latest: list[Sizes | None] = [None] * layers
        self._sources = np.arange(2)[:, None]

    def expect(self, layer: int, tokens: int, guess: Sizes) -> list[int]:
        """Return the experts that a layer will probably be asked for, the likeliest first. Modifies.

        Parameters
        ----------
        tokens
            That will choose.
        guess
            How many of them choose each expert as far as the router can tell, [E].
        """
        expected = np.stack([guess, self._share[layer] * tokens])
        size = self._latest[layer] = np.clip(np.frexp(expected)[1], 0, _SIZES - 1)  # 0: less than half a token
        chance = (self._came[:, layer] / self._said[:, layer])[self._sources, size].max(0)
        order = np.lexsort((-expected.sum(0), -chance))
        found: list[int] = order[: int((chance >= TRUSTED).sum())].tolist()
        return found

    def learn(self, layer: int, tokens: int, sizes: Sizes) -> None:
        """Learn how many tokens chose each expert of a layer, [E]. Modifies."""
        latest, self._latest[layer] = self._latest[layer], None
        if latest is not None:
            self._said[:, layer] *= _FADE
            self._came[:, layer] *= _FADE
            for source, said in enumerate(latest):
                self._said[source, layer] += np.bincount(said, minlength=_SIZES)
                self._came[source, layer] += np.bincount(said, weights=sizes > 0, minlength=_SIZES)
        kept = 0.5 ** (tokens / _MEMORY)
        self._share[layer] = kept * self._share[layer] + (1 - kept) * sizes / tokens


def most_ahead(load_s: float) -> int:
    """Return how many loads are begun for the next layer, so that the link is busy until that layer has chosen.

    >>> most_ahead(2e-4), most_ahead(6e-3)
    (21, 1)
    """
    return 1 + int(_LEAD_S / load_s) if load_s > 0 else 1
