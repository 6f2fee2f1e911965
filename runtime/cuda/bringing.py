"""Experts brought to the slots of a device by the host, for a step that waits for them or will.

Decides which slots make room and what is loaded ahead. While a step runs nobody else gives slots up, and whoever calls
runs that step. Must not know how a step is run, or what is chosen instead. Flow: what a layer lacks → `Rooms` → copies
begun on the copy stream → given out.
"""

import logging
from collections.abc import Iterable, Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from runtime.copies import Copy
from runtime.cuda.table import Rooms
from runtime.errors import ExpertUnavailable, RuntimeFault
from runtime.slots import Residency

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

_NOBODY: Ints = np.zeros(0, dtype=np.int64)


class Bringer:
    """Brings experts of one residency. One step at a time.

    Attributes
    ----------
    busy_until
        When the link will have done what it was told, as far as is known.
    """

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.inside = residency.inside
        self.rooms = Rooms(self.inside.shelf)
        self.busy_until = 0.0
        self._sources: list[Copy] = []

    def bring(self, number: int, chosen: Ints, absent: Sequence[int]) -> list[Copy]:
        """Begin to load what a layer lacks, into slots that nobody needs now. Modifies.

        Returns
        -------
        list of Copy
            What is filled when the copy stream has come past.
        """
        shelf, changed = self.inside.shelf, self.inside.changed
        used: list[Copy] = []
        started: list[Copy] = []
        try:
            with changed:
                absent = self._absent(number, absent)
                slots = self.rooms.take_free(len(absent))
                if len(slots) < len(absent):  # others make room, but not those that this layer needs
                    used = self.use_ready(number, set(chosen[chosen >= 0].tolist()).difference(absent))
                    slots += self.slots(number, len(absent) - len(slots))
                for slot, expert in zip(slots, absent, strict=True):
                    shelf.use(copy := shelf.occupy((number, expert), "device", slot))
                    started.append(copy)
            self._load(started)
        finally:
            with changed:
                shelf.end_use([*used, *started])
        return started

    def bring_ahead(self, after: int, likely: Sequence[int]) -> bool:
        """Begin to load what a layer will probably lack, where there are free slots; returns whether. Modifies."""
        shelf = self.inside.shelf
        with self.inside.changed:
            absent = [
                expert
                for expert in likely
                if (after, expert) in shelf.lacking
                and not shelf.is_coming((after, expert))
                and self.inside.loader.is_at_hand((after, expert))
            ]
            slots = self.rooms.take_free(len(absent))
            copies = [
                shelf.occupy((after, expert), "device", slot) for expert, slot in zip(absent, slots, strict=False)
            ]
            for copy in copies:
                copy.is_guess = True
                shelf.guesses[after].append(copy)
                self.residency.counts.prefetched[after] += 1
        try:
            self._load(copies)
        except RuntimeFault as error:
            log.warning("an expert that was guessed cannot be loaded: %s", error)
        return bool(copies)

    @property
    def is_link_idle(self) -> bool:
        """Whether the link will have nothing to do before the next layer chooses, as far as is known."""
        return self.busy_until - perf_counter() < self.inside.shelf.slack.idle_s

    def learn(self, number: int) -> None:
        """Let the eviction policy take in what it was told: it answers the sooner when it is asked. Modifies."""
        if (eviction := self.inside.shelf.eviction) is not None:
            with self.inside.changed:
                eviction.worth(_NOBODY, number)

    def prepare(self, number: int, count: int) -> None:
        """Make up the order in which copies go when room is needed next, for so many. Modifies."""
        if self.rooms.prepared < 4 * count:
            with self.inside.changed:
                self.rooms.prepare(number, 8 * count)

    def redeem(self, number: int, chosen: Iterable[int]) -> None:
        """Count the guesses of a layer that came true; the others may go. Modifies."""
        shelf = self.inside.shelf
        if not shelf.guesses.get(number):
            return
        with self.inside.changed:
            for expert in set(chosen):
                copy = shelf.ready.get((number, expert))
                if copy is not None:
                    shelf.redeem(copy)
                    shelf.settle(copy)
            shelf.forget_guesses(number)

    def use_ready(self, number: int, experts: Iterable[int]) -> list[Copy]:
        """Use those of a layer's experts that are at hand; returns them. Modifies; the lock is held."""
        shelf = self.inside.shelf
        copies = [copy for expert in experts if (copy := shelf.ready.get((number, expert))) is not None]
        for copy in copies:
            shelf.use(copy)
        return copies

    def keep_source(self, copy: Copy) -> None:
        """Let host memory stay as it is until the device has come past; it is in use already. Modifies."""
        self._sources.append(copy)

    def end_sources(self) -> None:
        """End the use of host memory that was copied from: the device has come past. Modifies."""
        if self._sources:
            with self.inside.changed:
                self.inside.shelf.end_use(self._sources)
            self._sources = []

    def slots(self, number: int, count: int) -> list[int]:
        """Return slots for cached copies, waiting for those that are in use; the lock is held."""
        slots = self.rooms.take(number, count)
        while len(slots) < count:
            self.inside.changed.wait(0.05)
            slots += self.rooms.take(number, count - len(slots))
        return slots

    def _absent(self, number: int, lacking: Sequence[int]) -> list[int]:
        """Return what has to be loaded, when nobody else is loading it; the lock is held."""
        shelf = self.inside.shelf
        while any(shelf.is_coming((number, expert)) for expert in lacking):
            self.inside.changed.wait(0.05)
        absent = [expert for expert in lacking if (number, expert) not in shelf.ready]
        for expert in absent:
            if not shelf.can_load((number, expert)):
                raise ExpertUnavailable(number, expert, "this node")
        return absent

    def _load(self, copies: Sequence[Copy]) -> None:
        """Begin to fill copies, and give them out: whoever uses them comes behind on the stream."""
        shelf, size = self.inside.shelf, self.residency.layout.bytes
        begun = 0
        try:
            for copy in copies:
                host = self.inside.loader.start(copy)
                begun += 1
                if host is not None:
                    self._sources.append(host)
        finally:
            self.busy_until = max(self.busy_until, perf_counter()) + begun * shelf.slack.load_s
            with self.inside.changed:
                for copy in copies[:begun]:
                    shelf.finish(copy)
                    if self.residency.caching is not None:
                        self.residency.counts.load(copy.key[0], size)
                for copy in copies[begun:]:
                    shelf.fail(copy, RuntimeFault("another expert of the layer could not be loaded"))
