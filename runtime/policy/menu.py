"""How an expert that is not at hand gets computed: of several ways the one that is done first.

Decides for all missing experts of a layer together: what goes over one link waits in line, different links work at the
same time, and a call that is made anyway carries one more expert for nothing. The ways that give something else than
the exact result are not here: whether they may be taken is `routing`'s and `quality`'s to say, before. Must not know
what the ways are, beyond what they take. `Rates` are measured while a node runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_FADE: Final = 0.9


@dataclass(frozen=True)
class Way:
    """One way to get an expert computed.

    Attributes
    ----------
    link
        What it keeps busy: the disk, a node that is called.
    seconds
        Estimated.
    is_shared
        Further experts that go the same way are done with the first.
    """

    link: str
    seconds: float
    is_shared: bool = False


def choose(missing: Sequence[Sequence[Way]]) -> list[int]:
    """Return which of its ways each missing expert takes.

    The expert with the fewest ways chooses first, since it cannot give way; then each takes the way that is done first.

    >>> disk, call = Way("disk", 0.2), Way("n1", 0.5, is_shared=True)
    >>> choose([[disk, call], [disk, call], [disk, call]])
    [0, 0, 1]
    >>> choose([[disk, call], [call]])
    [0, 0]
    """
    busy_s: dict[str, float] = {}
    chosen = [0] * len(missing)
    for index in sorted(range(len(missing)), key=lambda each: len(missing[each])):
        ways = missing[index]
        done = [_done_s(way, busy_s) for way in ways]
        best = min(range(len(ways)), key=done.__getitem__)
        chosen[index] = best
        busy_s[ways[best].link] = done[best]
    return chosen


def _done_s(way: Way, busy_s: dict[str, float]) -> float:
    before = busy_s.get(way.link, 0.0)
    return max(before, way.seconds) if way.is_shared else before + way.seconds


class Rates:
    """Seconds that each link took lately, as a moving average. A lost update between threads does no harm."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def observe(self, link: str, seconds: float) -> None:
        """Note how long a link took. Modifies."""
        known = self._seconds.get(link)
        self._seconds[link] = seconds if known is None else _FADE * known + (1 - _FADE) * seconds

    def seconds(self, link: str) -> float | None:
        """Return how long it takes; None where it was not tried yet."""
        return self._seconds.get(link)
