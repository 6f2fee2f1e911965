"""What it takes here to compute experts that are in no slot: loading them, or computing in host memory, in place.

Decides, where host memory is apart from the device (CUDA), which experts of a layer the processor computes where they
lie, while others are loaded (Fiddler, arXiv 2402.07033): `policy.menu.choose`, from what loads and the processor took
lately. An expert that the processor has computed for as long as loading it takes is loaded next time (`Rent`), so that
what is asked for over and over comes to the device. Must not know the maths, nor how a record gets into a slot.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from runtime.copies import Copy, CopyKey, Key
from runtime.policy.menu import Rent, SizedRates, Way, choose
from runtime.shelf import Shelf

_FADE: Final = 0.9


class LocalWays:
    """The ways of one residency; whoever asks holds its lock.

    Parameters
    ----------
    may_compute
        Whether the processor may compute in host memory that is apart.

    Attributes
    ----------
    processor
        What an expert took in host memory.
    launch_s
        What the processor takes to have an expert computed by the device: it can do nothing else meanwhile.
    """

    def __init__(self, shelf: Shelf, *, may_compute: bool) -> None:
        self.processor = SizedRates()
        self.launch_s = 0.0
        self._shelf = shelf
        self._may_compute = may_compute
        self._rent = Rent()
        self._due: set[CopyKey] = set()

    def load(self, key: CopyKey) -> Way:
        """Return the way of loading a copy, after those that are loaded before it."""
        slack = self._shelf.slack
        if len(key) == 3:
            return Way("disk", slack.low_load_s)
        if "host" in self._shelf.computed_in:
            return Way("disk", slack.load_s)
        return Way(*self._shelf.comebacks.load_seconds(key))

    def in_host(self, key: CopyKey) -> Copy | None:
        """Return the copy of an expert that the processor may compute from; None where there is none."""
        return self._shelf.comebacks.in_host(key) if self._may_compute and len(key) == 2 else None

    def of(self, key: CopyKey, tokens: int) -> list[Way]:
        """Return the ways of computing an expert, loading it first; none where it is in a slot."""
        if key in self._shelf.ready:
            return []
        load = self.load(key)
        if self.in_host(key) is None:
            return [load]
        in_place = Way("processor", self.processor.seconds(tokens) or 0.0)
        if not self._shelf.can_cache:
            return [Way("host", float("inf")), in_place]
        return [load] if key in self._due else [load, in_place]

    def in_place(self, absent: Mapping[int, CopyKey], tokens: Sequence[int]) -> list[int]:
        """Return the positions of the experts that the processor computes in host memory. Modifies.

        Parameters
        ----------
        absent
            What is in no slot, by position.
        tokens
            Of the expert at each position, those that are in a slot too.
        """
        if not self._may_compute or not absent:
            return []
        by_size = sorted(absent, key=lambda position: -tokens[position])
        if not self.processor.is_known and self._shelf.can_cache:
            return [each for each in by_size if self.in_host(absent[each]) is not None][-1:]  # one will do to find out
        busy = {"processor": self.launch_s * len(tokens)}
        if self._is_link_first(absent, busy["processor"], tokens[by_size[-1]]):
            self.processor.pass_over(tokens[by_size[-1]])
            self._due.difference_update(absent.values())
            return []
        ways = [self.of(absent[position], tokens[position]) for position in by_size]
        chosen = [position for position, way in zip(by_size, choose(ways, busy), strict=True) if way]
        if len(ways[-1]) > 1 and by_size[-1] not in chosen:
            self.processor.pass_over(tokens[by_size[-1]])
        self._due.difference_update(absent.values())
        return chosen

    def _is_link_first(self, absent: Mapping[int, CopyKey], busy_s: float, fewest: int) -> bool:
        """Whether all is loaded before the processor would have computed the expert that takes it least."""
        in_place_s = busy_s + (self.processor.seconds(fewest) or 0.0)
        return self._shelf.can_cache and sum(self.load(key).seconds for key in absent.values()) <= in_place_s

    def observe_launch(self, seconds: float) -> None:
        """Note what the processor took to have an expert computed by the device. Modifies."""
        if self._may_compute:
            self.launch_s = _FADE * self.launch_s + (1 - _FADE) * seconds if self.launch_s else seconds

    def observe(self, key: Key, tokens: int, seconds: float) -> None:
        """Note what an expert took in host memory. Modifies."""
        self.processor.observe(tokens, seconds)
        self._rent.bring_s = self.load(key).seconds
        if self._rent.pay(key, seconds):
            self._rent.brought(key, self._rent.bring_s)
            self._due.add(key)
