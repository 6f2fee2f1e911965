"""What is in which slot, who uses it and who must make room: the bookkeeping of a residency.

Decides for whom copies are evicted (`victims` says in which order), and in which tier a copy is made. Pure: no weights,
no files, no clock and no lock, which whoever calls has. Methods that are named for what they do change something, and
so do those that take slots (`take`, `rooms`, `room_in`); predicates and properties do not.

A replica that was put (*assigned*) keeps its slot, unless its tier yields (`replicas`); other copies are cache.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from runtime.comebacks import Comebacks
from runtime.copies import MEMORY, Copy, CopyKey, Key, Place
from runtime.counters import TierCounts
from runtime.policy.eviction import Eviction
from runtime.policy.menu import Rent
from runtime.policy.prefetch import Slack
from runtime.records import Source
from runtime.replicas import Replicas
from runtime.timeline import recorder
from runtime.victims import Victims
from schemas.precision import LOW_PRECISIONS
from schemas.topology import TIERS, Tier

__all__ = ["Copy", "CopyKey", "Key", "Shelf"]


class Shelf:
    """Copies by slot, and what was put where.

    Parameters
    ----------
    record_bytes
        What an expert takes in each tier.
    budgets
        Bytes by tier; may be changed, `review` and `shrink` then.
    slots
        Slots by tier.
    cached_in
        Tiers that cached copies are made in, fastest first; none without a cache.
    computed_in
        Tiers that experts are computed from, fastest first. Copies elsewhere are only where these are loaded from.
    is_cost_aware
        Whether what it takes to have a copy back counts when one has to go.
    experts
        Of a layer.
    notify, give_back
        Called when a slot is free, and when its memory is not needed for now.

    Attributes
    ----------
    assigned
        What was put where, with the record that lies here for it alone (disk).
    replicas
        How many of what was put in memory make no room.
    ready
        The copy that an expert is computed from.
    lacking
        Experts that have no slot of their own.
    guests, rent
        Experts that other nodes hold, and where the records are of those that may be cached here all the same; and what
        is known of their use.
    victims, evictable
        Copies that may make room, and in which order they do.
    absent
        Those of `lacking` that are in no slot at all now, by layer.
    watchers
        Called with an expert and the copy that it is computed from now on, if any.
    """

    def __init__(
        self,
        record_bytes: Mapping[Tier, int],
        budgets: dict[Tier, int],
        slots: Mapping[Tier, int],
        *,
        cached_in: tuple[Tier, ...],
        computed_in: tuple[Tier, ...] = MEMORY,
        eviction: Eviction | None,
        is_cost_aware: bool = False,
        experts: int,
        counts: TierCounts,
        notify: Callable[[], None],
        give_back: Callable[[Tier, int], None],
    ) -> None:
        self.record_bytes = record_bytes
        self.budgets = budgets
        self.cached_in = cached_in
        self.computed_in = computed_in
        self.eviction = eviction
        self.counts = counts
        self.slack = Slack()
        self.assigned: dict[Place, Source | None] = {}
        self.sources: dict[CopyKey, list[Source]] = {}
        self.copies: dict[Place, Copy] = {}
        self.ready: dict[CopyKey, Copy] = {}
        self.lacking: set[CopyKey] = set()
        self.guests: dict[Key, list[Source]] = {}
        self.rent = Rent()
        self.comebacks = Comebacks(self.sources, self.copies, computed_in)
        self.victims = Victims(eviction, experts, self.rent, self.comebacks if is_cost_aware else None)
        self.absent: dict[int, set[CopyKey]] = defaultdict(set)
        self.evictable = self.victims.copies
        self.guesses: dict[int, list[Copy]] = defaultdict(list)
        self.used: Counter[Tier] = Counter()
        self.free: dict[Tier, list[int]] = {tier: list(range(count - 1, -1, -1)) for tier, count in slots.items()}
        self.replicas = Replicas(record_bytes, budgets, self.sources)
        self.watchers: list[Callable[[CopyKey, Copy | None], None]] = []
        self._notify = notify
        self._give_back = give_back
        self._is_frozen = self._is_host_frozen = False
        self._thawing: list[Copy] = []

    @property
    def can_cache(self) -> bool:
        """Whether there can be room for a cached copy at all."""
        size = self.record_bytes
        return any(self.budgets[tier] >= (self.bound(tier) + 1) * size[tier] for tier in self.cached_in)

    def bound(self, tier: Tier) -> int:
        """Return how many replicas of a tier do not make room."""
        return self.replicas.bound(tier)

    def is_evictable(self, copy: Copy) -> bool:
        """Whether a copy may make room."""
        if not copy.is_ready or copy.users or copy.is_guess:
            return False
        return not copy.is_assigned or (self.replicas.is_yielding(copy.tier) and copy.key in self.sources)

    def use(self, copy: Copy) -> None:
        """Begin to use a copy."""
        copy.users += 1
        self.evictable.pop(copy, None)

    def end_use(self, copies: Iterable[Copy]) -> None:
        """End the use of copies."""
        is_any_free = False
        for copy in copies:
            copy.users -= 1
            if not copy.users:
                self.settle(copy)
                is_any_free = True
        if is_any_free:
            self._notify()

    def settle(self, copy: Copy) -> None:
        """Draw the consequences of a change to a copy."""
        if copy.is_dropped:
            if not copy.users and copy.is_ready:
                copy.is_ready = False
                if self.is_frozen_in(copy.tier):
                    self._thawing.append(copy)
                else:
                    self.vacate(copy.tier, copy.slot)
        elif not self.is_evictable(copy):
            self.evictable.pop(copy, None)
        elif self.used[copy.tier] > self.budgets[copy.tier]:
            self.evict(copy, give_back=True)
        else:
            self.evictable[copy] = None

    def review(self, tier: Tier) -> None:
        """Draw the consequences of a tier's change from yielding or to it."""
        for copy in [copy for copy in self.copies.values() if copy.tier == tier]:
            self.settle(copy)

    def shrink(self, tier: Tier) -> None:
        """Evict until the tier is within its budget, as far as copies are not in use."""
        over = -(-(self.used[tier] - self.budgets[tier]) // self.record_bytes[tier])
        for copy in self.worst(0, over, (tier,)):
            self.evict(copy, give_back=True)
        for slot in self.free[tier]:
            self._give_back(tier, slot)

    def worst(self, layer: int, count: int, tiers: Sequence[Tier]) -> list[Copy]:
        """Return copies to give up, the least valuable first."""
        return self.victims.worst(layer, count, [tier for tier in tiers if not self.is_frozen_in(tier)])

    @property
    def is_frozen(self) -> bool:
        """Whether no slot may be given up."""
        return self._is_frozen

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Let who froze the slots give some up."""
        self._is_frozen = False
        try:
            yield
        finally:
            self._is_frozen = True

    def is_frozen_in(self, tier: Tier) -> bool:
        """Whether no slot of a tier may be given up."""
        return self._is_frozen and (tier in self.computed_in or self._is_host_frozen)

    def freeze(self, *, host: bool = False) -> None:
        """Let no slot be given up: a step looks experts up by itself, and no use of theirs is noted.

        Parameters
        ----------
        host
            In host memory neither: the step reads there what it lacks.
        """
        self._is_frozen, self._is_host_frozen = True, host

    def thaw(self) -> None:
        """Give up what was to be given up meanwhile."""
        self._is_frozen = False
        for copy in self._thawing:
            self.vacate(copy.tier, copy.slot)
        self._thawing.clear()
        self._notify()

    def room_in(self, tier: Tier, layer: int) -> int | None:
        """Take one slot of a tier for a cached copy, by eviction where none is free; None where that cannot be."""
        if not (room := self.take(tier, 1)) and (victims := self.worst(layer, 1, (tier,))):
            self.evict(victims[0])
            room = self.take(tier, 1)
        return room[0][1] if room else None

    def is_assigned(self, key: CopyKey) -> bool:
        """Whether an expert was put here, in any tier."""
        return any((key, tier) in self.assigned for tier in TIERS)

    def can_load(self, key: CopyKey) -> bool:
        """Whether an expert's record can be read somewhere."""
        return key in self.sources or ("host" not in self.computed_in and (key, "host") in self.copies)

    def evict(self, copy: Copy, *, give_back: bool = False) -> None:
        """Give a copy up."""
        self.remove((copy.key, copy.tier))
        if give_back:
            self._give_back(copy.tier, copy.slot)
        self.counts.evictions += 1

    def remove(self, place: Place) -> None:
        """Take a copy out; it is freed when its last user is done."""
        copy = self.copies.pop(place, None)
        if copy is not None:
            self.evictable.pop(copy, None)
            copy.is_dropped = True
            self.choose(copy.key)
            self.settle(copy)

    def rooms(self, layer: int, count: int, *, spare: bool = False) -> list[tuple[Tier, int]]:
        """Take up to so many slots for cached copies, by eviction where none is free: `spare` guesses for others."""
        rooms: list[tuple[Tier, int]] = []
        for tier in self.cached_in:
            rooms += self.take(tier, count - len(rooms))
        short = count - len(rooms)
        victims = self.worst(layer, short, self.cached_in)
        if len(victims) < short and not spare and not self.is_frozen:
            self.forget_guesses(*self.guesses)
            victims = self.worst(layer, short, self.cached_in)
        for copy in victims:
            self.evict(copy)
            rooms += self.take(copy.tier, 1)
        return rooms

    def unused(self, tier: Tier) -> int:
        """Return how many free slots of a tier its budget has room for."""
        return max(0, min((self.budgets[tier] - self.used[tier]) // self.record_bytes[tier], len(self.free[tier])))

    def take(self, tier: Tier, count: int) -> list[tuple[Tier, int]]:
        """Account for up to so many records in `tier`; return their slots."""
        taken = min(max(0, count), self.unused(tier))
        self.used[tier] += taken * self.record_bytes[tier]
        return [(tier, self.free[tier].pop()) for _ in range(taken)]

    def vacate(self, tier: Tier, slot: int) -> None:
        """Free a slot."""
        self.used[tier] -= self.record_bytes[tier]
        self.free[tier].append(slot)
        self._notify()

    def occupy(self, key: CopyKey, tier: Tier, slot: int) -> Copy:
        """Make a copy that is to be filled."""
        copy = self.copies[key, tier] = Copy(key, tier, slot)
        copy.is_assigned = (key, tier) in self.assigned
        copy.recorder = recorder()
        return copy

    def assign(self, key: CopyKey, tier: Tier, own: Source | None = None) -> None:
        """Hold a replica in a tier."""
        is_turned = self.replicas.add(key, tier)
        self.assigned[key, tier] = own
        self.guests.pop((key[0], key[1]), None)
        for copy in filter(None, (self.copies.get((key, each)) for each in MEMORY)):
            copy.is_guest = False
        self.note_lack(key)
        if is_turned:
            self.review(tier)

    def unassign(self, key: CopyKey, tier: Tier) -> Source | None:
        """Stop holding a replica; returns the record that lay here for it alone."""
        own = self.assigned.pop((key, tier))
        is_turned = self.replicas.discard(key, tier)
        self.remove((key, tier))
        if own is not None:
            self.used["disk"] -= self.record_bytes["disk"]
            self.sources[key].remove(own)
            if not self.sources[key]:
                del self.sources[key]
                self._note_sources(key)
        self.note_lack(key)
        if is_turned:
            self.review(tier)
        return own if own not in self.assigned.values() else None

    def note_lack(self, key: CopyKey) -> None:
        """Note whether an expert has a slot of its own."""
        has_memory = any((key, t) in self.assigned and not self.replicas.is_yielding(t) for t in self.computed_in)
        if self.can_load(key) and not has_memory:
            self.lacking.add(key)
        else:
            self.lacking.discard(key)
        self._note_absence(key)

    def _note_absence(self, key: CopyKey) -> None:
        if key in self.lacking and key not in self.ready:
            self.absent[key[0]].add(key)
        else:
            self.absent[key[0]].discard(key)

    def add_source(self, key: CopyKey, source: Source, *, is_best: bool = False) -> None:
        """Note where a record can be read, the next best after those known, or the best of all."""
        known = self.sources.setdefault(key, [])
        if source not in known:
            known.insert(0 if is_best else len(known), source)
            self._note_sources(key)

    def _note_sources(self, key: CopyKey) -> None:
        """Let replicas of an expert make room that can be read again now, and no others."""
        self.replicas.note_sources(key)
        for copy in filter(None, (self.copies.get((key, tier)) for tier in MEMORY)):
            if copy.is_assigned:
                self.settle(copy)

    def is_coming(self, key: CopyKey) -> Copy | None:
        """Return a copy that is being filled."""
        found = (self.copies.get((key, tier)) for tier in self.computed_in)
        return next((copy for copy in found if copy is not None and not copy.is_ready), None)

    def is_wanting(self, key: CopyKey) -> bool:
        """Whether an expert without a slot of its own is in none now, and not on its way to one."""
        return key in self.lacking and key not in self.ready and self.is_coming(key) is None

    def choose(self, key: CopyKey) -> None:
        """Note where an expert is computed from."""
        found = (self.copies.get((key, tier)) for tier in self.computed_in)
        copy = next((copy for copy in found if copy is not None and copy.is_ready), None)
        if copy is None:
            self.ready.pop(key, None)
        else:
            self.ready[key] = copy
        self._note_absence(key)
        if len(key) == 2:
            for watch in self.watchers:
                watch(key, copy)

    def finish(self, copy: Copy) -> None:
        """Let a copy that is filled be used; frees one that was dropped meanwhile, and those in low precision."""
        copy.is_ready = True
        if not copy.is_dropped:
            self.choose(copy.key)
            if len(copy.key) == 2:
                self.forget_low(copy.key)
        self.settle(copy)
        self._notify()

    def forget_low(self, key: Key) -> None:
        """Take out copies of an expert in low precision, once they are filled."""
        for precision in LOW_PRECISIONS:
            low = self.ready.get((*key, precision))
            if low is not None:
                self.remove((low.key, low.tier))

    def fail(self, copy: Copy, error: Exception) -> None:
        """Free a copy that could not be filled; whoever waits for it gets the error."""
        copy.error, copy.is_dropped = error, True
        if self.copies.get((copy.key, copy.tier)) is copy:
            del self.copies[copy.key, copy.tier]
        self.vacate(copy.tier, copy.slot)

    def forget_guesses(self, *layers: int) -> None:
        """Let guesses be evicted, whose layers have run."""
        for copy in [copy for layer in layers for copy in self.guesses.pop(layer, ())]:
            if copy.is_guess:
                copy.is_guess = False
                self.slack.observe_guesses(1, 0)
                if not copy.is_dropped:
                    self.settle(copy)

    def redeem(self, copy: Copy) -> None:
        """Count a guess that came true."""
        if copy.is_guess:
            copy.is_guess = False
            self.counts.prefetch_hits[copy.key[0]] += 1
            self.slack.observe_guesses(1, 1)
            self.settle(copy)
