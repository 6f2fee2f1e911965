"""The memory through which host and device tell each other what a decode step needs, while it runs.

The device writes what its routers chose into the host's memory (`Mail`), each id stamped with the number of the step,
so that the host can tell what is new without any call. The host answers with slots and weights, and releases the layer.
Decides sizes only. Axes: L layers, B tokens, K top-k, E experts.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.supply import Supply

LOOK_AHEAD: Final = 2
"""Layers whose choice is guessed."""


class KeyValues(NamedTuple):
    """Where the keys and values of each token's session lie.

    Attributes
    ----------
    addresses
        [L, B, 2] int64, of keys and values.
    strides
        [B] int64, elements from one head to the next.
    positions
        [B] int64, of the tokens of this step.
    tensors
        The same as tensors [H, S, d] by layer and token, for who can use no addresses; None on a device.
    """

    addresses: torch.Tensor
    strides: torch.Tensor
    positions: torch.Tensor
    tensors: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None


@dataclass(frozen=True)
class Mail:
    """What the device tells the host; pinned where there is a device.

    Attributes
    ----------
    ids
        [L, B, K] int64: see `arrived`.
    guesses
        [L, A, B, K] int64 likewise: what the A layers after will probably choose, best first, where there are any.
    weights, scores
        [L, B, K] and [L, B, E] float32, of the ids beside them.
    waited_ns
        [2, L] int64: how long the device waited in each layer of the last step of an even number, and of an odd one;
        below 0 where it gave up.
    """

    ids: torch.Tensor
    guesses: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    waited_ns: torch.Tensor


@dataclass(frozen=True)
class Buffers:
    """What lies on the device.

    Attributes
    ----------
    message
        [C + N] int64, the memory of `control` and `news`, so that both are sent at once.
    control
        [2 + 2 B + 2 L B] int64: stamp, the number of the next spare of `Supply`, positions, strides, addresses; written
        before a step.
    news
        [L E + 2 B K] int32: the slot table, and the host's answer to a layer that lacked experts (slots, and weights
        as float32).
    released
        [1] int64: the last layer that the host has answered, as stamp * L + layer + 1.
    slots, first, weights
        [L, B, K] int32, int32 and float32: slots of the chosen experts, -1 where nothing is computed; as they were
        when the router chose; and the router's weights.
    chosen, guessed
        [L, B, K] and [L, A, B, K] int32: what `Mail.ids` and `Mail.guesses` tell, for the device itself.
    supply
        None where the device brings nothing by itself.
    """

    message: torch.Tensor
    control: torch.Tensor
    news: torch.Tensor
    released: torch.Tensor
    slots: torch.Tensor
    first: torch.Tensor
    weights: torch.Tensor
    fence: torch.Tensor
    chosen: torch.Tensor
    guessed: torch.Tensor
    mail: Mail
    supply: Supply | None = None

    @property
    def stamp(self) -> torch.Tensor:
        """The number of the step, [1] int64."""
        return self.control[:1]

    @property
    def key_values(self) -> KeyValues:
        """Where keys and values lie."""
        layers, rows = self.slots.shape[:2]
        positions, strides = (self.control[2 + n * rows : 2 + (n + 1) * rows] for n in (0, 1))
        return KeyValues(self.control[2 + 2 * rows :].view(layers, rows, 2), strides, positions)

    @property
    def table(self) -> torch.Tensor:
        """The slot of every expert, [L, E] int32; below 0 where it has none, the more the likelier it is asked for."""
        layers, _, experts = self.mail.scores.shape
        return self.news[: layers * experts].view(layers, experts)

    @property
    def inbox_slots(self) -> torch.Tensor:
        """[B K] int32."""
        count = self.slots[0].numel()
        return self.news[-2 * count : -count]

    @property
    def inbox_weights(self) -> torch.Tensor:
        """[B K] float32."""
        return self.news[-self.slots[0].numel() :].view(torch.float32)


def make_buffers(
    device: torch.device, *, layers: int, rows: int, experts: int, top_k: int, supply: Supply | None = None
) -> Buffers:
    """Reserve the buffers of steps of so many tokens; stamps are 0, which no step has."""
    is_pinned = device.type == "cuda"

    def own(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=is_pinned)

    mail = Mail(
        own(layers, rows, top_k, dtype=torch.int64),
        own(layers, LOOK_AHEAD, rows, top_k, dtype=torch.int64),
        own(layers, rows, top_k, dtype=torch.float32),
        own(layers, rows, experts, dtype=torch.float32),
        own(2, layers, dtype=torch.int64),
    )
    triples, controls, words = (layers, rows, top_k), control_size(layers, rows), layers * experts + 2 * rows * top_k
    message = torch.zeros(controls + -(-words // 2), dtype=torch.int64, device=device)
    news = message[controls:].view(torch.int32)[:words]
    news.fill_(-1)
    return Buffers(
        message=message,
        control=message[:controls],
        news=news,
        released=torch.zeros(1, dtype=torch.int64, device=device),
        slots=_apart(triples, device),
        first=torch.zeros(triples, dtype=torch.int32, device=device),
        weights=torch.zeros(triples, dtype=torch.float32, device=device),
        fence=torch.zeros(1, dtype=torch.int32, device=device),
        chosen=torch.zeros(triples, dtype=torch.int32, device=device),
        guessed=torch.zeros((layers, LOOK_AHEAD, rows, top_k), dtype=torch.int32, device=device),
        mail=mail,
        supply=supply,
    )


def _apart(triples: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return zeros [L, B, K] int32, each layer's in cache lines of its own.

    A kernel that begins early reads its layer's slots before it has waited: no kernel of another layer may have brought
    the same line, with what was there then.
    """
    layers, rows, top_k = triples
    words = -(-rows * top_k // _LINE) * _LINE
    return torch.zeros((layers, words), dtype=torch.int32, device=device)[:, : rows * top_k].view(triples)


def control_size(layers: int, rows: int) -> int:
    """Return the words of `Buffers.control`."""
    return 2 + 2 * rows + 2 * layers * rows


class Chosen(NamedTuple):
    """What a layer has chosen: experts [B, K], best first, and whether the device found each in a slot."""

    experts: NDArray[np.int64]
    found: NDArray[np.bool_]


_LINE: Final = 32  # words of 4 bytes
STAMP: Final = 1 << 17
FOUND: Final = 1 << 16


def arrived(words: NDArray[np.int64], stamp: int) -> Chosen | None:
    """Read words of stamp * `STAMP` + found * `FOUND` + expert; None while some are of an earlier step.

    >>> chosen = arrived(np.array([3 * STAMP + FOUND + 7, 3 * STAMP + 1]), 3)
    >>> chosen.experts.tolist(), chosen.found.tolist()
    ([7, 1], [True, False])
    >>> arrived(np.array([3 * STAMP + 7, 2 * STAMP + 1]), 3) is None
    True
    """
    if words.flat[-1] < stamp * STAMP:
        return None
    words = words.copy()
    if words.min() < stamp * STAMP:
        return None
    return Chosen(words & (FOUND - 1), (words & FOUND) != 0)
