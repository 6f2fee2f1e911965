"""Which experts many tokens at once will ask of a layer that has not run yet, so that their loads can be begun.

Decides from two sources: what the layer's router makes of the states that the layer before works on, and what tokens
asked of the layer lately. Each is held to how often it was right in that layer, and left out where it was not. Hundreds
of tokens ask for most of the experts that texts like theirs use, so that what they asked for lately mostly comes true.
Pure: no clock and no tensor. Axes: E experts.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.policy.streaming import TRUSTED

_POPULAR: Final = 0.02  # of the tokens; an expert that fewer are expected to choose is left out
_FEWEST: Final = 2.0  # tokens
_MEMORY: Final = 256.0  # tokens after which what was asked for counts half
_EXPECTED: Final = 0.85  # what a source is trusted with before anything is known of it
_FADE: Final = 0.7
_LEAD_S: Final = 4e-3  # from the last load of a layer to the first of the next, with a host that is slow

Sizes = NDArray[np.integer[Any]]


class Crowds:
    """What is expected of the layers of a model. A lost update between threads does no harm.

    >>> crowds = Crowds(2, 4)
    >>> crowds.expect(1, 100, np.array([0, 60, 1, 39]))
    [1, 3]
    >>> crowds.learn(1, 100, np.array([0, 80, 20, 0]))
    >>> crowds.expect(1, 100, np.array([0, 0, 99, 1]))
    [2, 1]
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._share = np.zeros((layers, experts))  # of recent tokens that chose an expert
        self._right = np.full((2, layers), _EXPECTED)
        self._said: list[NDArray[np.bool_] | None] = [None] * layers

    def expect(self, layer: int, tokens: int, guess: Sizes) -> list[int]:
        """Return the experts that a layer will be asked for, those that most tokens will choose first. Modifies.

        Parameters
        ----------
        tokens
            That will choose.
        guess
            How many of them choose each expert as far as the router can tell, [E].
        """
        expected = np.stack([guess, self._share[layer] * tokens])
        said = self._said[layer] = expected >= max(_FEWEST, _POPULAR * tokens)
        trusted = said & (self._right[:, layer] >= TRUSTED)[:, None]
        order = np.argsort(-(expected * trusted).sum(0), kind="stable")
        found: list[int] = order[: int(trusted.any(0).sum())].tolist()
        return found

    def learn(self, layer: int, tokens: int, sizes: Sizes) -> None:
        """Learn how many tokens chose each expert of a layer, [E]. Modifies."""
        said, self._said[layer] = self._said[layer], None
        if said is not None:
            for source, experts in enumerate(said):
                if experts.any():
                    right = float((sizes[experts] > 0).mean())
                    self._right[source, layer] = _FADE * self._right[source, layer] + (1 - _FADE) * right
        kept = 0.5 ** (tokens / _MEMORY)
        self._share[layer] = kept * self._share[layer] + (1 - kept) * sizes / tokens


def most_ahead(load_s: float) -> int:
    """Return how many loads are begun for the next layer, so that the link is busy until that layer has chosen.

    >>> most_ahead(2e-4), most_ahead(6e-3)
    (21, 1)
    """
    return 1 + int(_LEAD_S / load_s) if load_s > 0 else 1
