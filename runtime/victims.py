"""Which copies make room first: other nodes' experts before this node's, then what the eviction policy says.

Decides an order among the copies that may be evicted; who may be, and when, is `shelf`'s. Where it costs more to have
one copy back than another, and the policy is to know of that, guests stand in line with all others. Pure, without a
lock.
"""

from collections.abc import Sequence

import numpy as np

from runtime.comebacks import Comebacks
from runtime.copies import Copy
from runtime.policy.eviction import Eviction
from runtime.policy.menu import Rent
from schemas.topology import Tier


class Victims:
    """Copies that may make room.

    Parameters
    ----------
    eviction
        Ranks this node's; the oldest goes first if None.
    experts
        Of a layer.
    rent
        Knows how often guests are used.
    comebacks
        Knows what giving a copy up costs; None: all cost the same, and guests go first.

    Attributes
    ----------
    copies
        In the order in which they came to be evictable.
    """

    def __init__(self, eviction: Eviction | None, experts: int, rent: Rent, comebacks: Comebacks | None = None) -> None:
        self.copies: dict[Copy, None] = {}
        self._eviction = eviction
        self._experts = experts
        self._rent = rent
        self._comebacks = comebacks

    def worst(self, layer: int, count: int, tiers: Sequence[Tier]) -> list[Copy]:
        """Return copies of some tiers to give up while `layer` runs, the least valuable first. Does not modify."""
        if count <= 0:
            return []
        copies = [copy for copy in self.copies if copy.tier in tiers]
        if not copies:
            return []
        if self._comebacks is None and (guests := [copy for copy in copies if copy.is_guest]):
            guests.sort(key=lambda copy: self._rent.uses(copy.key))
            copies = [copy for copy in copies if not copy.is_guest]
            if count <= len(guests) or not copies:
                return guests[:count]
            return guests + self._least(copies, layer, count - len(guests))
        return self._least(copies, layer, count)

    def least_guest(self, tier: Tier) -> Copy | None:
        """Return the guest of a tier that is used least; None where there is none. Does not modify."""
        seated = [copy for copy in self.copies if copy.is_guest and copy.tier == tier]
        return min(seated, key=lambda copy: self._rent.uses(copy.key), default=None)

    def _least(self, copies: list[Copy], layer: int, count: int) -> list[Copy]:
        if self._eviction is None:
            return copies[:count]
        keys = np.array([copy.key[0] * self._experts + copy.key[1] for copy in copies])
        worth = self._eviction.worth(keys, layer)
        if self._comebacks is not None:
            worth = worth * np.array([self._comebacks.seconds(copy) for copy in copies])
        return [copies[index] for index in np.argsort(worth, kind="stable")[:count].tolist()]
