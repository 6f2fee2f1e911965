"""Eviction by what it costs to have an expert back: what comes from a slow place, or is small, is kept sooner.

Decides how a chance of use, seconds and bytes make one number. A copy that is given up must come back from wherever
its record lies: host memory, this machine's disk, another node. Keeping it saves those seconds whenever it is used, and
takes its bytes all the while, so its worth is that of GreedyDual-Size (Cao and Irani, USITS 1997, section 4) with a
measured chance in the place of recency::

    worth = chance of use × seconds to bring it back / bytes

Where every expert costs the same this is the policy that says the chance. Must not know where anything lies: prices
are given.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from runtime.policy.eviction import Eviction, Floats, Ints

_FADE: Final = 0.9


class CostAware:
    """Another policy's worth times a price.

    Parameters
    ----------
    chance
        Says what keeping each expert would be worth if all cost the same.
    num_keys
        L * E.
    """

    def __init__(self, chance: "Eviction", num_keys: int) -> None:
        self._chance = chance
        self._price = np.ones(num_keys)

    def price(self, seconds: "Floats", num_bytes: "Floats | float" = 1.0) -> None:
        """Say what bringing each expert back takes and how many bytes it is, float64 ``[L * E]``. Modifies."""
        self._price = seconds / num_bytes

    def observe(self, layer: int, ids: "Ints", scores: "Floats", top_k: int) -> None:
        """Learn from routing."""
        self._chance.observe(layer, ids, scores, top_k)

    def worth(self, keys: "Ints", layer: int) -> "Floats":
        """Return the chance of use times the price."""
        return self._chance.worth(keys, layer) * self._price[keys]


class ReloadTimes:
    """How long having an expert took lately, by where it came from: moving averages. Not thread-safe.

    Parameters
    ----------
    guesses
        What it takes by kind of place, until something came from there: only ratios matter, and the first load puts
        them right.
    """

    def __init__(self, guesses: Mapping[str, float]) -> None:
        self._guesses = guesses
        self._seconds: dict[tuple[str, str], float] = {}

    def observe(self, place: tuple[str, str], seconds: float) -> None:
        """Note a load from a place, which has a kind and whatever else tells it apart. Modifies."""
        known = self._seconds.get(place, seconds)
        self._seconds[place] = _FADE * known + (1 - _FADE) * seconds

    def seconds(self, place: tuple[str, str]) -> float:
        """Return what a load from a place takes."""
        return self._seconds.get(place, self._guesses[place[0]])
