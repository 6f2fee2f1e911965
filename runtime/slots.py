"""Where a node keeps its experts: device slots, host memory, record files; never more bytes than each tier may use.

A replica that was put stays where it was put. What budget is left is a cache in front of records that lie on disk or
elsewhere: an expert that is asked for is loaded into a slot that is free, or that the eviction policy gives up; nothing
is written back, since every record stays where it was read from. Decides nothing about which expert belongs here: it
holds what it is told to, or raises `OverBudget`. Flow: record → slot (device, host) or file (disk) → `lend` → weights
for the expert maths. Bookkeeping is `shelf`'s, under one lock; `placing` holds replicas and budgets, `loads` reads
outside of the lock, `lending` gives out: this is the one door to all of them.
"""

import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.caching import Caching
from runtime.copies import Copy, Key, copy_keys
from runtime.furnishing import furnish
from runtime.lending import Low
from runtime.loads import Borrowed, Loader
from runtime.placing import Record
from runtime.policy.prefetch import Slack
from runtime.pool import ExpertWeights, SlotPool, record_of
from runtime.precision import packed_layout
from runtime.reads import CACHED, Reads
from runtime.records import Source
from runtime.shelf import Shelf
from runtime.streaming import Ahead, Wave
from schemas.precision import LOW_PRECISIONS, LowPrecision, Precision
from schemas.store import RecordLayout
from schemas.topology import TIERS, Tier

__all__ = ["Borrowed", "Caching", "ExpertWeights", "Key", "Record", "Residency"]


class Inside(NamedTuple):
    """The parts of a residency: its books and their lock, what fills copies, and slots of device and host."""

    shelf: Shelf
    changed: threading.Condition
    loader: Loader
    pool: SlotPool
    host_pool: SlotPool


class Residency:
    """The experts of one node. Thread-safe; every method says whether it modifies what is held.

    Parameters
    ----------
    budgets
        Bytes that experts may take per tier; a tier that is left out has none. Slots are reserved at once, their
        memory is taken as they are used.
    record_dir
        Directory of the disk tier's record files, named by sha256. Needed if the disk budget is not 0.
    device
        Torch device of the device tier's slots.
    reads
        How record files are read.
    max_slots
        Slots to reserve at most: no model has more experts than it has, however large the budget.
    caching
        Use left-over budget as a cache; without, records on disk are read whenever they are used.
    precision
        Hold every expert packed in a low precision, and unpack it whenever it is used: more experts in as many bytes.
        Records are still put, and kept on disk, as weights.
    is_apart
        Whether what is in host memory must be brought to the device to be computed; where the device is no processor
        if None.

    Attributes
    ----------
    budgets
        In force now, see `set_budget`.
    counts
        What was found where, and loaded, by layer; only with a cache.
    ways
        What computing an expert takes that is in no slot.
    """

    def __init__(
        self,
        layout: RecordLayout,
        budgets: Mapping[Tier, int],
        record_dir: Path | None = None,
        *,
        device: str = "cpu",
        reads: Reads = CACHED,
        max_slots: int | None = None,
        caching: Caching | None = None,
        precision: LowPrecision | None = None,
        is_apart: bool | None = None,
    ) -> None:
        self.layout = layout
        self.packed = packed_layout(layout, precision) if precision is not None else None
        self.device = torch.device(device)
        self.reads = reads
        self.caching = caching
        self.budgets: dict[Tier, int] = {tier: budgets.get(tier, 0) for tier in TIERS}
        parts = furnish(
            layout,
            self.budgets,
            device=self.device,
            packed=self.packed,
            most=sys.maxsize if max_slots is None else max_slots,
            caching=caching,
            is_apart=self.device.type == "cuda" if is_apart is None else is_apart,
            record_dir=record_dir,
            reads=reads,
        )
        self.counts, self.ways = parts.counts, parts.ways
        self._changed, self._pools, self._shelf = parts.changed, parts.pools, parts.shelf
        self._loader, self._lender, self._placer = parts.loader, parts.lender, parts.placer
        self._learner, self._guests = parts.learner, parts.guests

    @property
    def inside(self) -> "Inside":
        """What a decode step that looks slots up by itself must have at hand."""
        return Inside(self._shelf, self._changed, self._loader, self._pools["device"], self._pools["host"])

    @property
    def slot_bytes(self) -> int:
        """Bytes that an expert takes in memory."""
        return self._shelf.record_bytes["device"]

    @property
    def slack(self) -> Slack:
        """What is known of loads and of the time for them."""
        return self._shelf.slack

    @slack.setter
    def slack(self, slack: Slack) -> None:
        self._shelf.slack = slack

    def invite(self, guests: Mapping[Key, Sequence[Source]]) -> None:
        """Let just these experts of other nodes be cached in room that nobody else needs. Modifies.

        Parameters
        ----------
        guests
            Where the record of each can be had, best first.
        """
        if self.caching is not None:
            self._guests.invite(
                {key: [self._placer.as_held(each) for each in sources] for key, sources in guests.items()}
            )

    def note_call(self, keys: Sequence[Key], seconds: float) -> None:
        """Note that experts of another node were called together, and waited for. May bring one here. Modifies."""
        if self._shelf.guests and self._shelf.can_cache:
            self._guests.pay(keys, seconds)

    def has_guest(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether one of these experts of a layer is another node's and cached here."""
        guests, ready = self._shelf.guests, self._shelf.ready
        return bool(guests) and any((layer, each) in ready and (layer, each) in guests for each in experts)

    @property
    def guests(self) -> Collection[Key]:
        """Experts of other nodes that may be cached here."""
        return self._shelf.guests.keys()

    def put(self, key: Key, tier: Tier, record: Record, source: Source | None = None) -> None:
        """Hold a replica of `key` in `tier`; holding it there already changes nothing. Modifies.

        Parameters
        ----------
        source
            Where the record can be read again, so that the replica can make room when the budget is lowered.

        Raises
        ------
        OverBudget
            The tier has no room. Nothing changes.
        """
        self._placer.put(key, tier, record, source)

    def put_packed(self, key: Key, tier: Tier, record: Record, source: Source | None = None) -> None:
        """Hold a replica in memory from its record in the precision that experts are held in, as `put`. Modifies."""
        self._placer.put(key, tier, record, source, is_packed=True)

    def place(self, key: Key, source: Source) -> None:
        """Execute `key` from a source that takes none of the budgets; counted as held on disk. Modifies."""
        self._placer.place(key, source)

    def place_packed(self, key: Key, precision: LowPrecision, source: Source) -> None:
        """Know where the record of `key` in a low precision lies, so that it may be lent so. Modifies.

        Where experts are held packed in that precision, it is where they are read from first.
        """
        self._placer.place_packed(key, precision, source)

    def add_source(self, key: Key, source: Source) -> None:
        """Remember another place where the record of a held expert lies, the next best after those known. Modifies."""
        self._placer.add_source(key, source)

    def drop(self, key: Key, tier: Tier | None = None) -> None:
        """Stop holding `key` in `tier` (everywhere by default); what is not held is no error. Modifies.

        A replica in use is freed, and counted by `used`, until its last user is done.
        """
        self._placer.drop(key, tier)

    def set_budget(self, tier: Tier, budget: int) -> None:
        """Let experts take so many bytes of a tier from now on; at most what was reserved in the beginning. Modifies.

        Replicas that can be read again make room, and are loaded when they are asked for.

        Raises
        ------
        BudgetTooSmall
            Replicas that can be read nowhere else need more. Nothing changes.
        """
        self._placer.set_budget(tier, budget)

    def borrow(self, layer: int, experts: Sequence[int]) -> AbstractContextManager[list[Borrowed]]:
        """Lend weights of experts of one layer all at once, as they are; they stay valid inside. Caches nothing.

        Raises
        ------
        ExpertUnavailable
            One of them is not held.
        """
        return self._lender.borrow(layer, experts)

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
        """Yield (position in `experts`, weights), those at hand first, others as they come. May modify the cache.

        Weights are valid until the next are asked for, or the iterator is closed; close it.

        Parameters
        ----------
        low
            Experts that will do in a low precision: where an exact copy is at hand it is lent all the same, else one in
            that precision, which is loaded if need be and if `place_packed` said from where.
        rows
            That these experts compute.
        ahead
            What runs next: of many rows, its loads are begun when those of this layer are on their way.
        sizes
            Rows of each expert. Where that is told, and the device is apart from host memory, weights may be lent that
            lie there, to be computed by the processor, if that is done sooner than loading them (`ways`).

        Raises
        ------
        ExpertUnavailable
            One of them is not held.
        ExpertLost
            The record of one is damaged wherever it lies.
        """
        return self._lender.lend(layer, experts, low, rows=rows, ahead=ahead, sizes=sizes)

    def waves(
        self, layer: int, experts: Sequence[int], *, sizes: Sequence[int], ahead: Ahead | None = None
    ) -> Generator[Wave]:
        """Yield experts many at a time, those at hand first, for who computes them in one go. May modify the cache.

        What `lend` does, where there are slots to load into; close it. What lies in host memory beside the device is
        lent as soon as the device was told to load it, to who comes behind on the device.

        Parameters
        ----------
        sizes
            Rows of each expert.
        ahead
            What runs next; what was begun for it is settled when that layer was lent, or by `settle_guesses`.
        """
        return self._lender.waves(layer, experts, sizes=sizes, ahead=ahead)

    def settle_guesses(self) -> None:
        """Let all be used, and make room again, that was begun ahead and that no layer asks for any more. Modifies."""
        self._lender.settle_guesses()

    def take(self, layer: int, experts: Sequence[int], low: LowPrecision | None = None) -> list[Copy] | None:
        """Begin to use experts of one layer that are all at hand; None, with nothing done, if one is not. Modifies.

        What `lend` does in the ordinary case, for those who need it most often: `weights` of the copies are valid until
        `end` is called.

        Parameters
        ----------
        low
            A copy in this precision will do where none better is at hand.
        """
        return self._lender.take(layer, experts, low)

    def weights(self, copy: Copy) -> ExpertWeights:
        """Return the weights of a copy that `take` gave."""
        return self._loader.weights(copy)

    def end(self, layer: int, copies: Sequence[Copy]) -> None:
        """End the use of copies that `take` gave. Modifies."""
        self._lender.end(layer, copies)

    def release(self, copies: Sequence[Copy]) -> None:
        """End the use of copies that `take` gave, which were lent once more meanwhile. Modifies."""
        self._lender.give_back(copies)

    def prefetch(self, layer: int, guess: Callable[[], Iterable[int]]) -> None:
        """Load experts that `layer` will probably ask for, in the background, as far as there is time. Modifies.

        Parameters
        ----------
        guess
            Says which; not called where there is no time.
        """
        self._lender.prefetch(layer, guess)

    def observe_token(self, layer: int, experts: list[int], weights: NDArray[np.float32]) -> None:
        """Do what `observe` does for one token, with weights [R]. Modifies."""
        if self._learner is not None:
            self._learner.observe_token(layer, experts, weights)

    def observe(self, layer: int, token: NDArray[Any], expert: NDArray[Any], weight: torch.Tensor) -> None:
        """Let the eviction policy learn which experts the tokens of a layer were routed to. Modifies.

        Parameters
        ----------
        token, expert, weight
            [R] each, a row per token and expert.
        """
        if self._learner is not None:
            self._learner.observe(layer, token, expert, weight)

    def observe_ranked(self, layer: int, experts: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        """Do what `observe` does, of experts [T, K] that are ranked, best first. Modifies."""
        if self._learner is not None:
            self._learner.observe_ranked(layer, experts, weights)

    def acquire(self, key: Key) -> ExpertWeights:
        """Return a copy of an expert's weights that stays valid whatever is dropped later. Does not modify."""
        with self.borrow(key[0], [key[1]]) as (borrowed,):
            return borrowed.weights.copied()

    def record(self, key: Key) -> bytes:
        """Return the record of a held expert, as it was put, for a peer that pulls it. Does not modify.

        Raises
        ------
        ExpertUnavailable
            It is not held, or packed here and as weights nowhere on this node.
        """
        if self.packed is not None:
            return self._loader.read_weights(key)
        with self.borrow(key[0], [key[1]]) as (borrowed,):
            return record_of(self.layout, borrowed.weights)

    def packed_record(self, key: Key) -> bytes:
        """Return the record of a held expert in the precision of all, for a peer; raises as `record` does."""
        return self._loader.packed_record(key)

    def holds(self, key: Key) -> bool:
        """Whether `key` is held in any tier."""
        return any((key, tier) in self._shelf.assigned for tier in TIERS)

    def tier_of(self, key: Key) -> Tier | None:
        """Return the fastest tier that holds `key`, if only in a cache; None if none does."""
        copy = self._shelf.ready.get(key)
        return copy.tier if copy is not None else next((t for t in TIERS if (key, t) in self._shelf.assigned), None)

    def precision_of(self, key: Key) -> Precision | None:
        """Return the best precision in which `key` is in memory here; None if it is not."""
        copies = (self._shelf.ready.get(each) for each in copy_keys(key))
        return next((self._loader.precision_of(copy.key) for copy in copies if copy is not None), None)

    def low_precisions(self, key: Key) -> list[LowPrecision]:
        """Return the low precisions in which `key` may be lent, the most bits first."""
        return [each for each in LOW_PRECISIONS if (*key, each) in self._shelf.sources]

    def at_hand(self, layer: int, experts: int) -> NDArray[np.bool_]:
        """Whether each expert of a layer can be computed without reading its record first, bool [E]."""
        return np.array([(layer, expert) in self._shelf.ready for expert in range(experts)])

    def held(self) -> dict[Tier, list[Key]]:
        """Return the sorted keys held in each tier, without what is merely cached."""
        with self._changed:
            places = sorted(self._shelf.assigned)
        return {tier: [(key[0], key[1]) for key, where in places if where == tier] for tier in TIERS}

    def used(self) -> dict[Tier, int]:
        """Return the bytes taken in each tier, the cache's and those of dropped replicas still in use too."""
        with self._changed:
            return {tier: self._shelf.used[tier] for tier in TIERS}

    @property
    def is_caching(self) -> bool:
        """Whether there are experts that have no memory of their own, and a cache for them."""
        return self.caching is not None and bool(self._shelf.lacking)
