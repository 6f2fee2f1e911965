"""Whether the loads of a prompt's layers are made by other threads while its experts are computed.

Decides from measured times only: a load can be hidden behind the computing of an expert as far as that takes, and
waking another thread for it costs something. One token computes an expert in far less time than it takes to load it;
many tokens at once, which ask for most experts of every layer, compute it for about as long. Must not know clocks.
"""

from dataclasses import dataclass
from typing import Final

_FADE: Final = 0.8
_WAKE_S: Final = 2e-4  # what handing a load over costs, on a machine whose cores are busy
MANY_ROWS: Final = 64
"""Fewer rows in a layer (one row is one token at one expert) are no prompt: little to hide a load behind."""
TRUSTED: Final = 0.7
"""Share of guesses that must come true for a prompt, whose layers leave the link no time to load what nobody wants."""


@dataclass
class Pace:
    """A moving average of what computing experts takes. Not thread-safe; a lost update does no harm.

    Attributes
    ----------
    row_s
        Seconds that one row takes where there are many; 0 before the first.
    """

    row_s: float = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Note what the experts of a layer took. Modifies."""
        if rows >= MANY_ROWS:
            took = seconds / rows
            self.row_s = _FADE * self.row_s + (1 - _FADE) * took if self.row_s else took

    def hides(self, load_s: float, *, rows: int, experts: int) -> bool:
        """Whether loads of `load_s` are worth handing over while so many experts compute so many rows.

        >>> Pace(row_s=3e-5).hides(5e-4, rows=2048, experts=32), Pace(row_s=3e-5).hides(5e-4, rows=8, experts=8)
        (True, False)
        """
        return rows >= MANY_ROWS and min(load_s, self.row_s * rows / experts) > _WAKE_S
