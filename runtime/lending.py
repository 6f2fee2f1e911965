"""Weights lent to the expert maths: what is at hand first, the rest as it comes.

Decides in which order the experts of a layer are given out, what is begun to be loaded meanwhile, and what is loaded
ahead for the next layer. Whoever waits for a slot has none itself, so that nobody waits for ever. Must not know how a
record is read, nor which expert is worth its slot. Flow: ready copies → loads begun → copies as they are filled.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

from runtime.copies import Copy, CopyKey
from runtime.counters import TierCounts
from runtime.errors import ExpertUnavailable
from runtime.loads import Borrowed, Loader
from runtime.promotion import Promoter
from runtime.shelf import Shelf
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
    ) -> None:
        self._shelf = shelf
        self._loader = loader
        self._changed = changed
        self._counts = counts
        self._is_ahead = is_ahead
        self._promoter = Promoter(loader.load, workers)
        self._lent_at = 0.0

    def lend(self, layer: int, experts: Sequence[int], low: Low | None = None) -> Generator[tuple[int, Borrowed]]:
        """Yield (position in `experts`, weights) as `Residency.lend` says. May modify the cache."""
        with self._changed:
            ready = self._shelf.ready
            copies = [ready[layer, expert] for expert in experts if (layer, expert) in ready]
            is_whole = len(copies) == len(experts)
            if is_whole:
                for copy in copies:
                    self._shelf.use(copy)
        if not is_whole:
            yield from self._stream(layer, self._keys(layer, experts, low or {}))
            return
        try:
            for position, copy in enumerate(copies):
                yield position, self._loader.borrowed(copy)
        finally:
            self.end(layer, copies)

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

    def take(self, layer: int, experts: Sequence[int]) -> list[Copy] | None:
        """Begin to use experts that are all at hand, until `end`; None, with nothing done, if one is not. Modifies."""
        ready, copies = self._shelf.ready, []
        with self._changed:
            for expert in experts:
                copy = ready.get((layer, expert))
                if copy is None:
                    return None
                copies.append(copy)
            for copy in copies:
                self._shelf.use(copy)
        return copies

    def end(self, layer: int, copies: Sequence[Copy]) -> None:
        """End the use of copies that `take` gave. Modifies."""
        self._loader.note_read(copies)
        with self._changed:
            self._shelf.end_use(copies)
            if self._shelf.lacking or self._shelf.guests:
                self._note(layer, copies, 0.0)

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

    def _stream(self, layer: int, keys: Sequence[CopyKey]) -> Generator[tuple[int, Borrowed]]:
        """Lend copies some of which must be loaded.

        Whoever waits for a slot has none itself but those that are being filled for it, so that nobody waits for ever.
        """
        waited_s = 0.0
        at_hand: list[tuple[int, Copy]] = []
        coming: list[tuple[int, Copy]] = []
        absent: list[int] = []
        held: list[Copy] = []
        try:
            with self._changed:
                for position, key in enumerate(keys):
                    copy = self._shelf.ready.get(key)
                    if copy is None:
                        if not self._shelf.can_load(key) and not self._shelf.is_coming(key):
                            raise ExpertUnavailable(key[0], key[1], "this node")
                        absent.append(position)
                    else:
                        self._shelf.use(copy)
                        held.append(copy)
                        at_hand.append((position, copy))
                if self._counts is not None:
                    self._shelf.count_found(layer, [copy for _, copy in at_hand])
            while at_hand or coming or absent:
                if absent and len(coming) <= self._promoter.workers:
                    absent = self._begin(layer, keys, absent, coming, held)
                if at_hand:
                    position, copy = at_hand.pop(0)
                    yield position, self._loader.borrowed(copy)
                    held.remove(copy)
                    self.give_back((copy,))
                    continue
                asked = perf_counter()
                if absent and not coming and not self._shelf.can_cache:
                    position = absent.pop(0)
                    borrowed = self._loader.read(keys[position])
                    waited_s += perf_counter() - asked
                    yield position, borrowed
                    continue
                ready = self._await(coming)
                took = perf_counter() - asked
                waited_s += took
                if ready is not None:
                    position, copy = ready
                    yield position, self._loader.borrowed(copy, took, is_new=True)
                    held.remove(copy)
                    self.give_back((copy,))
        finally:
            for _, copy in coming:
                self._promoter.run(copy)  # given up half-way: others may wait for it
            self.give_back(held)
            with self._changed:
                self._note(layer, (), waited_s)

    def _begin(
        self, layer: int, keys: Sequence[CopyKey], absent: list[int], coming: list[tuple[int, Copy]], held: list[Copy]
    ) -> list[int]:
        """Begin to load what there are slots for; return the positions that are left."""
        left, jobs = [], []
        with self._changed:
            rooms = self._shelf.rooms(layer, min(len(absent), self._promoter.workers + 2 - len(coming)))
            for position in absent:
                key = keys[position]
                copy = self._shelf.ready.get(key) or self._shelf.is_coming(key)
                if copy is None:
                    if not rooms:
                        left.append(position)
                        continue
                    copy = self._shelf.occupy(key, *rooms.pop())
                    jobs.append(copy)
                self._shelf.use(copy)
                self._shelf.redeem(copy)
                held.append(copy)
                coming.append((position, copy))
            for tier, slot in rooms:
                self._shelf.vacate(tier, slot)
        self._promoter.add(jobs, wake=self._shelf.slack.is_slow)
        return left

    def _await(self, coming: list[tuple[int, Copy]]) -> tuple[int, Copy] | None:
        """Return one that is ready, loading it here if nobody does; None if there is none and a slot may be free."""
        while True:
            with self._changed:
                for index, (position, copy) in enumerate(coming):
                    if copy.error is not None:
                        raise copy.error
                    if copy.is_ready:
                        del coming[index]
                        return position, copy
            if any(self._promoter.run(copy) for _, copy in coming):
                continue
            with self._changed:
                if not coming:
                    self._changed.wait(0.05)
                    return None
                if not any(copy.is_ready or copy.error for _, copy in coming):
                    self._changed.wait(1.0)

    def give_back(self, copies: Iterable[Copy]) -> None:
        """End the use of copies. Modifies."""
        copies = list(copies)
        self._loader.note_read(copies)
        with self._changed:
            self._shelf.end_use(copies)

    def _note(self, layer: int, copies: Sequence[Copy], waited_s: float) -> None:
        """Count what was found and waited for; whoever asks holds the lock."""
        if self._counts is None:
            return
        self._shelf.count_found(layer, copies)
        self._shelf.forget_guesses(layer)
        self._counts.waited_s[layer] += waited_s
        now = perf_counter()
        if self._lent_at:
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
        jobs: list[Copy] = []
        experts = guess()
        with self._changed:
            wanted = [
                (layer, expert)
                for expert in experts
                if (layer, expert) in self._shelf.lacking
                and (layer, expert) not in self._shelf.ready
                and not self._shelf.is_coming((layer, expert))
            ][:room]
            for key, (tier, slot) in zip(wanted, self._shelf.rooms(layer, len(wanted)), strict=False):
                copy = self._shelf.occupy(key, tier, slot)
                copy.is_guess = True
                self._shelf.guesses[layer].append(copy)
                jobs.append(copy)
                self._counts.prefetched[layer] += 1
        self._promoter.add(jobs, wake=True)
