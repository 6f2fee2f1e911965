"""The slot of every expert of a range of layers, as the host keeps it, and who makes room for what a layer lacks.

Decides which copies go when room is needed at once: the order is made up beforehand, while the device works, by the
eviction policy. Pure bookkeeping: no device. Axes: L layers of the range, E experts.
"""

from collections.abc import Container
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.copies import Copy, CopyKey
from runtime.cuda.buffers import Chosen
from runtime.policy.eviction import Eviction
from runtime.shelf import Shelf
from schemas.topology import Tier

ABSENT: Final = -1
_SCALE: Final = 1 << 24  # of hopes


class SlotTable:
    """[L, E] int32: the device slot that an expert is computed from, `ABSENT` where it has none.

    Parameters
    ----------
    tier
        Of the slots.

    Attributes
    ----------
    is_new
        It has changed since it was taken.
    hopes
        [L, E] int32, 0 or more: how likely each is asked for, of any scale.
    """

    def __init__(self, first_layer: int, layers: int, experts: int, tier: Tier = "device") -> None:
        self.slots: NDArray[np.int32] = np.full((layers, experts), ABSENT, dtype=np.int32)
        self.hopes = np.zeros_like(self.slots)
        self.is_new = True
        self._held = 0
        self._first = first_layer
        self._tier = tier

    def note(self, key: CopyKey, copy: Copy | None) -> None:
        """Note where an expert is computed from now on. Modifies."""
        index = key[0] - self._first
        if len(key) != 2 or not 0 <= index < len(self.slots):
            return
        is_here = copy is not None and copy.tier == self._tier
        slot = copy.slot if copy is not None and is_here else ABSENT
        self._held += (slot >= 0) - int(self.slots[index, key[1]] >= 0)
        self.slots[index, key[1]] = slot
        self.is_new = True

    @property
    def is_whole(self) -> bool:
        """Whether every expert has a slot, so that no layer can lack one."""
        return self._held == self.slots.size

    def take(self) -> NDArray[np.int32]:
        """Return the table for the device, [L * E]: where an expert has no slot, `ABSENT` less its hope. Modifies."""
        self.is_new = False
        return np.where(self.slots < 0, ABSENT - self.hopes, self.slots).ravel()

    def weigh(self, eviction: Eviction) -> None:
        """Let hopes be what keeping each expert is worth now. Modifies."""
        first = self._first * self.slots.shape[1]
        worth = eviction.worth(np.arange(first, first + self.slots.size), self._first)
        least, most = float(worth.min()), float(worth.max())
        if least < most < np.inf:
            self.hopes = ((worth - least) * (_SCALE / (most - least))).astype(np.int32).reshape(self.slots.shape)
            self.is_new = True

    def fill(self, shelf: Shelf) -> None:
        """Note all that there is. Modifies."""
        for key, copy in shelf.ready.items():
            self.note(key, copy)


class HostTable:
    """[L, E] int32: the slot of host memory that the record of an expert lies in, `ABSENT` where in none.

    Attributes
    ----------
    is_new
        It has changed since it was taken.
    """

    def __init__(self, shelf: Shelf, first_layer: int, layers: int, experts: int) -> None:
        self.slots: NDArray[np.int32] = np.full((layers, experts), ABSENT, dtype=np.int32)
        self.is_new = True
        self._shelf = shelf
        self._first = first_layer
        for key, _ in list(shelf.copies):
            self.note(key, None)

    def note(self, key: CopyKey, _: Copy | None) -> None:
        """Note where the record of an expert lies now. Modifies."""
        index = key[0] - self._first
        if len(key) != 2 or not 0 <= index < len(self.slots):
            return
        host = self._shelf.copies.get((key, "host"))
        slot = host.slot if host is not None and host.is_ready else ABSENT
        if slot != self.slots[index, key[1]]:
            self.slots[index, key[1]] = slot
            self.is_new = True

    def take(self) -> NDArray[np.int32]:
        """Return the table for the device. Modifies."""
        self.is_new = False
        return self.slots


class Rooms:
    """Slots for what is loaded. Whoever asks holds the shelf's lock, and has frozen it.

    Attributes
    ----------
    prepared
        Copies whose order is made up.
    """

    def __init__(self, shelf: Shelf, tier: Tier = "device") -> None:
        self.prepared = 0
        self._shelf = shelf
        self._tier: Tier = tier
        self._next: list[Copy] = []

    def prepare(self, layer: int, count: int) -> None:
        """Make up the order in which copies will go, as seen from `layer`. Modifies."""
        with self._shelf.thawed():
            self._next = self._shelf.worst(layer, count, (self._tier,))
        self.prepared = len(self._next)

    def take(self, layer: int, count: int) -> list[int]:
        """Return up to so many slots while the device waits in `layer`; fewer where copies are in use. Modifies."""
        slots = self._take(count, self._next)
        if len(slots) < count:
            self._shelf.forget_guesses(*self._shelf.guesses)
            with self._shelf.thawed():
                victims = self._shelf.worst(layer, count - len(slots), (self._tier,))
            slots += self._take(count - len(slots), victims)
        self.prepared = len(self._next)
        return slots

    def replenish(self, layer: int, count: int, chosen: Container[int]) -> None:
        """Let so many slots be free while the device goes on behind the router of `layer`. Modifies.

        What this step cannot read any more makes room: experts of layers before, and of this one but for the chosen.
        """
        shelf = self._shelf
        short = count - len(shelf.free[self._tier])
        kept: list[Copy] = []
        with shelf.thawed():
            for copy in self._next:
                is_passed = copy.key[0] < layer or (copy.key[0] == layer and copy.key[1] not in chosen)
                if short > 0 and is_passed and copy in shelf.evictable:
                    shelf.evict(copy)
                    short -= 1
                elif copy in shelf.evictable:
                    kept.append(copy)
        self._next, self.prepared = kept, len(kept)

    def take_free(self, count: int) -> list[int]:
        """Return up to so many slots that are free. Modifies."""
        return [slot for _, slot in self._shelf.take(self._tier, count)]

    def _take(self, count: int, victims: list[Copy]) -> list[int]:
        """Take free slots, then those of victims, which are taken off the list."""
        shelf, tier = self._shelf, self._tier
        taken = shelf.take(tier, count)
        with shelf.thawed():
            while len(taken) < count and victims:
                copy = victims.pop(0)
                if copy in shelf.evictable:
                    shelf.evict(copy)
                    taken += shelf.take(tier, 1)
        return [slot for _, slot in taken]


def lacking(chosen: Chosen) -> list[int]:
    """Return the experts that the device did not find, each once, in the order in which they are chosen.

    >>> lacking(Chosen(np.array([[3, 0], [1, 3]]), np.array([[False, True], [False, False]])))
    [3, 1]
    """
    if chosen.found.all():
        return []
    return list(dict.fromkeys(chosen.experts[~chosen.found].tolist()))


def answer_slots(slots: NDArray[np.int32], chosen: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the slots of what is computed, [B, K]; `ABSENT` where a token has fewer experts (an id below 0)."""
    return np.where(chosen >= 0, slots[chosen], np.int32(ABSENT)).astype(np.int32)


def fits(slots: int, rows: int, top_k: int, experts: int) -> bool:
    """Whether all experts that one layer may choose for so many tokens fit into the slots together."""
    return slots >= min(rows * top_k, experts)


def sorted_rows(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the experts of all rows, sorted, without those that are none."""
    flat = chosen.ravel()
    return np.sort(flat[flat >= 0])
