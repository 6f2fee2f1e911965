"""What was put in memory, and which of it can be read nowhere else: how many slots of a tier never make room.

Decides when a tier *yields*: its budget was lowered below what was put there, so that replicas that can be read again
make room like cached copies. Pure bookkeeping, without a lock. Must not know slots, nor who uses an expert.
"""

from collections.abc import Mapping, Sequence

from runtime.copies import MEMORY, CopyKey
from runtime.records import Source
from schemas.topology import TIERS, Tier


class Replicas:
    """Counts replicas. Not thread-safe.

    Parameters
    ----------
    record_bytes
        What an expert takes in each tier.
    budgets
        Bytes by tier; may be changed.
    sources
        Where records can be read; may be changed, `note_sources` then.
    """

    def __init__(
        self,
        record_bytes: Mapping[Tier, int],
        budgets: Mapping[Tier, int],
        sources: Mapping[CopyKey, Sequence[Source]],
    ) -> None:
        self._record_bytes = record_bytes
        self._budgets = budgets
        self._sources = sources
        self._put: dict[Tier, set[CopyKey]] = {tier: set() for tier in TIERS}
        self._only_here: dict[Tier, set[CopyKey]] = {tier: set() for tier in MEMORY}

    def add(self, key: CopyKey, tier: Tier) -> bool:
        """Note that a replica was put; returns whether the tier yields for it, and did not before. Modifies."""
        was_yielding = self.is_yielding(tier)
        self._put[tier].add(key)
        self.note_sources(key)
        return self.is_yielding(tier) != was_yielding

    def discard(self, key: CopyKey, tier: Tier) -> bool:
        """Note that a replica is held no longer; returns whether the tier yielded, and does not now. Modifies."""
        was_yielding = self.is_yielding(tier)
        self._put[tier].discard(key)
        self.note_sources(key)
        return self.is_yielding(tier) != was_yielding

    def note_sources(self, key: CopyKey) -> None:
        """Note that an expert can be read somewhere now, or nowhere. Modifies."""
        for tier in MEMORY:
            if key in self._put[tier] and key not in self._sources:
                self._only_here[tier].add(key)
            else:
                self._only_here[tier].discard(key)

    def is_yielding(self, tier: Tier) -> bool:
        """Whether more was put in a tier than its budget has room for."""
        return len(self._put[tier]) * self._record_bytes[tier] > self._budgets[tier]

    def only_here(self, tier: Tier) -> int:
        """Return how many replicas of a tier in memory can be read nowhere else."""
        return len(self._only_here[tier])

    def bound(self, tier: Tier) -> int:
        """Return how many replicas of a tier in memory do not make room."""
        return self.only_here(tier) if self.is_yielding(tier) else len(self._put[tier])
