"""A step whose layers wait for the host: what it does while the device runs.

Decides what a layer that lacks experts gets: their weights, or, where a quality budget allows it, other experts. Flow:
layer by layer, what was chosen is read, answered where the device waits for it, and counted when there is time.
Axes: B tokens, K top-k.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.copies import Copy
from runtime.cuda.buffers import LOOK_AHEAD
from runtime.cuda.following import Beside, Following
from runtime.cuda.table import ABSENT, SlotTable, answer_slots, lacking

_LEISURE_S: Final = 1e-4

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def news_of(
    table: SlotTable, count: int, answer: NDArray[np.int32] | None = None, weights: Floats | None = None
) -> Any:
    """Return the slot table, and the answer to a layer that lacks experts, as `Buffers.news` holds them."""
    slots = np.full(count, ABSENT, dtype=np.int32) if answer is None else answer.ravel()
    gates = np.zeros(count, dtype=np.float32) if weights is None else weights.ravel().astype(np.float32)
    return np.concatenate([table.take(), slots, gates.view(np.int32)])


class HostStep(Following):
    """What the host does while one step runs.

    Parameters
    ----------
    router
        Returns the router of a layer.
    """

    def __init__(self, beside: Beside, router: Callable[[int], Any]) -> None:
        super().__init__(beside)
        self._router = router
        self._is_lacking = bool(self._bringer.inside.shelf.lacking)
        self._make_room: Callable[[], None] | None = None

    def serve(self, index: int) -> None:
        """Bring what a layer that has chosen lacks, and what those after will; count it when there is time."""
        chosen = self._runner.chosen(index, self._stamp, self._catch_up)
        number = self._first + index
        gates: Floats = self._runner.buffers.mail.weights[index].numpy().astype(np.float64)
        experts = chosen.experts
        absent = lacking(chosen)
        brought: list[Copy] = []
        if absent:
            experts, gates, brought = self._answer(index, number, experts, gates, absent)
        if self._looks_ahead:
            self._look_ahead(index, number)
        if index == 0:
            self._bringer.end_sources()  # the device has come past whatever was copied in the step before
        self._counting.append(partial(self._count, index, experts, brought))
        if self._is_lacking:
            most = self._rows * self._top_k
            self._make_room = partial(self._replenish, number, 2 * most, experts)
            self._pending.append(partial(self._tally.observe, index, experts, gates))
            self._pending.append(partial(self._bringer.prepare, number, most))

    def settle(self) -> None:
        """Do nothing: the books were kept when loads were begun."""

    def close(self) -> None:
        """Do nothing: no slot is kept spare."""

    def finish(self) -> None:
        """Count what has not been counted yet. Modifies."""
        super().finish()
        until = perf_counter() + _LEISURE_S
        while self._pending and perf_counter() < until:
            self._pending.popleft()()

    def _catch_up(self) -> bool:
        """Do some of the bookkeeping that can wait; returns whether there was any. Modifies.

        Only while the device waits for the link anyway, or where more than two steps' worth has come together.
        """
        is_busy = self._bringer.busy_until - perf_counter() > _LEISURE_S
        is_free = is_busy or not self._is_lacking or len(self._pending) > 6 * self._layers
        work = self._counting or self._pending
        if not is_free or not (work or self._make_room):
            return False
        if self._make_room is not None:
            make_room, self._make_room = self._make_room, None
            make_room()
        else:
            work.popleft()()
        return True

    def _replenish(self, number: int, count: int, chosen: Ints) -> None:
        """Let slots be free for what comes next, while the step still goes on behind a layer. Modifies."""
        with self._bringer.inside.changed:
            self._bringer.rooms.replenish(number, count, set(chosen.ravel().tolist()))

    def _answer(
        self, index: int, number: int, chosen: Ints, gates: Floats, absent: list[int]
    ) -> tuple[Ints, Floats, list[Copy]]:
        """Bring what a layer lacks, or choose otherwise, and let the device go on; returns what is computed."""
        slots = self._table.slots[index]
        if self._dispatcher.substitution is not None:
            chosen, gates = self._substituted(index, number, chosen, gates)
            absent = list(dict.fromkeys(chosen[chosen >= 0].tolist()))
        began = perf_counter()
        wanted = [expert for expert in absent if slots[expert] < 0]
        brought = self._bringer.bring(number, chosen, wanted) if wanted else []
        news = news_of(self._table, self._rows * self._top_k, answer_slots(slots, chosen), gates)
        self._runner.release(news, self._stamp * self._layers + index + 1)
        self._note_loads(number, len(brought), began)
        return chosen, gates, brought

    def _count(self, index: int, experts: Ints, brought: list[Copy]) -> None:
        flat = self._tally.count(index, experts, {copy.key[1]: copy.found for copy in brought})
        self._bringer.redeem(self._first + index, flat)

    def _look_ahead(self, index: int, number: int) -> None:
        """Begin to load what layers after will probably lack, behind what this one waits for.

        What the next one will lack; and where the link would have nothing to do then, one expert of the layer after.
        """
        is_new = False
        for ahead in range(1, min(LOOK_AHEAD, self._layers - 1 - index) + 1):
            if ahead > 1 and not self._bringer.is_link_idle:
                break
            guesses = self._runner.guessed(index, ahead, self._stamp)
            likely = list(dict.fromkeys(guesses.T.ravel().tolist()))
            likely = [expert for expert in likely if self._table.slots[index + ahead, expert] < 0]
            if likely:
                is_new |= self._bringer.bring_ahead(number + ahead, likely if ahead == 1 else likely[:1])
        if is_new:
            self._runner.tell(self._table.take())

    def _substituted(self, index: int, number: int, chosen: Ints, gates: Floats) -> tuple[Ints, Floats]:
        """Return what a quality budget lets the layer compute instead."""
        substitution = self._dispatcher.substitution
        if substitution is None:
            return chosen, gates
        logits = self._runner.buffers.mail.scores[index].log()  # a softmax of them gives the scores again
        substitution.see(self._router(index), logits)
        at_hand = self._table.slots[index] >= 0
        others, weights = substitution.apply(number, torch.from_numpy(chosen), torch.from_numpy(gates).float(), at_hand)
        return others.numpy(), weights.double().numpy()
