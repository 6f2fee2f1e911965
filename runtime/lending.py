"""Weights lent to the expert maths: what is at hand first, the rest as it comes.

Decides which copy of an expert is given out, and what is loaded ahead of the next layer's asking. Must not know how a
record is read, nor which expert is worth its slot. Flow: all at hand → lent at once, else `streaming`.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

from runtime.copies import Copy, CopyKey
from runtime.counters import TierCounts
from runtime.desk import Desk
from runtime.errors import ExpertUnavailable
from runtime.launches import Launches
from runtime.loads import Borrowed, Loader
from runtime.policy.streaming import MANY_ROWS, Pace
from runtime.promotion import Promoter
from runtime.shelf import Shelf
from runtime.streaming import Ahead, Stream, Wave
from runtime.ways import LocalWays
from schemas.precision import LowPrecision

Low = Mapping[int, LowPrecision]
"""Experts of a layer that may be had in this precision."""


class Lender:
    """Lends the copies of one residency. Thread-safe.

    Parameters
    ----------
    shelf, changed
        Of the residency: its books, and their lock.
    counts
        Takes what was found where; None without a cache.
    is_ahead
        Load what a layer will probably ask for.
    workers
        Threads that load beside the one that computes.
    ways
        Says what is computed in host memory.
    launches
        Of a device that is apart.
    """

    def __init__(
        self,
        shelf: Shelf,
        loader: Loader,
        changed: threading.Condition,
        *,
        counts: TierCounts | None,
        is_ahead: bool,
        workers: int,
        ways: LocalWays,
        launches: Launches | None = None,
    ) -> None:
        self._shelf = shelf
        self._loader = loader
        self._changed = changed
        self._counts = counts
        self._is_ahead = is_ahead
        self._promoter = Promoter(loader.load, workers)
        self._desk = Desk(shelf, loader, changed, self._promoter, counts, Pace(), ways, launches)
        self._lent_at = 0.0

    def lend(
        self,
        layer: int,
        experts: Sequence[int],
        low: Low | None = None,
        *,
        rows: int = 0,
        ahead: Ahead | None = None,
        sizes: Sequence[int] = (),
    ) -> Generator[tuple[int, Borrowed]]:
        """Yield (position in `experts`, weights) as `Residency.lend` says. May modify the cache."""
        copies = self.take(layer, experts)
        if copies is None:
            keys, is_prompt = self._keys(layer, experts, low or {}), self._is_ahead and rows >= MANY_ROWS
            stream = Stream(self._desk, layer, keys, rows, ahead if is_prompt else None, sizes)
            try:
                yield from stream.lend()
            finally:
                with self._changed:
                    self._note(layer, (), stream.waited_s, rows)
            return
        try:
            for position, copy in enumerate(copies):
                yield position, self._loader.borrowed(copy)
        finally:
            self.end(layer, copies, rows)

    def waves(
        self, layer: int, experts: Sequence[int], *, sizes: Sequence[int], ahead: Ahead | None = None
    ) -> Generator[Wave]:
        """Yield experts many at a time as `Residency.waves` says. May modify the cache."""
        stream = Stream(self._desk, layer, [(layer, expert) for expert in experts], sum(sizes), ahead, sizes)
        try:
            yield from stream.waves()
        finally:
            self._desk.publish_guesses(layer)
            with self._changed:
                self._note(layer, (), stream.waited_s, stream.rows)

    def settle_guesses(self) -> None:
        """Let all be used that was begun ahead, as `Residency.settle_guesses` says. Modifies."""
        self._desk.publish_guesses()

    @contextmanager
    def borrow(self, layer: int, experts: Sequence[int]) -> Iterator[list[Borrowed]]:
        """Lend experts all at once, as they are, as `Residency.borrow` says."""
        copies: list[Copy | None] = []
        try:
            with self._changed:
                for expert in experts:
                    copy = self._settled((layer, expert))
                    copies.append(copy)
                    if copy is not None:
                        self._shelf.use(copy)
            pairs = zip(copies, experts, strict=True)
            yield [self._loader.borrowed(c) if c else self._loader.read((layer, expert)) for c, expert in pairs]
        finally:
            self.give_back(copy for copy in copies if copy is not None)

    def _settled(self, key: CopyKey) -> Copy | None:
        """Return the copy of an expert, waiting for one that is being filled; None: to be read from its source."""
        while (copy := self._shelf.ready.get(key)) is None and self._shelf.is_coming(key) is not None:
            self._changed.wait(0.05)
        if copy is None and not self._shelf.can_load(key):
            raise ExpertUnavailable(key[0], key[1], "this node")
        return copy

    def take(self, layer: int, experts: Sequence[int], low: LowPrecision | None = None) -> list[Copy] | None:
        """Begin to use experts that are all at hand, until `end`; None, with nothing done, if one is not. Modifies."""
        ready, copies = self._shelf.ready, []
        with self._changed:
            for expert in experts:
                copy = ready.get((layer, expert))
                if copy is None and low is not None:
                    copy = ready.get((layer, expert, low))
                if copy is None:
                    return None
                copies.append(copy)
            for copy in copies:
                self._shelf.use(copy)
        return copies

    def end(self, layer: int, copies: Sequence[Copy], rows: int = 0) -> None:
        """End the use of copies that `take` gave. Modifies."""
        self._loader.note_read(copies)
        with self._changed:
            self._shelf.end_use(copies)
            if self._shelf.lacking or self._shelf.guests:
                self._note(layer, copies, 0.0, rows)

    def _keys(self, layer: int, experts: Sequence[int], low: Low) -> list[CopyKey]:
        """Return which copy of each expert is lent: one in low precision only where it will do and none better is here.

        Where no record of a low precision is known, an exact copy is made.
        """
        if not low:
            return [(layer, expert) for expert in experts]
        keys: list[CopyKey] = []
        with self._changed:
            for expert in experts:
                exact, precision = (layer, expert), low.get(expert)
                is_low = precision is not None and exact not in self._shelf.ready and not self._shelf.is_coming(exact)
                inexact = (layer, expert, precision) if precision is not None and is_low else exact
                keys.append(inexact if inexact in self._shelf.sources else exact)
        return keys

    def give_back(self, copies: Iterable[Copy]) -> None:
        """End the use of copies. Modifies."""
        self._desk.give_back(copies)

    def _note(self, layer: int, copies: Sequence[Copy], waited_s: float, rows: int) -> None:
        """Count what was found and waited for; whoever asks holds the lock. Layers of a prompt are no measure."""
        if self._counts is None:
            return
        self._desk.count_found(layer, copies)
        self._shelf.forget_guesses(layer)
        self._counts.waited_s[layer] += waited_s
        now = perf_counter()
        if self._lent_at and rows < MANY_ROWS:
            self._shelf.slack.observe_layer(now - self._lent_at, waited_s)
        self._lent_at = now

    def prefetch(self, layer: int, guess: Callable[[], Iterable[int]]) -> None:
        """Load experts that `layer` will probably ask for, in the background, as far as there is time. Modifies.

        Parameters
        ----------
        guess
            Says which; not called where there is no time, or nothing to load.
        """
        room = self._shelf.slack.room if self._shelf.absent[layer] else 0
        if self._counts is None or not self._is_ahead or not room or self._promoter.waiting:
            return
        wanted = [(layer, expert) for expert in guess()]
        with self._changed:
            jobs = self._desk.guessed(layer, wanted, room)
        self._promoter.add(jobs, wake=True)
