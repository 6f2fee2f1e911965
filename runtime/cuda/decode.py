"""One token of each of some sessions, run on a device in one go; the experts that its layers lack are brought meanwhile.

Decides for which steps that is possible, and what a layer that lacks experts gets: their weights, or, where a quality
budget allows it, other experts. Flow: control words and slot table → the whole step is launched → layer by layer, what
was chosen is read, counted, and answered where the device waits for it → hidden states. One step at a time; nobody else
gives slots up meanwhile. Must not know sessions or epochs. Axes: B tokens, L layers, E experts, K top-k.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda import reference
from runtime.cuda.buffers import make_buffers
from runtime.cuda.layers import Step, StepParts, lanes_of, step_parts
from runtime.cuda.runners import Caches, Eager, Graphs, Runner
from runtime.cuda.table import ABSENT, Rooms, SlotTable, answer_slots, covers, fits, missing, rows_of, sorted_rows
from runtime.dispatch import Dispatcher
from runtime.errors import DeviceLost, ExpertUnavailable, RuntimeFault
from runtime.loading import Trunk
from runtime.shelf import Copy
from runtime.slots import Residency

log = logging.getLogger(__name__)

MOST_ROWS: Final = 8  # more tokens at once are better computed as products of matrices

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
    sources
        Keeps what is being copied to the device where it is.
    """

    def __init__(self, parts: StepParts, residency: Residency, ops: Any = reference) -> None:
        self.residency = residency
        self.inside = residency.inside
        self.first_layer = parts.first_layer
        self.table = SlotTable(parts.first_layer, len(parts.layers), parts.router.experts)
        self.sources = ExitStack()
        self._parts = parts
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
        return self._parts.trunk.model.model.layers[index].mlp.gate

    def bring(self, number: int, chosen: Ints, lacking: Sequence[int]) -> list[Copy]:
        """Begin to load what a layer lacks, into slots that nobody needs now; `sources` must be closed later. Modifies.

        Returns
        -------
        list of Copy
            What is filled when the copy stream has come past.
        """
        shelf, changed = self.inside.shelf, self.inside.changed
        started: list[Copy] = []
        used: list[Copy] = []
        try:
            with changed:
                absent = self._absent(number, lacking)
                present = {expert for expert in chosen.ravel().tolist() if expert >= 0} - set(absent)
                for expert in present:
                    shelf.use(copy := shelf.ready[number, expert])
                    used.append(copy)
                for slot, expert in zip(self._slots(number, len(absent)), absent, strict=True):
                    shelf.use(copy := shelf.occupy((number, expert), "device", slot))
                    started.append(copy)
            self._load(started)
        finally:
            with changed:
                shelf.end_use([*used, *started])
        return started

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
        left = list(copies)
        try:
            for copy in copies:
                self.sources.push(self.inside.loader.start(copy))
                with self.inside.changed:
                    left.remove(copy)
                    shelf.finish(copy)
                    if self.residency.caching is not None:
                        self.residency.counts.load(copy.key[0], size)
        except (RuntimeFault, RuntimeError, OSError, ValueError, MemoryError) as error:
            with self.inside.changed:
                for copy in left:
                    shelf.fail(copy, error)
            raise

    def prepare(self, number: int, count: int) -> None:
        """Make up the order in which copies go when room is needed next. Modifies."""
        with self.inside.changed:
            self._rooms.prepare(number, count)

    def can_run(self, dispatcher: Dispatcher, caches: Sequence[Any]) -> bool:
        """Whether a step is one for this: experts all here, with room for those of a layer, after a prompt."""
        rows, router = len(caches), self._parts.router
        return (
            rows <= MOST_ROWS
            and dispatcher.combine == "partial"
            and dispatcher.routing.is_local
            and fits(self.inside.pool.slots, rows, router.top_k, router.experts)
            and all(hasattr(layer, "written") and layer.is_initialized for cache in caches for layer in cache.layers)
        )

    def run(
        self, dispatcher: Dispatcher, inputs: torch.Tensor, caches: Sequence[Any], seen: Sequence[int]
    ) -> torch.Tensor:
        """Run a step that `can_run`; modifies the caches.

        Parameters
        ----------
        inputs
            Token ids [B] where the range begins with them, else hidden states [B, D].
        seen
            Tokens in each cache.

        Returns
        -------
        torch.Tensor
            [B, D], normalised where the range ends at the last layer.

        Raises
        ------
        DeviceLost
            The device does not answer.
        ExpertUnavailable, ExpertLost
            As `Residency.lend`.
        """
        layers = len(self._parts.layers)
        with self._lock, self._alone():
            self._stamp += 1
            runner = self._runner(len(caches))
            self._note_waits(runner, dispatcher)
            step = _Step(self, runner, dispatcher, self._stamp)
            states = [[cache.layers[index].memory for cache in caches] for index in range(layers)]
            runner.step.inputs.copy_(inputs)
            control = self._control(states, seen)
            news = step.news() if self.table.is_new else None
            answer = runner.run(control, news, states, waits=not covers(self.table.slots), serve=step.serve)
            for cache in caches:
                for layer in cache.layers:
                    layer.written(1)
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
            self.sources.close()
            with changed:
                shelf.thaw()

    def _runner(self, rows: int) -> Runner:
        found = self._runners.get(rows)
        if found is None:
            parts, router = self._parts, self._parts.router
            device = parts.trunk.device
            sizes = {"layers": len(parts.layers), "rows": rows, "experts": router.experts, "top_k": router.top_k}
            buffers = make_buffers(device, **sizes)
            step = Step(parts, lanes_of(self.inside.pool, parts), buffers, self._ops)
            copies = self.inside.loader.copies
            found = Eager(step, buffers) if copies is None else Graphs(step, buffers, copies)
            self._runners[rows] = found
            self.table.is_new = True
        return found

    def _control(self, states: Caches, seen: Sequence[int]) -> Ints:
        """Return the words of `Buffers.control`; tokens come by themselves."""
        strides = [keys.stride(0) for keys, _ in states[0]]
        addresses = [state.data_ptr() for layer in states for pair in layer for state in pair]
        return np.array([self._stamp, 0, *seen, *strides, *addresses], dtype=np.int64)

    def _note_waits(self, runner: Runner, dispatcher: Dispatcher) -> None:
        """Count what the device waited in the step before, which is over."""
        waited_ns = runner.buffers.mail.waited_ns
        if bool((waited_ns < 0).any()):
            raise DeviceLost("the device waited for an expert until it gave up")
        for index, nanoseconds in enumerate(waited_ns.tolist()):
            if nanoseconds:
                self.residency.counts.waited_s[self._parts.first_layer + index] += 1e-9 * nanoseconds
                dispatcher.counts.local_s += 1e-9 * nanoseconds
                dispatcher.spent_s += 1e-9 * nanoseconds
        waited_ns.zero_()


class _Step:
    """What the host does while one step runs."""

    def __init__(self, decode: CapturedDecode, runner: Runner, dispatcher: Dispatcher, stamp: int) -> None:
        self._decode = decode
        self._runner = runner
        self._dispatcher = dispatcher
        self._stamp = stamp
        self._layers, self._rows, self._top_k = runner.buffers.slots.shape
        self._substitution = dispatcher.substitution
        self._began: tuple[int, float, int] | None = None

    def news(self, answer: NDArray[np.int32] | None = None, weights: Floats | None = None) -> NDArray[np.int32]:
        """Return the slot table, and the answer to a layer that lacks experts, as `Buffers.news` holds them."""
        count = self._rows * self._top_k
        slots = np.full(count, ABSENT, dtype=np.int32) if answer is None else answer.ravel()
        gates = np.zeros(count, dtype=np.float32) if weights is None else weights.ravel().astype(np.float32)
        return np.concatenate([self._decode.table.take(), slots, gates.view(np.int32)])

    def serve(self, index: int) -> None:
        """Count a layer that has chosen, and bring what it lacks."""
        chosen = self._runner.ids(index, self._stamp)
        self._note_load()
        number = self._decode.first_layer + index
        gates: Floats = self._runner.buffers.mail.weights[index].numpy().astype(np.float64)
        if missing(self._decode.table.sent[index], chosen):
            chosen, gates = self._answer(index, number, chosen, gates)
        else:
            self._count_found(number, chosen)
        counts = self._dispatcher.counts
        counts.count_layer(number, sorted_rows(chosen), tokens=self._rows, remote_rows=0, remote_tokens=0)
        counts.local_calls += 1
        self._observe(number, chosen, gates)

    def _answer(self, index: int, number: int, chosen: Ints, gates: Floats) -> tuple[Ints, Floats]:
        """Bring what a layer lacks, or choose otherwise, and let the device go on; returns what is computed."""
        decode, began = self._decode, perf_counter()
        decode.sources.close()  # the device has come past what was copied for layers before
        if self._substitution is not None:
            chosen, gates = self._substituted(index, number, chosen, gates)
        lacking = missing(decode.table.slots[index], chosen)
        brought = decode.bring(number, chosen, lacking)
        slots = answer_slots(decode.table.slots[index], chosen)
        self._runner.release(self.news(slots, gates), self._stamp * self._layers + index + 1)
        rows = self._dispatcher.counts.tier_rows
        for copy in brought:
            rows[copy.found] = rows.get(copy.found, 0) + rows_of([copy.key[1]], chosen)
        others = chosen[~np.isin(chosen, [*lacking, -1])]
        self._count_found(number, others)
        self._began = number, began, len(brought)
        decode.prepare(number, 2 * self._rows * self._top_k)
        return chosen, gates

    def _substituted(self, index: int, number: int, chosen: Ints, gates: Floats) -> tuple[Ints, Floats]:
        """Return what a quality budget lets the layer compute instead."""
        assert self._substitution is not None
        logits = self._runner.buffers.mail.scores[index].log()  # a softmax of them gives the scores again
        self._substitution.see(self._decode.router(index), logits)
        at_hand = self._decode.table.slots[index] >= 0
        others, weights = self._substitution.apply(
            number, torch.from_numpy(chosen), torch.from_numpy(gates).float(), at_hand
        )
        return others.numpy(), weights.double().numpy()

    def _count_found(self, number: int, chosen: Ints) -> None:
        rows, residency = self._dispatcher.counts.tier_rows, self._decode.residency
        rows["device"] = rows.get("device", 0) + chosen.size
        if residency.caching is not None:
            residency.counts.found["device"][number] += len(set(chosen.ravel().tolist()))

    def _note_load(self) -> None:
        """Note the loads that the layer before waited for, which is over."""
        if self._began is None:
            return
        (number, began, loads), self._began, now = self._began, None, perf_counter()
        timeline = self._dispatcher.timeline
        if timeline is not None and loads:
            num_bytes = loads * self._decode.residency.layout.bytes
            timeline.add("loads", f"layer {number}: {loads} experts", began, now, bytes=num_bytes)

    def _observe(self, number: int, chosen: Ints, gates: Floats) -> None:
        shelf = self._decode.inside.shelf
        if shelf.eviction is None or not shelf.lacking:
            return
        with self._decode.inside.changed:
            if (chosen >= 0).all():
                shelf.eviction.observe(number, chosen, gates, self._top_k)
                return
            for experts, scores in zip(chosen, gates, strict=True):
                is_some = experts >= 0
                shelf.eviction.observe(number, experts[None, is_some], scores[None, is_some], int(is_some.sum()))
