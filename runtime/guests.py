"""Experts that the plan gave to other nodes, cached here while nobody else needs the room.

Decides nothing about time (`policy.menu.Rent` does): brings a guest in the background into a slot that is free, or that
a guest has which is asked for less, and never makes a step wait for one. A guest that was sent away meanwhile is called
where the plan says. Must not know how its record gets here: sources do. Flow: called over and over → brought from a
peer or this node's own store, checked → computed here → makes room for whatever the plan asks for.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from time import perf_counter

from runtime.comebacks import Origin
from runtime.copies import MEMORY, Copy, Key
from runtime.errors import RuntimeFault
from runtime.loads import Loader
from runtime.policy.menu import Rent
from runtime.promotion import Promoter
from runtime.records import Source
from runtime.shelf import Shelf

log = logging.getLogger(__name__)


class Guests:
    """The guests of one residency. Thread-safe.

    Parameters
    ----------
    shelf, changed
        Of the residency: its books, and their lock.
    """

    def __init__(self, shelf: Shelf, loader: Loader, changed: threading.Condition) -> None:
        self._shelf = shelf
        self._loader = loader
        self._changed = changed
        self._rent: Rent = shelf.rent
        self._promoter = Promoter(self._bring, 1)

    def invite(self, guests: Mapping[Key, Sequence[Source]]) -> None:
        """Let just these experts be cached here, and say where their records are. Modifies."""
        with self._changed:
            kept = {key: list(sources) for key, sources in guests.items() if not self._shelf.is_assigned(key)}
            for key in [key for key in self._shelf.guests if key not in kept]:
                self._send_away(key)
            self._shelf.guests = kept

    def pay(self, keys: Sequence[Key], seconds: float) -> None:
        """Note that experts were called and waited for together; perhaps one of them is brought. Modifies."""
        with self._changed:
            each = seconds / len(keys)
            self._shelf.comebacks.observe(Origin("call"), each)
            due = [key for key in keys if key in self._shelf.guests and self._rent.pay(key, each)]
            if not due or self._promoter.waiting:
                return
            jobs = [copy for key in due[:1] if (copy := self._seat(key)) is not None]
        self._promoter.add(jobs, wake=True)

    def _seat(self, key: Key) -> Copy | None:
        """Make a copy of a guest that is to be filled, where a slot is free or a guest has one that is used less."""
        shelf = self._shelf
        if key in shelf.ready or shelf.is_coming(key) or shelf.is_frozen:
            return None
        for tier in shelf.cached_in:
            if not (room := shelf.take(tier, 1)):
                least = shelf.victims.least_guest(tier)
                if least is None or self._rent.uses(least.key) >= self._rent.uses(key):
                    continue
                shelf.evict(least)
                room = shelf.take(tier, 1)
            if room:
                copy = shelf.occupy(key, *room[0])
                copy.is_guest = True
                return copy
        return None

    def _send_away(self, key: Key) -> None:
        """Cache an expert of other nodes no longer; a copy in use stays until somebody needs its room."""
        shelf = self._shelf
        shelf.guests.pop(key, None)
        for tier in MEMORY:
            copy = shelf.copies.get((key, tier))
            if copy is not None and copy.is_guest and not copy.users:
                shelf.remove((key, tier))

    def _bring(self, copy: Copy) -> None:
        """Fill the copy of a guest; if nobody has it intact, it is called as before."""
        began = perf_counter()
        try:
            num_bytes = self._loader.fill(copy)
        except (RuntimeFault, RuntimeError, OSError, ValueError, MemoryError) as error:
            log.warning("layer %d expert %d cannot be cached: %s", copy.key[0], copy.key[1], error)
            with self._changed:
                self._shelf.fail(copy, error)
                self._rent.failed(copy.key)
            return
        with self._changed:
            self._rent.brought(copy.key, perf_counter() - began)
            self._shelf.counts.bring(copy.key[0], num_bytes)
            self._shelf.finish(copy)
