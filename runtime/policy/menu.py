"""How an expert that is not at hand gets computed: of several ways the one that is done first.

Decides for all missing experts of a layer together: what goes over one link waits in line, different links work at the
same time, and a call that is made anyway carries one more expert for nothing. The ways that give something else than
the exact result are not here: whether they may be taken is `routing`'s and `quality`'s to say, before. Must not know
what the ways are, beyond what they take. `Rates` are measured while a node runs.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

_FADE: Final = 0.9
_PASSED: Final = 0.995
_MEMORY: Final = 4096  # uses that are remembered before all count half
_UNKNOWN_S: Final = 0.1


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


def choose(missing: Sequence[Sequence[Way]], busy: Mapping[str, float] = MappingProxyType({})) -> list[int]:
    """Return which of its ways each missing expert takes.

    The expert with the fewest ways chooses first, since it cannot give way; then each takes the way that is done first.

    Parameters
    ----------
    busy
        Seconds that links are busy with something else before.

    >>> disk, call = Way("disk", 0.2), Way("n1", 0.5, is_shared=True)
    >>> choose([[disk, call], [disk, call], [disk, call]])
    [0, 0, 1]
    >>> choose([[disk, call], [call]])
    [0, 0]
    """
    busy_s: dict[str, float] = dict(busy)
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


class Rent:
    """When an expert that is called over and over is worth bringing here: rent or buy.

    It is brought when calls for it have cost as much time as bringing it takes, so that all together it never costs
    more than twice what whoever knew the future would have paid. Experts that were asked for most often lately stay.
    What could not be brought costs twice as much from then on. Not thread-safe.

    Attributes
    ----------
    bring_s
        What it takes to bring one; 0 before the first.
    """

    def __init__(self) -> None:
        self.bring_s = 0.0
        self._paid: dict[Hashable, float] = {}
        self._uses: dict[Hashable, float] = {}
        self._penalty: dict[Hashable, float] = {}
        self._total = 0

    def pay(self, key: Hashable, seconds: float) -> bool:
        """Note a call for an expert; returns whether it is time to bring it. Modifies."""
        self.use(key)
        self._paid[key] = self._paid.get(key, 0.0) + seconds
        return self._paid[key] >= self.bring_s * self._penalty.get(key, 1.0)

    def use(self, key: Hashable) -> None:
        """Note that an expert was asked for. Modifies; what is long ago counts less and less."""
        self._uses[key] = self._uses.get(key, 0.0) + 1
        self._total += 1
        if self._total >= _MEMORY:
            self._total //= 2
            self._uses = {each: count / 2 for each, count in self._uses.items() if count > 1}
            self._paid = {each: paid / 2 for each, paid in self._paid.items() if each in self._uses}

    def uses(self, key: Hashable) -> float:
        """Return how often an expert was asked for lately."""
        return self._uses.get(key, 0.0)

    def brought(self, key: Hashable, seconds: float) -> None:
        """Note that an expert is here, and what that took. Modifies."""
        self._paid.pop(key, None)
        self._penalty.pop(key, None)
        self.bring_s = seconds if not self.bring_s else _FADE * self.bring_s + (1 - _FADE) * seconds

    def failed(self, key: Hashable) -> None:
        """Note that an expert could not be brought. Modifies."""
        self._paid.pop(key, None)
        self._penalty[key] = 2 * self._penalty.get(key, 1.0)
        self.bring_s = self.bring_s or _UNKNOWN_S


class SizedRates:
    """Seconds that computing an expert took lately, by how many tokens it computed: powers of two are told apart.

    What was never tried is guessed: fewer tokens take no longer than more of them do, the next larger size as long as
    the largest that was tried (else nobody would ever find out), and what is larger still in proportion. What is passed
    over again and again is thought to take a little less each time, so that it is tried anew once in a while. A first
    try is slow (threads begin, pages are touched), and counts only until there is a second. A lost update between
    threads does no harm.

    >>> rates = SizedRates()
    >>> rates.seconds(1) is None
    True
    >>> rates.observe(4, 0.002)
    >>> [rates.seconds(tokens) for tokens in (1, 7, 8, 16, 32)]
    [0.002, 0.002, 0.002, 0.004, 0.008]
    """

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}
        self._tries: Counter[int] = Counter()

    @property
    def is_known(self) -> bool:
        """Whether anything was tried more than once."""
        return any(tries > 1 for tries in self._tries.values())

    def observe(self, tokens: int, seconds: float) -> None:
        """Note how long so many tokens took. Modifies."""
        size = tokens.bit_length()
        known = self._rates.get(size, seconds)
        faded = _FADE * known + (1 - _FADE) * seconds
        self._rates[size] = faded if self._tries[size] > 1 else min(known, seconds)
        self._tries[size] += 1

    def pass_over(self, tokens: int) -> None:
        """Note that something else was done for want of time. Modifies."""
        size = tokens.bit_length()
        if size in self._rates:
            self._rates[size] *= _PASSED

    def seconds(self, tokens: int) -> float | None:
        """Return how long so many tokens take; None where none were tried yet."""
        size = tokens.bit_length()
        if size in self._rates or not self._rates:
            return self._rates.get(size)
        smaller = max((each for each in self._rates if each < size), default=None)
        if smaller is None:
            return self._rates[min(self._rates)]
        return float(self._rates[smaller] * 2 ** (size - smaller - 1))


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
