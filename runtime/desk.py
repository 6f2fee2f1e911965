"""What all lendings of one residency share: its books and their lock, what fills copies, and what is known of time.

Decides nothing about order: it counts what was found, makes copies of guesses, and has copies filled. Must not know who
lends.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from runtime.copies import Copy, Key
from runtime.counters import TierCounts
from runtime.launches import Launches
from runtime.loads import Loader
from runtime.policy.streaming import Pace
from runtime.promotion import Promoter
from runtime.shelf import Shelf
from runtime.ways import LocalWays


class Desk(NamedTuple):
    """What all lendings of one residency share.

    Attributes
    ----------
    counts
        Takes what was found where; None without a cache.
    pace
        What computing takes.
    ways
        Says what is computed in host memory meanwhile.
    launches
        Begins loads from there without waiting for them; None where no device is apart.
    """

    shelf: Shelf
    loader: Loader
    changed: threading.Condition
    promoter: Promoter
    counts: TierCounts | None
    pace: Pace
    ways: LocalWays
    launches: Launches | None = None

    def give_back(self, copies: Iterable[Copy]) -> None:
        """End the use of copies. Modifies."""
        copies = list(copies)
        self.loader.note_read(copies)
        with self.changed:
            self.shelf.end_use(copies)

    def count_found(self, layer: int, copies: Iterable[Copy]) -> None:
        """Count copies that were at hand. Modifies; the lock is held."""
        if self.counts is None:
            return
        for copy in copies:
            self.counts.found[copy.tier][layer] += 1
            if copy.is_guest:
                self.counts.guest_hits[layer] += 1
                self.shelf.rent.use(copy.key)
            self.shelf.redeem(copy)

    def load(self, copies: Sequence[Copy], *, wake: bool = True) -> None:
        """Begin to fill copies: by the device where their records lie in host memory beside it, else as jobs.

        Where the device fails, raising its error, the others are jobs too: somebody may wait for them.
        """
        left, jobs = deque(copies), []
        try:
            if self.launches is not None:
                self.launches.settle()
                while left:
                    copy = left.popleft()
                    if not self.launches.begin(copy):
                        jobs.append(copy)
        finally:
            self.promoter.add([*jobs, *left], wake=wake)

    def publish_guesses(self, layer: int | None = None) -> None:
        """Let all be used, and make room, that the device was told to load, for a layer or for any. Modifies."""
        if self.launches is not None:
            self.launches.publish_all(layer)

    @property
    def is_stuck(self) -> bool:
        """Whether nobody could ever free a slot though there should be room: the books are wrong. The lock is held.

        Every slot holds a copy that is filled, that nobody uses or guessed, and that may not make room.
        """
        shelf = self.shelf
        if shelf.is_frozen or not shelf.can_cache or any(map(shelf.unused, shelf.cached_in)):
            return False
        copies = [copy for copy in shelf.copies.values() if copy.tier in shelf.cached_in]
        if any(not copy.is_ready or copy.users or copy.is_guess or copy in shelf.evictable for copy in copies):
            return False
        held = sum(shelf.record_bytes[copy.tier] for copy in copies)
        return held == sum(shelf.used[tier] for tier in shelf.cached_in)  # no copy was dropped that is still in use

    def guessed(self, layer: int, wanted: Sequence[Key], most: int) -> list[Copy]:
        """Make copies of up to `most` guesses for a layer that runs next, to be filled. Modifies; the lock is held.

        Room is made by what nobody is using, and not by what that layer has at hand.
        """
        shelf = self.shelf
        kept = [copy for key in wanted if (copy := shelf.ready.get(key)) is not None]
        for copy in kept:
            shelf.use(copy)
        missing = [key for key in wanted if shelf.is_wanting(key)]
        rooms = shelf.rooms(layer - 1, min(most, len(missing)), spare=True)
        made = [shelf.occupy(key, *room) for key, room in zip(missing, rooms, strict=False)]
        for copy in made:
            copy.is_guess = True
        shelf.guesses[layer] += made
        shelf.end_use(kept)
        if self.counts is not None:
            self.counts.prefetched[layer] += len(made)
        return made
