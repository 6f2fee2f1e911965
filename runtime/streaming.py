"""Copies of a layer lent one by one while others are loaded, and then what the next layer will ask for.

Decides in which order: what is at hand first, then each as it is filled. Loads are begun as slots become free, and are
made by other threads where that pays (`policy.streaming`), else by who waits for them. Whoever waits for a slot has
none itself but those that are being filled for it, so that nobody waits for ever. Must not know how a record is read.
Flow: ready copies → loads begun → copies as they are filled → loads for the layer after.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from runtime.copies import Copy, CopyKey, Key
from runtime.desk import Desk
from runtime.errors import ExpertUnavailable, RuntimeFault
from runtime.loads import Borrowed
from runtime.policy.streaming import TRUSTED


class Ahead(NamedTuple):
    """A layer that runs next.

    Attributes
    ----------
    guess
        Says which experts it will probably ask for; not called where none is absent.
    most
        Loads that are begun for it at most; as many as there are slots for if None.
    is_judged
        Whoever guesses knows how often that comes true.
    """

    layer: int
    guess: Callable[[], Iterable[int]]
    most: int | None = None
    is_judged: bool = False


class Wave(NamedTuple):
    """Experts that are lent together.

    Attributes
    ----------
    copies
        (position, copy); all in slots that experts are computed from, but for those `is_in_place`.
    is_new
        They were loaded for this: `Copy.found` says from where.
    is_in_place
        They lie in host memory, to be computed by the processor.
    """

    copies: list[tuple[int, Copy]]
    is_new: bool = False
    is_in_place: bool = False


@dataclass
class Stream:
    """One lending, some of whose copies must be loaded.

    Attributes
    ----------
    keys
        What is lent.
    rows
        That their users compute; 0 if that is not known.
    ahead
        What is loaded when all of these are on their way.
    sizes
        Rows of each of them, where some may be lent from host memory, to be computed by the processor.
    waited_s
        For loads, so far.
    """

    desk: Desk
    layer: int
    keys: Sequence[CopyKey]
    rows: int = 0
    ahead: Ahead | None = None
    sizes: Sequence[int] = ()
    waited_s: float = 0.0
    _used_s: float = 0.0
    _at_hand: list[tuple[int, Copy]] = field(default_factory=list)
    _coming: list[tuple[int, Copy]] = field(default_factory=list)
    _absent: list[int] = field(default_factory=list)
    _in_place: list[tuple[int, Copy]] = field(default_factory=list)
    _held: set[Copy] = field(default_factory=set)
    _wanted: list[Key] | None = None

    def lend(self) -> Generator[tuple[int, Borrowed]]:
        """Yield (position, weights) until all were lent; close it."""
        try:
            self._sort()
            while self._at_hand or self._in_place or self._coming or self._absent:
                self._begin()
                lent = self._next()
                if lent is None:
                    continue
                position, borrowed, copy = lent
                asked = perf_counter()
                yield position, borrowed
                took = perf_counter() - asked
                self._used_s += took
                if copy is not None:
                    self._note_use(copy, position, took)
                    self._held.discard(copy)
                    self.desk.give_back((copy,))
            self._begin()
            self.desk.pace.observe(self.rows, self._used_s)
        finally:
            self._end()

    def _end(self) -> None:
        for _, copy in self._coming:  # given up half-way: others may wait for it
            if not self._publish(copy):
                self.desk.promoter.run(copy)
        self.desk.give_back(self._held)

    def waves(self) -> Generator[Wave]:
        """Yield experts many at a time until all were lent, for who computes them in one go; close it.

        All loads that there are slots for are begun at once, and those of the next layer behind them. What the device
        was told to load is lent before it is there, to who comes behind on the device.
        """
        began, waited_s = perf_counter(), 0.0
        try:
            self._sort()
            self._begin_all()
            while (wave := self._next_wave()) is not None:
                asked = perf_counter()
                yield wave
                ended, (position, first) = perf_counter(), wave.copies[0]
                busy_s = ended - asked if wave.is_in_place else ended - began - (self.waited_s - waited_s)
                self._note_use(first, position, busy_s / len(wave.copies))
                began, waited_s, copies = ended, self.waited_s, [copy for _, copy in wave.copies]
                self._held.difference_update(copies)
                self.desk.give_back(copies)
                self._begin_all()
        finally:
            self._end()

    def _begin_all(self) -> None:
        """Begin to load what there are slots for, then for the next layer."""
        if self._absent:
            self._begin_absent(len(self._absent))
        if not self._absent and self.ahead is not None and self._wanted is None:
            self.desk.load(self._guessed(self.ahead))

    def _next_wave(self) -> Wave | None:
        """Return what is lent next, waiting for slots where there are none; None when all were."""
        if self._at_hand:
            wave, self._at_hand = Wave(self._at_hand), []
            return wave
        if self._in_place:  # the link is busy meanwhile
            return Wave([self._in_place.pop(0)], is_in_place=True)
        while self._coming or self._absent:
            for _, copy in self._coming:
                self._publish(copy)
            if not self._coming:
                self._require_slots()
                self.desk.publish_guesses(self.layer)  # who waits for a slot keeps none from others
            asked = perf_counter()
            first = self._await()
            self.waited_s += perf_counter() - asked
            if first is not None:
                return Wave([first, *self._arrived()], is_new=True)
            self._begin_all()
        return None

    def _arrived(self) -> list[tuple[int, Copy]]:
        """Take what else is ready."""
        with self.desk.changed:
            ready = [each for each in self._coming if each[1].is_ready]
            self._coming = [each for each in self._coming if not each[1].is_ready]
        return ready

    def _require_slots(self) -> None:
        if not self.desk.shelf.can_cache:
            raise RuntimeFault(f"layer {self.layer}: no slot is left for its experts; raise the device's budget")

    def _sort(self) -> None:
        """Tell what is at hand from what is not; raises `ExpertUnavailable`."""
        shelf = self.desk.shelf
        with self.desk.changed:
            for position, key in enumerate(self.keys):
                copy = shelf.ready.get(key)
                if copy is not None:
                    shelf.use(copy)
                    self._held.add(copy)
                    self._at_hand.append((position, copy))
                elif shelf.can_load(key) or shelf.is_coming(key):
                    self._absent.append(position)
                else:
                    raise ExpertUnavailable(key[0], key[1], "this node")
            if self.sizes and self._absent:
                self._take_in_place()
            self.desk.count_found(self.layer, [copy for _, copy in (*self._at_hand, *self._in_place)])

    def _take_in_place(self) -> None:
        """Begin to use what the processor computes in host memory instead of its being loaded; the lock is held."""
        shelf, ways = self.desk.shelf, self.desk.ways
        absent = {each: self.keys[each] for each in self._absent if not shelf.is_coming(self.keys[each])}
        for position in ways.in_place(absent, self.sizes):
            if (copy := ways.in_host(self.keys[position])) is not None:
                shelf.use(copy)
                self._held.add(copy)
                self._absent.remove(position)
                self._in_place.append((position, copy))

    def _note_use(self, copy: Copy, position: int, seconds: float) -> None:
        """Note what the processor took for an expert: to compute it in host memory, or to have it computed."""
        if copy.tier in self.desk.shelf.computed_in:
            self.desk.ways.observe_launch(seconds)
            return
        with self.desk.changed:
            self.desk.ways.observe((copy.key[0], copy.key[1]), self.sizes[position], seconds)

    @property
    def _is_handed_over(self) -> bool:
        """Whether other threads make the loads."""
        slack = self.desk.shelf.slack
        return (
            bool(self._in_place)
            or slack.is_slow
            or self.desk.pace.hides(slack.load_s, rows=self.rows, experts=len(self.keys))
        )

    def _begin(self) -> None:
        """Begin to load what there are slots for, as many at once as there are threads for and two more.

        Not more: what this layer has used by then makes room for the others, rather than what the next layer will use.
        """
        if self._absent:
            if len(self._coming) <= self.desk.promoter.workers:
                self._begin_absent(self.desk.promoter.workers + 2 - len(self._coming))
        elif self.ahead is not None and self._wanted != [] and self._is_handed_over:
            is_last = not self._at_hand and not self._coming
            if is_last or self.desk.promoter.waiting < self.desk.promoter.workers:
                self.desk.promoter.add(self._guessed(self.ahead), wake=True)

    def _begin_absent(self, most: int) -> None:
        shelf, jobs = self.desk.shelf, []
        with self.desk.changed:
            left = [position for position in self._absent if not self._await_known(position)]
            for room in shelf.rooms(self.layer, min(len(left), most)):
                jobs.append(shelf.occupy(self.keys[left[0]], *room))
                self._await_known(left.pop(0))
        self._absent = left
        self.desk.load(jobs, wake=self._is_handed_over)

    def _await_known(self, position: int) -> bool:
        """Wait for the copy of an expert that came into memory meanwhile, or is on its way; False if there is none."""
        shelf, key = self.desk.shelf, self.keys[position]
        copy = shelf.ready.get(key) or shelf.is_coming(key)
        if copy is None:
            return False
        shelf.use(copy)
        shelf.redeem(copy)
        self._held.add(copy)
        self._coming.append((position, copy))
        return True

    def _publish(self, copy: Copy) -> bool:
        """Let a copy be used that the device is filling; False where somebody else fills it."""
        return self.desk.launches is not None and self.desk.launches.publish(copy)

    def _guessed(self, ahead: Ahead) -> list[Copy]:
        """Make copies of what the next layer will probably ask for, in slots that nobody is using."""
        shelf = self.desk.shelf
        if self._wanted is None:
            is_any = bool(shelf.absent[ahead.layer]) and (ahead.is_judged or shelf.slack.true_share >= TRUSTED)
            self._wanted = [(ahead.layer, expert) for expert in ahead.guess()] if is_any else []
        if not self._wanted:
            return []
        with self.desk.changed:
            return self.desk.guessed(ahead.layer, self._wanted, len(self._wanted) if ahead.most is None else ahead.most)

    def _next(self) -> tuple[int, Borrowed, Copy | None] | None:
        """Return what is lent next, and its copy where it has one; None where slots must be asked for again."""
        loader, asked = self.desk.loader, perf_counter()
        if self._at_hand:
            position, copy = self._at_hand.pop(0)
            return position, loader.borrowed(copy), copy
        if self._in_place:  # others load meanwhile
            position, copy = self._in_place.pop(0)
            return position, loader.borrowed(copy), copy
        if self._absent and not self._coming and not self.desk.shelf.can_cache:
            position = self._absent.pop(0)
            borrowed = loader.read(self.keys[position])
            self.waited_s += perf_counter() - asked
            return position, borrowed, None
        ready = self._await()
        took = perf_counter() - asked
        self.waited_s += took
        if ready is None:
            return None
        position, copy = ready
        return position, loader.borrowed(copy, took, is_new=True), copy

    def _await(self) -> tuple[int, Copy] | None:
        """Return one that is ready, loading it here if nobody does; None if there is none and a slot may be free."""
        changed = self.desk.changed
        while True:
            for _, copy in self._coming:
                if self._publish(copy):
                    break
            with changed:
                for index, (position, copy) in enumerate(self._coming):
                    if copy.error is not None:
                        raise copy.error
                    if copy.is_ready:
                        del self._coming[index]
                        return position, copy
            if any(self.desk.promoter.run(copy) for _, copy in self._coming):
                continue
            with changed:
                if not self._coming:
                    if self.desk.is_stuck:
                        layer, expert, *_ = self.keys[self._absent[0]]
                        raise RuntimeFault(
                            f"layer {layer} expert {expert}: no slot will ever be free; restart this node"
                        )
                    changed.wait(0.05)
                    return None
                if not any(copy.is_ready or copy.error for _, copy in self._coming):
                    changed.wait(1.0)
