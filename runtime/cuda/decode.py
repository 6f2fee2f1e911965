"""One token of each of some sessions, run on a device in one go, while what its layers lack is brought.

Decides for which steps that is possible, and what a layer that lacks experts gets: their weights, or, where a quality
budget allows it, other experts. Flow: control words and slot table → the whole step is launched → layer by layer, what
was chosen is read, counted, and answered where the device waits for it → hidden states. One step at a time; nobody else
gives slots up meanwhile. Must not know sessions or epochs. Axes: B tokens, L layers, E experts, K top-k.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda import reference
from runtime.cuda.buffers import LOOK_AHEAD, make_buffers
from runtime.cuda.layers import Answer, Step, StepParts, lanes_of, step_parts
from runtime.cuda.runners import Eager, Graphs, Runner, States, Words
from runtime.cuda.table import ABSENT, Rooms, SlotTable, answer_slots, fits, lacking, sorted_rows
from runtime.dispatch import Dispatcher
from runtime.errors import DeviceLost, ExpertUnavailable, RuntimeFault
from runtime.loading import Trunk
from runtime.shelf import Copy
from runtime.slots import Residency
from schemas.topology import Tier

log = logging.getLogger(__name__)

MOST_ROWS: Final = 8  # more tokens at once are better computed as products of matrices
_LEISURE_S: Final = 1e-4

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def captured_decode(trunk: Trunk, residency: Residency) -> "CapturedDecode | None":
    """Return what decodes on a CUDA device; None where the device or the model is another, or Triton is missing."""
    if trunk.device.type != "cuda" or residency.device != trunk.device or residency.packed is not None:
        return None
    parts = step_parts(trunk, residency.layout)
    try:
        from runtime.cuda import kernels
    except ImportError:
        log.warning("Triton is not installed: tokens are decoded operation by operation")
        return None
    return None if parts is None else CapturedDecode(parts, residency, kernels)


class CapturedDecode:
    """Decodes with the layers of one trunk, from the experts of one residency. Thread-safe.

    Parameters
    ----------
    ops
        `runtime.cuda.kernels` on a device; `runtime.cuda.reference` computes the same anywhere.

    Attributes
    ----------
    room_maker
        Lets slots be free for what comes next, as seen from the layer that has chosen last.
    counting, pending
        Bookkeeping that is done before the step is over, or when the host has nothing else to do.
    """

    def __init__(self, parts: StepParts, residency: Residency, ops: Any = reference) -> None:
        self.residency = residency
        self.inside = residency.inside
        self.first_layer = parts.first_layer
        self.table = SlotTable(parts.first_layer, len(parts.layers), parts.router.experts)
        self._sources: list[Copy] = []
        self._waits = False
        self._busy_until = 0.0
        self._states: WeakKeyDictionary[Any, States] = WeakKeyDictionary()
        self.room_maker: Callable[[], None] | None = None
        self.counting: deque[Callable[[], None]] = deque()
        self.pending: deque[Callable[[], None]] = deque()
        self._last = 0.0, 0  # seconds of the step before, and the loads that it waited for
        self.parts = parts
        self._ops = ops
        self._lock = threading.Lock()
        self._runners: dict[int, Runner] = {}
        self._stamp = 0
        self._rooms = Rooms(self.inside.shelf)
        with self.inside.changed:
            self.table.fill(self.inside.shelf)
            self.inside.shelf.watchers.append(self.table.note)

    def router(self, index: int) -> Any:
        """Return the router of a layer of the range."""
        return self.parts.trunk.model.model.layers[index].mlp.gate

    @property
    def looks_ahead(self) -> bool:
        """Whether what the next layer will probably lack is worth loading."""
        caching = self.residency.caching
        return caching is not None and caching.prefetch and self._waits and self.inside.shelf.slack.pays

    def bring(self, number: int, chosen: Ints, absent: Sequence[int]) -> list[Copy]:
        """Begin to load what a layer lacks, into slots that nobody needs now. Modifies.

        Returns
        -------
        list of Copy
            What is filled when the copy stream has come past.
        """
        shelf, changed = self.inside.shelf, self.inside.changed
        used: list[Copy] = []
        started: list[Copy] = []
        try:
            with changed:
                absent = self._absent(number, absent)
                slots = self._rooms.take_free(len(absent))
                if len(slots) < len(absent):  # others make room, but not those that this layer needs
                    for expert in set(chosen[chosen >= 0].tolist()).difference(absent):
                        if (copy := shelf.ready.get((number, expert))) is not None:
                            shelf.use(copy)
                            used.append(copy)
                    slots += self._slots(number, len(absent) - len(slots))
                for slot, expert in zip(slots, absent, strict=True):
                    shelf.use(copy := shelf.occupy((number, expert), "device", slot))
                    started.append(copy)
            self._load(started)
        finally:
            with changed:
                shelf.end_use([*used, *started])
        return started

    def bring_ahead(self, after: int, likely: Sequence[int]) -> bool:
        """Begin to load what a layer will probably lack, where there are free slots; returns whether. Modifies."""
        shelf = self.inside.shelf
        with self.inside.changed:
            absent = [
                expert
                for expert in likely
                if (after, expert) in shelf.lacking
                and not shelf.is_coming((after, expert))
                and self.inside.loader.is_at_hand((after, expert))
            ]
            slots = self._rooms.take_free(len(absent))
            copies = [
                shelf.occupy((after, expert), "device", slot) for expert, slot in zip(absent, slots, strict=False)
            ]
            for copy in copies:
                copy.is_guess = True
                shelf.guesses[after].append(copy)
                self.residency.counts.prefetched[after] += 1
        try:
            self._load(copies)
        except RuntimeFault as error:
            log.warning("an expert that was guessed cannot be loaded: %s", error)
        return bool(copies)

    def replenish(self, number: int, count: int, chosen: Ints, stamp: int) -> None:
        """Let slots be free for what comes next, while the step still goes on behind a layer. Modifies."""
        if stamp == self._stamp:
            with self.inside.changed:
                self._rooms.replenish(number, count, set(chosen.ravel().tolist()))

    @property
    def is_link_idle(self) -> bool:
        """Whether the link will have nothing to do before the next layer chooses, as far as is known."""
        return self._busy_until - perf_counter() < self.inside.shelf.slack.idle_s

    def catch_up(self) -> bool:
        """Do some of the bookkeeping that can wait; returns whether there was any. Modifies.

        Only while the device waits for the link anyway, or where more than two steps' worth has come together.
        """
        most = 6 * len(self.parts.layers)
        is_free = self._busy_until - perf_counter() > _LEISURE_S or len(self.pending) > most
        work = self.counting or self.pending
        if not is_free or not (work or self.room_maker):
            return False
        if self.room_maker is not None:
            make_room, self.room_maker = self.room_maker, None
            make_room()
        else:
            work.popleft()()
        return True

    def _count_all(self) -> None:
        """Count what has not been counted yet of a step that is over; the device still runs its end. Modifies."""
        while self.counting:
            self.counting.popleft()()
        until = perf_counter() + _LEISURE_S
        while self.pending and perf_counter() < until:
            self.pending.popleft()()

    def redeem(self, number: int, chosen: Iterable[int]) -> None:
        """Count the guesses of a layer that came true; the others may go. Modifies."""
        shelf = self.inside.shelf
        if not shelf.guesses.get(number):
            return
        with self.inside.changed:
            for expert in set(chosen):
                copy = shelf.ready.get((number, expert))
                if copy is not None:
                    shelf.redeem(copy)
                    shelf.settle(copy)
            shelf.forget_guesses(number)

    def end_sources(self) -> None:
        """End the use of host memory that was copied from: the device has come past. Modifies."""
        if self._sources:
            with self.inside.changed:
                self.inside.shelf.end_use(self._sources)
            self._sources = []

    def _absent(self, number: int, lacking: Sequence[int]) -> list[int]:
        """Return what has to be loaded, when nobody else is loading it; the lock is held."""
        shelf = self.inside.shelf
        while any(shelf.is_coming((number, expert)) for expert in lacking):
            self.inside.changed.wait(0.05)
        absent = [expert for expert in lacking if (number, expert) not in shelf.ready]
        for expert in absent:
            if not shelf.can_load((number, expert)):
                raise ExpertUnavailable(number, expert, "this node")
        return absent

    def _slots(self, number: int, count: int) -> list[int]:
        """Return slots for cached copies, waiting for those that are in use; the lock is held."""
        slots = self._rooms.take(number, count)
        while len(slots) < count:
            self.inside.changed.wait(0.05)
            slots += self._rooms.take(number, count - len(slots))
        return slots

    def _load(self, copies: Sequence[Copy]) -> None:
        """Begin to fill copies, and give them out: whoever uses them comes behind on the stream."""
        shelf, size = self.inside.shelf, self.residency.layout.bytes
        begun = 0
        try:
            for copy in copies:
                host = self.inside.loader.start(copy)
                begun += 1
                if host is not None:
                    self._sources.append(host)
        finally:
            self._busy_until = max(self._busy_until, perf_counter()) + begun * shelf.slack.load_s
            with self.inside.changed:
                for copy in copies[:begun]:
                    shelf.finish(copy)
                    if self.residency.caching is not None:
                        self.residency.counts.load(copy.key[0], size)
                for copy in copies[begun:]:
                    shelf.fail(copy, RuntimeFault("another expert of the layer could not be loaded"))

    def prepare(self, number: int, count: int) -> None:
        """Make up the order in which copies go when room is needed next, for so many. Modifies."""
        if self._rooms.prepared < 2 * count:
            with self.inside.changed:
                self._rooms.prepare(number, 8 * count)

    def can_run(self, dispatcher: Dispatcher, caches: Sequence[Any]) -> bool:
        """Whether a step is one for this: experts all here, with room for those of a layer, after a prompt."""
        rows, router = len(caches), self.parts.router
        return (
            rows <= MOST_ROWS
            and dispatcher.combine == "partial"
            and dispatcher.routing.is_local
            and fits(self.inside.pool.slots, rows, router.top_k, router.experts)
            and all(cache in self._states or self._is_plain(cache) for cache in caches)
        )

    def _is_plain(self, cache: Any) -> bool:
        """Whether the keys and values of a session lie where they will stay; notes them then."""
        if not all(hasattr(layer, "written") and layer.is_initialized for layer in cache.layers):
            return False
        tensors = [layer.memory for layer in cache.layers]
        addresses = np.array([[state.data_ptr() for state in pair] for pair in tensors], dtype=np.int64)
        self._states[cache] = States(tensors, addresses, tensors[0][0].stride(0))
        return True

    def run(self, dispatcher: Dispatcher, inputs: torch.Tensor, caches: Sequence[Any], seen: Sequence[int]) -> Answer:
        """Run a step that `can_run`; modifies the caches.

        Parameters
        ----------
        inputs
            Token ids [B] where the range begins with them, else hidden states [B, D].
        seen
            Tokens in each cache.

        Returns
        -------
        Answer
            Hidden states [B, D], normalised where the range ends at the last layer, and logits [B, V] then.

        Raises
        ------
        DeviceLost
            The device does not answer.
        ExpertUnavailable, ExpertLost
            As `Residency.lend`.
        """
        with self._lock, self._alone():
            self._stamp += 1
            runner = self._runner(len(caches))
            self._note_waits(runner, dispatcher)
            step = _Step(self, runner, dispatcher, self._stamp, caches)
            states = [self._states[cache] for cache in caches]
            runner.step.inputs.copy_(inputs)
            news = step.news() if self.table.is_new else None
            self._waits = not self.table.is_whole
            began = perf_counter()
            answer = runner.run(Words(self._stamp, seen, states), news, waits=self._waits, serve=step.serve)
            self._last = perf_counter() - began, step.loads
            self._count_all()
            return answer

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let nobody else give slots up."""
        shelf, changed = self.inside.shelf, self.inside.changed
        with changed:
            shelf.freeze()
        try:
            yield
        finally:
            self.counting.clear()
            with changed:
                shelf.thaw()

    def _runner(self, rows: int) -> Runner:
        found = self._runners.get(rows)
        if found is None:
            parts, router = self.parts, self.parts.router
            device = parts.trunk.device
            sizes = {"layers": len(parts.layers), "rows": rows, "experts": router.experts, "top_k": router.top_k}
            buffers = make_buffers(device, **sizes)
            step = Step(parts, lanes_of(self.inside.pool, parts), buffers, self._ops)
            copies = self.inside.loader.copies
            found = Eager(step, buffers) if copies is None else Graphs(step, buffers, copies)
            self._runners[rows] = found
            self.table.is_new = True
        return found

    def _note_waits(self, runner: Runner, dispatcher: Dispatcher) -> None:
        """Count what the device waited in the step before, which is over."""
        waited_ns = runner.buffers.mail.waited_ns.numpy()
        waited = waited_ns.tolist()
        if min(waited) < 0:
            raise DeviceLost("the device waited for an expert until it gave up")
        total_s = 1e-9 * sum(waited)
        for index, nanoseconds in enumerate(waited):
            if nanoseconds:
                self.residency.counts.waited_s[self.first_layer + index] += 1e-9 * nanoseconds
        dispatcher.counts.local_s += total_s
        dispatcher.spent_s += total_s
        slack, (step_s, loads) = self.inside.shelf.slack, self._last
        with self.inside.changed:
            if loads and total_s:
                slack.observe_load(total_s / loads)
            if step_s > total_s:
                slack.observe_layer(step_s / len(waited), total_s / len(waited))
        waited_ns.fill(0)


class _Step:
    """What the host does while one step runs.

    Attributes
    ----------
    loads
        That layers waited for.
    """

    def __init__(
        self, decode: CapturedDecode, runner: Runner, dispatcher: Dispatcher, stamp: int, caches: Sequence[Any]
    ) -> None:
        self._caches = caches
        self._decode = decode
        self._runner = runner
        self._dispatcher = dispatcher
        self._stamp = stamp
        self._layers, self._rows, self._top_k = runner.buffers.slots.shape
        self._substitution = dispatcher.substitution
        self.loads = 0
        self._is_lacking = bool(decode.inside.shelf.lacking)

    def news(self, answer: NDArray[np.int32] | None = None, weights: Floats | None = None) -> NDArray[np.int32]:
        """Return the slot table, and the answer to a layer that lacks experts, as `Buffers.news` holds them."""
        count = self._rows * self._top_k
        slots = np.full(count, ABSENT, dtype=np.int32) if answer is None else answer.ravel()
        gates = np.zeros(count, dtype=np.float32) if weights is None else weights.ravel().astype(np.float32)
        return np.concatenate([self._decode.table.take(), slots, gates.view(np.int32)])

    def serve(self, index: int) -> None:
        """Bring what a layer that has chosen lacks, and what those after will; count it when there is time."""
        decode = self._decode
        chosen = self._runner.chosen(index, self._stamp, decode.catch_up)
        number = decode.first_layer + index
        gates: Floats = self._runner.buffers.mail.weights[index].numpy().astype(np.float64)
        experts = chosen.experts
        absent = lacking(chosen)
        brought: list[Copy] = []
        if absent:
            experts, gates, brought = self._answer(index, number, experts, gates, absent)
        if decode.looks_ahead:
            self._look_ahead(index, number)
        if index == 0:
            decode.end_sources()  # the device has come past whatever was copied in the step before
        decode.counting.append(partial(self._count, index, experts, brought))
        if self._is_lacking:
            most = self._rows * self._top_k
            decode.room_maker = partial(decode.replenish, number, 2 * most, experts, self._stamp)
            decode.pending.append(partial(self._observe, number, experts, gates))
            decode.pending.append(partial(decode.prepare, number, most))

    def _answer(
        self, index: int, number: int, chosen: Ints, gates: Floats, absent: list[int]
    ) -> tuple[Ints, Floats, list[Copy]]:
        """Bring what a layer lacks, or choose otherwise, and let the device go on; returns what is computed."""
        decode, slots = self._decode, self._decode.table.slots[index]
        if self._substitution is not None:
            chosen, gates = self._substituted(index, number, chosen, gates)
            absent = list(dict.fromkeys(chosen[chosen >= 0].tolist()))
        began = perf_counter()
        wanted = [expert for expert in absent if slots[expert] < 0]
        brought = decode.bring(number, chosen, wanted) if wanted else []
        self._runner.release(self.news(answer_slots(slots, chosen), gates), self._stamp * self._layers + index + 1)
        self.loads += len(brought)
        timeline = self._dispatcher.timeline
        if timeline is not None and brought:
            about = f"layer {number}: {len(brought)} experts"
            took = len(brought) * decode.inside.shelf.slack.load_s
            timeline.add("loads", about, began, began + took, bytes=len(brought) * decode.residency.layout.bytes)
        return chosen, gates, brought

    def _count(self, index: int, experts: Ints, brought: Sequence[Copy]) -> None:
        """Count a layer, and let caches know what the device has written to them."""
        number, counts = self._decode.first_layer + index, self._dispatcher.counts
        for cache in self._caches:
            cache.layers[index].written(1)
        self._count_found(number, experts, {copy.key[1]: copy.found for copy in brought})
        counts.count_layer(number, sorted_rows(experts), tokens=self._rows, remote_rows=0, remote_tokens=0)
        counts.local_calls += 1

    def _look_ahead(self, index: int, number: int) -> None:
        """Begin to load what layers after will probably lack, behind what this one waits for.

        What the next one will lack; and where the link would have nothing to do then, one expert of the layer after.
        """
        decode, table = self._decode, self._decode.table
        is_new = False
        for ahead in range(1, min(LOOK_AHEAD, self._layers - 1 - index) + 1):
            if ahead > 1 and not decode.is_link_idle:
                break
            guesses = self._runner.guessed(index, ahead, self._stamp)
            likely = list(dict.fromkeys(guesses.T.ravel().tolist()))
            likely = [expert for expert in likely if table.slots[index + ahead, expert] < 0]
            if likely:
                is_new |= decode.bring_ahead(number + ahead, likely if ahead == 1 else likely[:1])
        if is_new:
            self._runner.tell(table.take())

    def _substituted(self, index: int, number: int, chosen: Ints, gates: Floats) -> tuple[Ints, Floats]:
        """Return what a quality budget lets the layer compute instead."""
        substitution = self._substitution
        if substitution is None:
            return chosen, gates
        logits = self._runner.buffers.mail.scores[index].log()  # a softmax of them gives the scores again
        substitution.see(self._decode.router(index), logits)
        at_hand = self._decode.table.slots[index] >= 0
        others, weights = substitution.apply(number, torch.from_numpy(chosen), torch.from_numpy(gates).float(), at_hand)
        return others.numpy(), weights.double().numpy()

    def _count_found(self, number: int, chosen: Ints, new: Mapping[int, Tier]) -> None:
        """Count rows by where their experts were found, and experts once."""
        rows, residency = self._dispatcher.counts.tier_rows, self._decode.residency
        flat = chosen[chosen >= 0].tolist()
        if not new:
            rows["device"] = rows.get("device", 0) + len(flat)
        for expert in flat if new else ():
            tier = new.get(expert, "device")
            rows[tier] = rows.get(tier, 0) + 1
        if residency.caching is not None:
            residency.counts.found["device"][number] += len(set(flat) - new.keys())
        self._decode.redeem(number, flat)

    def _observe(self, number: int, chosen: Ints, gates: Floats) -> None:
        shelf = self._decode.inside.shelf
        if shelf.eviction is None or not self._is_lacking:
            return
        with self._decode.inside.changed:
            if (chosen >= 0).all():
                shelf.eviction.observe(number, chosen, gates, self._top_k)
                return
            for experts, scores in zip(chosen, gates, strict=True):
                is_some = experts >= 0
                shelf.eviction.observe(number, experts[None, is_some], scores[None, is_some], int(is_some.sum()))
