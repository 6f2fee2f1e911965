"""What a device needs to bring missing experts by itself: slots it may fill, and where in host memory records lie.

Decides the order in which spare slots are used, which both sides follow: the host appends, the device takes one after
the other, and the host learns from what was chosen and guessed which expert got which. Must not know shelves or layers'
work. Axes: L layers, B tokens, K top-k, E experts, G guesses, P programs that share a copy.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

NEAR: Final = 2
"""Experts of the next layer that are begun ahead at most: a layer's time is not enough for more."""
FAR: Final = 1
"""Experts of the layer after that one likewise, behind those, where the next one seems to lack nothing more."""
GUESSES: Final = NEAR + FAR
"""What is begun ahead for one layer: by the layer before it, and by the one before that."""
PARTS: Final = 64
"""Programs that share the copy of a record: enough for the link, few beside those that compute."""
CHUNK: Final = 256
"""Words of 8 bytes that a program copies at once."""
WHOLE: Final = 1024
"""How much of a guess has come is told in so many parts of it."""

Service = Literal["none", "host", "device"]
"""Who brings what layers lack: nobody, where they can lack nothing; the host; or the device, from host memory."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Supply:
    """Memory of steps whose device brings experts by itself.

    Attributes
    ----------
    spares
        [R + 1] int64: see `Spares`; and a limit, guesses take the spares before it only.
    hosted
        [L, E] int32: the slot of host memory that each expert's record lies in, -1 where in none.
    own_spares, own_hosted
        The host's, pinned, copied to those when they change: a device's threads would read each word there in turn,
        some 4 us for each 32 of them.
    taken
        [2 L] int64: spares taken when each layer's lack is served, and when its guesses are.
    limits
        [L] int64: the limit as each layer has seen it.
    routed
        [1] int64: the last layer whose router runs, as stamp * L + layer + 1; what is begun ahead stops then.
    stopped
        [P] int64: likewise, the layer for which each program of those that begin ahead has stopped.
    ahead_ids, ahead_slots, progress
        [L, G] int32 twice, and [L, G, P] int32: experts guessed of each layer, -1 where none, `NEAR` by the layer
        before it and then `FAR`, the spares they are brought to, and the chunks that have come of each, by program.
    source, target
        Words of 8 bytes: slots of host memory and of the device, `words` each.
    told, ended
        [L, G] int64, pinned, the host's to read: guesses begun in a layer, expert + 1, or 0, those of the next layer
        first; and what had come of those of a layer when it ran, in parts of `WHOLE`. Words as in `Mail`.
    """

    spares: torch.Tensor
    hosted: torch.Tensor
    own_spares: torch.Tensor
    own_hosted: torch.Tensor
    taken: torch.Tensor
    limits: torch.Tensor
    routed: torch.Tensor
    stopped: torch.Tensor
    ahead_ids: torch.Tensor
    ahead_slots: torch.Tensor
    progress: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    words: int
    told: torch.Tensor
    ended: torch.Tensor
    side: Any = None  # the stream on which experts are brought, beside the kernels of the step
    ahead_side: Any = None  # and that for those that the next layers will probably lack: see `stopped`

    @property
    def ring(self) -> int:
        """Places for spares."""
        return len(self.spares) - 1

    @property
    def chunks(self) -> int:
        """Chunks of a record that each program copies."""
        return -(-self.words // (PARTS * CHUNK))


def make_supply(
    device: torch.device, source: torch.Tensor, target: torch.Tensor, stride: int, *, layers: int, experts: int
) -> Supply:
    """Reserve what steps need.

    Parameters
    ----------
    source, target
        All slots of host memory and of the device, of any dtype.
    stride
        Bytes from one slot to the next, in both.
    """
    is_cuda = device.type == "cuda"

    def own(*shape: int, dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
        return torch.full(shape, fill, dtype=dtype, pin_memory=is_cuda)

    def theirs(*shape: int, dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
        return torch.full(shape, fill, dtype=dtype, device=device)

    words = target.view(torch.int64)
    ring = _ring(words.numel() * 8 // stride)
    return Supply(
        spares=theirs(ring + 1, dtype=torch.int64),
        hosted=theirs(layers, experts, dtype=torch.int32, fill=-1),
        own_spares=own(ring + 1, dtype=torch.int64),
        own_hosted=own(layers, experts, dtype=torch.int32, fill=-1),
        taken=theirs(2 * layers, dtype=torch.int64),
        limits=theirs(layers, dtype=torch.int64),
        routed=theirs(1, dtype=torch.int64),
        stopped=theirs(PARTS, dtype=torch.int64),
        ahead_ids=theirs(layers, GUESSES, dtype=torch.int32, fill=-1),
        ahead_slots=theirs(layers, GUESSES, dtype=torch.int32, fill=-1),
        progress=theirs(layers, GUESSES, PARTS, dtype=torch.int32),
        source=source.view(torch.int64),
        target=words,
        words=stride // 8,
        told=own(layers, GUESSES, dtype=torch.int64),
        ended=own(layers, GUESSES, dtype=torch.int64),
        side=torch.cuda.Stream(device, priority=-1) if is_cuda else None,
        ahead_side=torch.cuda.Stream(device, priority=-1) if is_cuda else None,
    )


def _ring(slots: int) -> int:
    """Places for spares: more than there are slots, so that none is written before it was read."""
    size: int = 1 << slots.bit_length()
    return 2 * size


class Spares:
    """Slots that the device may fill, in the order in which it takes them. Not thread-safe.

    Parameters
    ----------
    ring
        [R] int64: spare number n lies at n % R, as (n + 1) << 32 | slot, so that the device knows it from older ones.

    Attributes
    ----------
    position
        Spares that the device has taken so far.
    offered
        The limit of guesses and the end that the device has heard of last.

    Examples
    --------
    >>> ring = np.zeros(4, dtype=np.int64)
    >>> spares = Spares(ring)
    >>> spares.append([7, 5])
    >>> spares.take(1), len(spares), spares.position, [int(word) & 15 for word in ring[:2]]
    ([7], 1, 1, [7, 5])
    """

    def __init__(self, ring: Ints) -> None:
        self.position = 0
        self.offered = -1, -1
        self._ring = ring
        self._slots: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def end(self) -> int:
        """The number of the next spare that is appended."""
        return self.position + len(self._slots)

    def append(self, slots: Iterable[int]) -> None:
        """Let the device have slots. Modifies."""
        for slot in slots:
            number = self.end
            self._slots.append(slot)
            self._ring[number % len(self._ring)] = ((number + 1) << 32) | slot

    def take(self, count: int) -> list[int]:
        """Note that the device has taken so many; returns which. Modifies."""
        self.position += count
        return [self._slots.popleft() for _ in range(count)]

    def recall(self) -> list[int]:
        """Take back what no step has taken; while none runs. Modifies.

        Their numbers are used no more, so that a device that still knows them does not take them for others.
        """
        slots = list(self._slots)
        self.position = self.end
        self._slots.clear()
        return slots
