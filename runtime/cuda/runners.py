"""What runs a step: as captured graphs on a CUDA device (`graphs`), or where the host is the device (`eager`).

Decides what a step is told. Flow: control words and slot table → the step is launched → the host watches what is
`chosen`, and answers a layer that lacks experts with `release`. Must not know what is missing, or why.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.buffers import Buffers, Chosen
from runtime.cuda.layers import Answer, Step
from runtime.cuda.supply import WHOLE, Service, Supply
from runtime.errors import RuntimeFault

Ints = NDArray[np.int64]
Serve = Callable[[int], None]
Idle = Callable[[], bool]
"""Does some work, unless there is none."""


_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class States:
    """Where a session's keys and values lie, by layer: the tensors, their addresses [L, 2], and elements per head.

    `number` is of these alone: another session's may come to lie where these lay in memory of Python's, and so have
    the same identity, when their session is over.
    """

    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    addresses: Ints
    stride: int
    number: int = field(default_factory=lambda: next(_numbers))


class Words(NamedTuple):
    """What a step is told: its number, tokens before it and states of each of its sessions, and the next spare.

    `wants_logits`: else the best token of each is all that is asked for.
    """

    stamp: int
    seen: Sequence[int]
    states: Sequence[States]
    spare: int = 0
    wants_logits: bool = True

    def write(self, control: Ints, *, with_addresses: bool) -> None:
        """Write `Buffers.control`, which is modified; addresses may be there already."""
        rows = len(self.seen)
        control[:2] = self.stamp, self.spare
        control[2 : 2 + rows] = self.seen
        if with_addresses:
            control[2 + rows : 2 + 2 * rows] = [each.stride for each in self.states]
            control[2 + 2 * rows :] = np.stack([each.addresses for each in self.states], axis=1).ravel()


class Runner(Protocol):
    """Runs steps of one number of tokens, one at a time."""

    buffers: Buffers
    step: Step

    def launch(self, words: Words, news: NDArray[np.int32] | None, *, service: Service) -> None:
        """Launch a step, behind what was launched before; it is to be followed. Modifies the sessions' states.

        Parameters
        ----------
        news
            Of `Buffers`, where the slot table has changed.
        service
            Who brings what layers lack.
        """
        ...

    def follow(self, serve: Serve) -> Answer:
        """Follow the step that was launched until its last layer has chosen.

        Parameters
        ----------
        serve
            Called with each layer when it is about to choose; it asks for what is `chosen` and may `release` it.

        Returns
        -------
        Answer
            In memory of its own.
        """
        ...

    def end(self) -> None:
        """Note that no step follows at once: what overwrites slots from now on comes behind those launched."""
        ...

    def abandon(self) -> None:
        """Let the step that was launched come to its end without the experts that it lacks."""
        ...

    def chosen(self, layer: int, stamp: int, idle: Idle) -> Chosen:
        """Wait until a layer has chosen, doing what can be done meanwhile. Raises `DeviceLost`."""
        ...

    def guessed(self, layer: int, ahead: int, stamp: int) -> Ints:
        """Return what the layer so far behind one that has chosen will probably choose, [B, K]."""
        ...

    def begun(self, layer: int, stamp: int) -> list[int | None]:
        """Return the experts that the device has begun to bring in a layer, by their places among `GUESSES`."""
        ...

    def ended(self, layer: int, stamp: int) -> list[float]:
        """Return how much of each of a layer's guesses was there when it ran, 0 to 1."""
        ...

    def tell(self, table: NDArray[np.int32]) -> None:
        """Let the device have the slot table behind what was launched on the copy stream before. Modifies."""
        ...

    def offer(self) -> None:
        """Let the device have `Supply.own_spares`, the limit last. Modifies."""
        ...

    def tell_hosted(self) -> None:
        """Let the device have `Supply.own_hosted`. Modifies."""
        ...

    def flush(self) -> None:
        """Wait until the device has what it was told."""
        ...

    def release(self, news: NDArray[np.int32], number: int) -> None:
        """Answer a layer that waits: what was launched on the copy stream before is there then. Modifies."""
        ...


def begun_of(words: Ints) -> list[int | None]:
    """Return the experts that `Supply.told` names.

    >>> begun_of(np.array([8, 0]))
    [7, None]
    """
    return [word - 1 if word else None for word in words.tolist()]


def shares_of(words: Ints) -> list[float]:
    """Return the shares that `Supply.ended` tells of."""
    return [word / WHOLE for word in words.tolist()]


def supply_of(buffers: Buffers) -> Supply:
    """Return what the device brings experts with."""
    if buffers.supply is None:
        raise RuntimeFault("these steps cannot bring experts by themselves")
    return buffers.supply
