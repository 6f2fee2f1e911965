"""One token of each of some sessions, run on a device in one go, while what its layers lack is brought.

Decides for which steps that is possible, and who brings what they lack: the device itself (`fetched`), but the host
(`waited`) where a quality budget may give a layer other experts, records are large, or host memory is too small. Flow:
control words and slot table → the whole step is launched → one of both follows it → hidden states. One step at a time;
nobody else gives slots up meanwhile. Must not know sessions or epochs. Axes: B tokens, L layers, E experts, K top-k.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from runtime.cuda import reference
from runtime.cuda.bringing import Bringer
from runtime.cuda.buffers import make_buffers
from runtime.cuda.eager import Eager
from runtime.cuda.fetched import DeviceStep
from runtime.cuda.following import Beside
from runtime.cuda.graphs import Graphs
from runtime.cuda.layers import Answer, Step
from runtime.cuda.parts import StepParts, lanes_of, step_parts
from runtime.cuda.runners import Runner, Serve, States, Words
from runtime.cuda.supply import Service, Spares, Supply, make_supply
from runtime.cuda.table import HostTable, SlotTable, fits
from runtime.cuda.tally import Tally
from runtime.cuda.waited import HostStep, news_of
from runtime.dispatch import Dispatcher
from runtime.errors import DeviceLost
from runtime.loading import Trunk
from runtime.slots import Residency

log = logging.getLogger(__name__)

LARGE_BYTES: Final = 32 << 20
"""Larger records are brought by the host: a device's copy engine takes 7 % less time for one than its kernels (54.6 and
50.7 GB/s on an H200), which is more than the 60 us that the host takes to begin from some 46 MB on."""
MOST_AT_ONCE: Final = 16
"""Tokens that are run one behind the other while nobody else may run any; and so many may come behind a stop token."""
_PATIENCE_S: Final = 0.05
MOST_ROWS: Final = 8  # more tokens at once are better computed as products of matrices


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
    services
        How many steps each way of bringing experts was used for.
    """

    def __init__(self, parts: StepParts, residency: Residency, ops: Any = reference) -> None:
        self.residency = residency
        self.inside = residency.inside
        self.parts = parts
        self.first_layer = parts.first_layer
        self.table = SlotTable(parts.first_layer, len(parts.layers), parts.router.experts)
        self.services: dict[Service, int] = {"none": 0, "host": 0, "device": 0}
        self._bringer = Bringer(residency)
        self._pending: deque[Callable[[], None]] = deque()
        self._states: WeakKeyDictionary[Any, States] = WeakKeyDictionary()
        self._last = 0.0, 0  # seconds of the step before, and the loads that it waited for
        self._unread: tuple[Runner, int] | None = None  # a step whose waits are not counted yet
        self._ops = ops
        self._lock = threading.Lock()
        self._runners: dict[int, Runner] = {}
        self._latest: Runner | None = None
        self._spares: dict[int, Spares] = {}
        self._stamp = 0
        shelf = self.inside.shelf
        with self.inside.changed:
            self.table.fill(shelf)
            self.hosted = HostTable(shelf, parts.first_layer, len(parts.layers), parts.router.experts)
            shelf.watchers += [self.table.note, self.hosted.note]

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
            step = self._prepare(dispatcher, caches, seen)
            self._launch(step, inputs)
            answer = step.follow(is_last=True)
            step.host.finish()
            return answer

    def at_once(self, most: int) -> int:
        """Return how many tokens `run_on` may run, so that whoever waits for the lock does not wait for long."""
        return max(1, min(most, MOST_AT_ONCE, int(_PATIENCE_S / max(self._last[0], 1e-6))))

    def run_on(self, dispatcher: Dispatcher, inputs: torch.Tensor, cache: Any, seen: int, count: int) -> torch.Tensor:
        """Run a token [1] of a session whose steps `can_run`, and behind it the best one each time, `count` in all.

        Each step is launched as soon as the last layer of the one before has chosen. Modifies the cache; raises as
        `run` does.

        Returns
        -------
        torch.Tensor
            The best token behind each, [count] int64.
        """
        best: list[torch.Tensor] = []
        with self._lock, self._alone():
            step = self._prepare(dispatcher, [cache], [seen], wants_logits=False)
            self._launch(step, inputs)
            for number in range(1, count + 1):
                after = None
                if number < count:  # whatever can be done before is done before the device waits for it
                    after = self._prepare(dispatcher, [cache], [seen + number], wants_logits=False)
                best.append(step.follow(is_last=after is None).tokens())
                if after is not None:
                    self._launch(after, None)
                try:
                    step.host.finish()
                except BaseException:
                    if after is not None:
                        after.abandon()
                    raise
                step = after or step
        return torch.cat(best)

    def _prepare(
        self, dispatcher: Dispatcher, caches: Sequence[Any], seen: Sequence[int], *, wants_logits: bool = True
    ) -> "_Step":
        """Make up a step, while another may run. Modifies."""
        self._stamp += 1
        runner = self._runner(len(caches))
        service = self._service(dispatcher, runner)
        host = self._following(service, runner, dispatcher, caches)
        words = Words(self._stamp, seen, [self._states[cache] for cache in caches], wants_logits=wants_logits)
        return _Step(runner, host, service, words, self._noting(host.serve, dispatcher), self._note)

    def _launch(self, step: "_Step", inputs: torch.Tensor | None) -> None:
        """Launch a step, which is to be followed; without inputs it takes the best tokens of the last one. Modifies."""
        if inputs is not None:
            step.runner.step.inputs.copy_(inputs)
        self.services[step.service] += 1
        with self.inside.changed:
            self.inside.shelf.freeze(host=step.service == "device")
        try:
            words = step.words._replace(spare=step.host.begin())
            step.runner.launch(words, self._news(step.service, step.runner), service=step.service)
        except BaseException:
            step.host.close()
            raise

    def _following(
        self, service: Service, runner: Runner, dispatcher: Dispatcher, caches: Sequence[Any]
    ) -> HostStep | DeviceStep:
        """Return what the host does beside a step."""
        caching, pending = self.residency.caching, self._pending
        looks_ahead = caching is not None and caching.prefetch
        if service != "device":
            looks_ahead = looks_ahead and service == "host" and self.inside.shelf.slack.pays
        tally = Tally(self.residency, dispatcher, self.first_layer, caches)
        beside = Beside(
            self._bringer, self.table, runner, dispatcher, tally, self._stamp, self.first_layer, looks_ahead, pending
        )
        if service != "device":
            return HostStep(beside, self._router)
        if looks_ahead:
            pending.append(self._weigh)
        return DeviceStep(beside, self.hosted, self._spares[len(caches)])

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Let no step run and nobody give slots up meanwhile; yields whether every expert has a slot."""
        with self._lock, self._alone():
            yield self.table.is_whole

    def _service(self, dispatcher: Dispatcher, runner: Runner) -> Service:
        """Return who brings what a step lacks."""
        if self.table.is_whole:
            return "none"
        is_large = self.inside.pool.stride > LARGE_BYTES
        if runner.buffers.supply is None or dispatcher.substitution is not None or is_large:
            return "host"
        room = self.inside.host_pool.slots - self.inside.shelf.bound("host")
        _, rows, top_k = runner.buffers.slots.shape
        return "device" if fits(room, rows, top_k, self.parts.router.experts) else "host"

    def _weigh(self) -> None:
        """Let guesses be begun in the order in which the eviction policy would keep them."""
        if (eviction := self.inside.shelf.eviction) is not None:
            with self.inside.changed:
                self.table.weigh(eviction)

    def _news(self, service: Service, runner: Runner) -> Any:
        """Return the slot table, where it has changed."""
        if not self.table.is_new:
            return None
        return news_of(self.table, runner.buffers.slots[0].numel()) if service == "host" else self.table.take()

    def _router(self, index: int) -> Any:
        """Return the router of a layer of the range."""
        return self.parts.trunk.model.model.layers[index].mlp.gate

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let nobody else give slots up."""
        shelf, changed = self.inside.shelf, self.inside.changed
        with changed:
            shelf.freeze()
        try:
            yield
        finally:
            with changed:
                shelf.thaw()

    def _runner(self, rows: int) -> Runner:
        found = self._runners.get(rows)
        if found is None:
            parts, router = self.parts, self.parts.router
            device, lanes = parts.trunk.device, lanes_of(self.inside.pool, parts)
            layers, copies = len(parts.layers), self.inside.loader.copies
            supply = None if copies is None else self._supply(rows, layers)
            buffers = make_buffers(
                device, layers=layers, rows=rows, experts=router.experts, top_k=router.top_k, supply=supply
            )
            step = Step(parts, lanes, buffers, self._ops)
            found = Eager(step, buffers) if copies is None or device.type == "cpu" else Graphs(step, buffers, copies)
            self._runners[rows] = found
        if found is not self._latest:  # what changed before, another was told
            self._latest = found
            self.table.is_new = self.hosted.is_new = True
        return found

    def _supply(self, rows: int, layers: int) -> Supply | None:
        pool, host = self.inside.pool, self.inside.host_pool
        if not host.slots or not pool.slots:
            return None
        source, target = host.lanes()[0], pool.lanes()[0]
        experts, device = self.parts.router.experts, self.parts.trunk.device
        supply = make_supply(device, source, target, pool.stride, layers=layers, experts=experts)
        self._spares[rows] = Spares(supply.own_spares.numpy()[:-1])
        return supply

    def _note(self, runner: Runner, stamp: int, seconds: float, loads: int) -> None:
        """Note a step that the host has followed to its last layer. Modifies."""
        self._last, self._unread = (seconds, loads), (runner, stamp)

    def _noting(self, serve: Serve, dispatcher: Dispatcher) -> Serve:
        """Let waits of the step before be counted when the first layer of this one has chosen."""

        def noting(index: int) -> None:
            serve(index)
            if index == 0 and self._unread is not None:
                (runner, stamp), self._unread = self._unread, None
                self._note_waits(runner, stamp, dispatcher)

        return noting

    def _note_waits(self, runner: Runner, stamp: int, dispatcher: Dispatcher) -> None:
        """Count what the device waited in a step that is over."""
        waited_ns = runner.buffers.mail.waited_ns.numpy()[stamp % 2]
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


class _Step(NamedTuple):
    """A step, and what the host does beside it; `note` takes its runner, number, seconds, and loads it waited for."""

    runner: Runner
    host: HostStep | DeviceStep
    service: Service
    words: Words
    serve: Serve
    note: Callable[[Runner, int, float, int], None]

    def follow(self, *, is_last: bool) -> Answer:
        """Follow it until its last layer has chosen; the books are as the next step needs them then. Modifies."""
        began, goes_on = perf_counter(), False
        try:
            answer = self.runner.follow(self.serve)
            self.note(self.runner, self.words.stamp, perf_counter() - began, self.host.loads)
            self.host.settle()
            goes_on = not is_last
        finally:
            if not goes_on:
                self.host.close()
        if is_last:
            self.runner.end()
        return answer

    def abandon(self) -> None:
        """Let it come to its end, whatever it lacks. Modifies."""
        self.runner.abandon()
        self.host.close()
