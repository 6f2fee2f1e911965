"""The experts of a prompt's layers where some are in no slot: computed together as they come, the next layer's begun.

Decides what is computed with what: all that is at hand in one product, then all that the device was told to load in
another, behind those loads; what the processor computes in host memory meanwhile on its own. Must not know how a record
gets into a slot, or which expert makes room. Flow: a layer's choice → read by the host → `Residency.waves` → answers.
Axes: T tokens, E experts, K top-k, R = T K rows, D hidden, F ffn.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.copies import Copy
from runtime.cuda.layers import StepParts
from runtime.cuda.sending import sent
from runtime.cuda.shapes import Lanes
from runtime.dispatch import Dispatcher
from runtime.experts import expert_math
from runtime.slots import Residency
from runtime.streaming import Ahead

if TYPE_CHECKING:
    from runtime.cuda.prompts import Choice

_POPULAR: Final = 0.02  # of a prompt's tokens; what fewer are guessed to choose is not begun ahead

Ints = NDArray[np.int64]


class Told(NamedTuple):
    """What the host has read of a layer.

    Attributes
    ----------
    experts, weights
        [T, K] int64 and float32, best first.
    likely
        What the next layer will probably choose, the most popular first.
    """

    experts: Ints
    weights: NDArray[np.float32]
    likely: Sequence[int]


class Rows(NamedTuple):
    """A layer's rows on the device: in order by expert, where each expert's end, and what comes of them."""

    order: torch.Tensor
    ends: torch.Tensor
    active: torch.Tensor
    answers: torch.Tensor


class LackingExperts:
    """The experts of one step of T tokens.

    Parameters
    ----------
    ops
        See `DevicePrompts`.
    """

    def __init__(self, residency: Residency, parts: StepParts, lanes: Lanes, dispatcher: Dispatcher, ops: Any) -> None:
        self._residency = residency
        self._parts = parts
        self._lanes = lanes
        self._dispatcher = dispatcher
        self._ops = ops
        self._experts = parts.router.experts
        caching = residency.caching
        self._looks_ahead = caching is not None and caching.prefetch

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let nothing that was begun ahead be left behind, however the step ends."""
        try:
            yield
        finally:
            self._residency.settle_guesses()

    def run(self, index: int, choice: "Choice") -> torch.Tensor:
        """Return what the experts of a layer of the range make of its choice, [T, D]."""
        began, number = perf_counter(), self._parts.first_layer + index
        ends = torch.empty(self._experts, dtype=torch.int32, device=choice.normed.device)
        order = self._ops.arrange(choice.experts, ends)
        told = self._read(choice, with_guess=self._looks_ahead and index + 1 < len(self._parts.layers))
        active = choice.normed.new_empty((len(order), self._lanes.ffn))
        answers = choice.normed.new_empty((len(order), self._lanes.hidden))
        self._compute(number, told, choice.normed, Rows(order, ends, active, answers))
        combined: torch.Tensor = self._ops.combine(answers, choice.weights)
        self._residency.observe_ranked(number, told.experts, told.weights)
        self._count(number, told, began)
        return combined

    def _read(self, choice: "Choice", *, with_guess: bool) -> Told:
        """Wait until a layer has chosen."""
        size = self._experts
        parts = [choice.experts.int(), choice.weights.float().view(torch.int32)]
        if with_guess:
            guess = choice.logits[:, size : 2 * size].topk(self._parts.router.top_k, dim=-1).indices
            parts.append(guess.int())
        words = torch.stack(parts).cpu().numpy()
        likely = popular(words[2], size) if with_guess else []
        return Told(words[0].astype(np.int64), words[1].view(np.float32), likely)

    def _compute(self, number: int, told: Told, normed: torch.Tensor, rows: Rows) -> None:
        """Have a layer's experts computed, whenever they come."""
        sizes = np.bincount(told.experts.ravel(), minlength=self._experts)
        experts = np.flatnonzero(sizes)
        ahead = Ahead(number + 1, lambda: told.likely) if told.likely else None
        tiers = self._dispatcher.counts.tier_rows
        waves = self._residency.waves(number, experts.tolist(), sizes=sizes[experts].tolist(), ahead=ahead)
        with closing(waves):
            for wave in waves:
                for position, copy in wave.copies:
                    tier = copy.found if wave.is_new else copy.tier
                    tiers[tier] = tiers.get(tier, 0) + int(sizes[experts[position]])
                if wave.is_in_place:
                    self._compute_in_place(told, experts, wave.copies, normed, rows.answers)
                    continue
                slots = np.full(self._experts, -1, dtype=np.int32)
                slots[experts[[position for position, _ in wave.copies]]] = [copy.slot for _, copy in wave.copies]
                there = sent(slots, normed.device)
                self._ops.gate_up(normed, rows.order, rows.ends, there, self._lanes, rows.active)
                self._ops.down(rows.active, rows.order, rows.ends, there, self._lanes, rows.answers)

    def _compute_in_place(
        self, told: Told, experts: Ints, copies: Sequence[tuple[int, Copy]], normed: torch.Tensor, answers: torch.Tensor
    ) -> None:
        """Let the processor compute experts where they lie in host memory."""
        math = expert_math(self._residency.layout.form)
        for position, copy in copies:
            row = torch.from_numpy(np.flatnonzero(told.experts.ravel() == experts[position])).to(normed.device)
            x = normed[row // told.experts.shape[1]].cpu()
            answers[row] = math(self._residency.weights(copy), x).to(answers.device)

    def _count(self, number: int, told: Told, began: float) -> None:
        counts, now = self._dispatcher.counts, perf_counter()
        rows = np.sort(told.experts, axis=None)
        counts.count_layer(number, rows, tokens=len(told.experts), remote_rows=0, remote_tokens=0)
        counts.local_calls += 1
        counts.local_s += now - began
        self._dispatcher.spent_s += now - began
        counts.end_layer(number)
        if self._dispatcher.timeline is not None:
            self._dispatcher.timeline.add("experts here", f"layer {number}", began, now, rows=len(rows))


def popular(guess: NDArray[np.integer[Any]], experts: int) -> list[int]:
    """Return the experts that enough tokens are guessed to choose, [T, K], the most popular first.

    >>> popular(np.array([[3, 1], [1, 3], [1, 0]]), 4)
    [1, 3, 0]
    """
    sizes = np.bincount(guess.ravel(), minlength=experts)
    order = np.argsort(-sizes, kind="stable")
    return [expert for expert in order.tolist() if sizes[expert] and sizes[expert] >= _POPULAR * len(guess)]
