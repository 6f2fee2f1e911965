"""What giving a copy up costs: the seconds it takes to have it back from where it then must come.

Decides where that is: host memory for a device that has its own, else the first place where the record can be read:
this machine's disk or other nodes, whole or in few bits; a guest does not come back, its holder is called instead.
Times are those of loads lately. Pure bookkeeping, without a lock or a clock. Must not know who is evicted for it.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

from runtime.copies import Copy, CopyKey, Place
from runtime.packed import Repacked, Unpacked
from runtime.policy.cost_aware import ReloadTimes
from runtime.records import FetchedRecord, Source
from schemas.precision import Precision
from schemas.topology import Tier

From = Literal["host", "disk", "peer", "call"]

_GUESSES: Final[Mapping[str, float]] = {"host": 1e-4, "disk": 1e-3, "peer": 1e-2, "call": 5e-3}


class Origin(NamedTuple):
    """Where a copy comes from, and in which precision it is read there."""

    where: From
    precision: Precision = "checkpoint"


class Comebacks:
    """Knows where copies would come back from, and how long that takes. Not thread-safe.

    Parameters
    ----------
    sources, copies
        Of the shelf: where records can be read, and what is in memory.
    computed_in
        Tiers that experts are computed from; a copy elsewhere is only loaded from.
    """

    def __init__(
        self,
        sources: Mapping[CopyKey, Sequence[Source]],
        copies: Mapping[Place, Copy],
        computed_in: Sequence[Tier],
    ) -> None:
        self._sources = sources
        self._copies = copies
        self._computed_in = computed_in
        self._times = ReloadTimes(_GUESSES)

    def origin(self, copy: Copy) -> Origin:
        """Return where a copy comes from, or would if it were given up."""
        if copy.is_guest:
            return Origin("call")
        return self._load_origin(copy.key, may_be_host=copy.tier in self._computed_in)

    def _load_origin(self, key: CopyKey, *, may_be_host: bool = True) -> Origin:
        if may_be_host and self.in_host(key) is not None:
            return Origin("host")
        source = next(iter(self._sources.get(key, ())), None)
        return _origin_of(source) if source is not None else Origin("peer")

    def in_host(self, key: CopyKey) -> Copy | None:
        """Return the copy in host memory that an expert is only loaded from; None where there is none."""
        host = self._copies.get((key, "host")) if "host" not in self._computed_in else None
        return host if host is not None and host.is_ready else None

    def load_seconds(self, key: CopyKey) -> tuple[From, float]:
        """Return where an expert that is in no slot is loaded from, and how long that takes."""
        origin = self._load_origin(key)
        return origin.where, self._times.seconds(origin)

    def seconds(self, copy: Copy) -> float:
        """Return what having a copy back takes."""
        return self._times.seconds(self.origin(copy))

    def observe(self, origin: Origin, seconds: float) -> None:
        """Note how long something took. Modifies."""
        self._times.observe(origin, seconds)


def _origin_of(source: Source) -> Origin:
    """Return where a record is read, and in which precision."""
    match source:
        case Repacked(source=inner):
            return _origin_of(inner)
        case Unpacked(source=inner, packed=packed):
            return Origin(_origin_of(inner).where, packed.precision)
        case FetchedRecord():
            return Origin("peer")
    return Origin("disk")
