"""The experts of a prompt's layers where some are in no slot: computed together as they come, the next layer's begun.

Decides what is computed with what: all that is at hand in one product, then all that the device was told to load in
another, behind those loads; what the processor computes in host memory meanwhile on its own. Must not know how a record
gets into a slot, or which expert makes room. Flow: a layer's choice → read by the host → `Residency.waves` → answers.
Axes: T tokens, E experts, K top-k, R = T K rows, D hidden, F ffn.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from runtime.copies import Copy
from runtime.cuda.parts import LayerParts, StepParts
from runtime.cuda.sending import reading, sent
from runtime.cuda.shapes import Lanes
from runtime.dispatch import Dispatcher
from runtime.experts import expert_math
from runtime.policy.crowds import Crowds, most_ahead
from runtime.slots import Residency
from runtime.streaming import Ahead

Ints = NDArray[np.int64]

_WITH_GUESS: Final = 3  # parts of what is told


class Choice(NamedTuple):
    """What a layer's router chose of normed [T, D].

    Attributes
    ----------
    told
        Of `choose`, [2 or 3, T, K] int32.
    """

    normed: torch.Tensor
    told: torch.Tensor

    @property
    def experts(self) -> torch.Tensor:
        """[T, K] int32, best first."""
        return self.told[0]

    @property
    def weights(self) -> torch.Tensor:
        """[T, K] float32."""
        return self.told[1].view(torch.float32)

    def beside(self, ops: Any, layer: LayerParts) -> torch.Tensor | None:
        """Return what an expert that every token uses makes of `normed`, [T, D]; None where a layer has none."""
        if (shared := layer.shared) is None:
            return None
        made: torch.Tensor = ops.shared(self.normed, functional.linear(self.normed, shared.weigh), shared)
        return made


class Told(NamedTuple):
    """What the host has read of a layer.

    Attributes
    ----------
    experts, weights
        [T, K] int64 and float32, best first.
    sizes
        [E] int64: rows of each expert.
    guess
        [T, K] int32: what the router of the next layer makes of the same; None where that is not wanted.
    """

    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    sizes: Ints
    guess: NDArray[np.int32] | None


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
    crowds
        Says what to begin ahead, and learns what was chosen.
    ops
        See `DevicePrompts`.

    Attributes
    ----------
    looks_ahead
        Whether the choice of the next layer is guessed.
    """

    def __init__(
        self,
        residency: Residency,
        parts: StepParts,
        lanes: Lanes,
        dispatcher: Dispatcher,
        *,
        crowds: Crowds,
        ops: Any,
    ) -> None:
        self._residency = residency
        self._parts = parts
        self._lanes = lanes
        self._dispatcher = dispatcher
        self._crowds = crowds
        self._ops = ops
        self._experts = parts.router.experts
        self._books: Callable[[], None] | None = None  # of the layer before: done while the device works
        caching = residency.caching
        self.looks_ahead = caching is not None and caching.prefetch

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let nothing that was begun ahead be left behind, however the step ends."""
        try:
            yield
            self._keep_books()
        finally:
            self._residency.settle_guesses()

    def run(self, index: int, choice: Choice) -> torch.Tensor:
        """Return what the experts of a layer of the range make of its choice, [T, D]."""
        number = self._parts.first_layer + index
        read = reading(choice.told)
        ends = torch.empty(self._experts, dtype=torch.int32, device=choice.normed.device)
        order = self._ops.arrange(choice.experts, ends)
        beside = choice.beside(self._ops, self._parts.layers[index])  # while the host reads, and what lacks comes
        active = choice.normed.new_empty((len(order), self._lanes.ffn))
        answers = choice.normed.new_empty((len(order), self._lanes.hidden))
        words, began = read(), perf_counter()
        sizes = np.bincount(words[0].ravel(), minlength=self._experts)
        told = Told(words[0], words[1].view(np.float32), sizes, words[2] if len(words) == _WITH_GUESS else None)
        self._compute(number, told, choice.normed, Rows(order, ends, active, answers))
        combined: torch.Tensor = self._ops.combine(answers, choice.weights, beside)
        self._books = partial(self._count, number, told, began, perf_counter())
        return combined

    def _keep_books(self) -> None:
        """Learn and count what the layer before did. Modifies."""
        books, self._books = self._books, None
        if books is not None:
            books()

    def _compute(self, number: int, told: Told, normed: torch.Tensor, rows: Rows) -> None:
        """Have a layer's experts computed, whenever they come."""
        sizes, experts = told.sizes, np.flatnonzero(told.sizes)
        tiers, ahead = self._dispatcher.counts.tier_rows, self._ahead(number + 1, told)
        waves = self._residency.waves(number, experts.tolist(), sizes=sizes[experts].tolist(), ahead=ahead)
        with closing(waves):
            for wave in waves:
                self._keep_books()  # the link has been told what to load
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

    def _ahead(self, number: int, told: Told) -> Ahead | None:
        """Return what the next layer will probably ask for: worked out when this layer's own loads are begun."""
        if told.guess is None:
            return None
        guess, tokens = told.guess, len(told.experts)

        def likely() -> list[int]:
            return self._crowds.expect(number, tokens, np.bincount(guess.ravel(), minlength=self._experts))

        return Ahead(number, likely, most_ahead(self._residency.slack.load_s), is_judged=True)

    def _compute_in_place(
        self, told: Told, experts: Ints, copies: Sequence[tuple[int, Copy]], normed: torch.Tensor, answers: torch.Tensor
    ) -> None:
        """Let the processor compute experts where they lie in host memory."""
        math = expert_math(self._residency.layout.form)
        for position, copy in copies:
            row = torch.from_numpy(np.flatnonzero(told.experts.ravel() == experts[position])).to(normed.device)
            x = normed[row // told.experts.shape[1]].cpu()
            answers[row] = math(self._residency.weights(copy), x).to(answers.device)

    def _count(self, number: int, told: Told, began: float, ended: float) -> None:
        counts = self._dispatcher.counts
        self._residency.observe_ranked(number, told.experts.astype(np.int64), told.weights)
        self._crowds.learn(number, len(told.experts), told.sizes)
        rows = counts.count_sizes(number, told.sizes, tokens=len(told.experts))
        counts.local_calls += 1
        counts.local_s += ended - began
        self._dispatcher.spent_s += ended - began
        counts.end_layer(number)
        if self._dispatcher.timeline is not None:
            self._dispatcher.timeline.add("experts here", f"layer {number}", began, ended, rows=rows)
