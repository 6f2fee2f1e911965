"""How a step is run: as a captured graph on a CUDA device, or operation by operation where the host is the device.

Decides when a graph is captured: at the first step of its kind. Flow: control words and slot table → the step is
launched → the host watches what is `chosen`, and answers a layer that lacks experts with `release`. Must not know what
is missing, or why.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.buffers import Buffers, Chosen, arrived
from runtime.cuda.copies import DeviceCopies
from runtime.cuda.layers import Answer, Step
from runtime.cuda.supply import WHOLE, Service, Supply
from runtime.errors import DeviceLost, RuntimeFault

_PATIENCE_S: Final = 60.0
_GLANCES: Final = 256
_FOR_EVER: Final = 1 << 62

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


class Graphs:
    """Runs steps as graphs, one for steps that may wait and one for those that cannot."""

    def __init__(self, step: Step, buffers: Buffers, copies: DeviceCopies) -> None:
        self.step, self.buffers = step, buffers
        self._copies = copies
        self._graphs: dict[Service, tuple[torch.cuda.CUDAGraph, Answer]] = {}
        # what is sent is read later, behind copies that take their time: each message has memory of its own, and there
        # are no more messages under way than two for each layer of a step, and of the one before
        messages = 4 * len(buffers.slots) + 8
        self._begins = torch.zeros((2, buffers.message.numel()), dtype=torch.int64).pin_memory()
        self._news = torch.zeros((messages, buffers.news.numel()), dtype=torch.int32).pin_memory()
        self._numbers = torch.zeros(messages, dtype=torch.int64).pin_memory()
        controls = buffers.control.numel()
        self._controls, self._messages = self._begins[:, :controls].numpy(), self._news.numpy()
        self._tables = self._begins[:, controls:].view(torch.int32).numpy()
        self._is_told = False
        self._launched: tuple[Answer, Service]
        self._written: list[list[int]] = [[], []]
        self._next = 0
        self._seen: Ints = buffers.mail.ids.numpy()
        self._guesses: Ints = buffers.mail.guesses.numpy()
        nothing = np.zeros(0, dtype=np.int64)
        supply = buffers.supply
        self._told: Ints = nothing if supply is None else supply.told.numpy()
        self._ended: Ints = nothing if supply is None else supply.ended.numpy()

    def launch(self, words: Words, news: NDArray[np.int32] | None, *, service: Service) -> None:
        """Launch a step."""
        with self._here():
            self._launched = self._launch(words, news, service), service

    def _here(self) -> AbstractContextManager[object]:
        """Let the device be the current one."""
        device = self.buffers.control.device
        return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)

    def _launch(self, words: Words, news: NDArray[np.int32] | None, service: Service) -> Answer:
        buffers, turn = self.buffers, words.stamp % 2
        states = [each.number for each in words.states]
        words.write(self._controls[turn], with_addresses=self._written[turn] != states)
        self._written[turn] = states
        if service not in self._graphs:
            self._capture(self._controls[turn], service)
        size = 8 * len(self._controls[turn])
        if news is not None:
            self._tables[turn, : len(news)] = news
            size += 4 * len(news)
        stream = torch.cuda.current_stream()
        self._copies.send(
            buffers.message.data_ptr(), self._begins.data_ptr() + turn * 8 * self._begins.shape[1], size,
            stream=stream.cuda_stream,
        )  # fmt: skip
        if self._is_told:  # what is in host memory; spares have numbers by which they are known
            stream.wait_stream(self._copies.stream)
            self._is_told = False
        graph, output = self._graphs[service]
        graph.replay()
        return output.own(wants_logits=words.wants_logits)

    def follow(self, serve: Serve) -> Answer:
        """Follow a step."""
        answer, service = self._launched
        try:
            with self._here():
                for layer in range(len(self.buffers.slots)):
                    serve(layer)
        except BaseException:
            self.abandon()
            raise
        if service == "host":
            torch.cuda.current_stream(self.buffers.control.device).wait_stream(self._copies.stream)
        return answer

    def end(self) -> None:
        """Let copies from now on come behind what was launched."""
        self._copies.fences.read_all()

    def _message(self, words: NDArray[np.int32]) -> int:
        """Write words into the next message; returns its number."""
        number = self._next = (self._next + 1) % len(self._messages)
        self._messages[number, : len(words)] = words
        return number

    def abandon(self) -> None:
        """Let a step come to its end without the experts that it lacks."""
        self._release(0, _FOR_EVER)
        torch.cuda.synchronize()
        self.buffers.released.zero_()

    def _capture(self, control: Ints, service: Service) -> None:
        """Capture a graph, after a run that compiles its kernels and computes nothing that lasts.

        That run has the positions of the step to come, whose keys and values it writes as the step will, and a
        table in which every expert is in slot 0, so that it waits for nobody.
        """
        buffers = self.buffers
        before, inputs = buffers.news.clone(), self.step.inputs.clone()
        buffers.news.zero_()
        buffers.control.copy_(torch.from_numpy(control))
        side = torch.cuda.Stream(buffers.control.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step.run(buffers.key_values, service=service)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.step.run(buffers.key_values, service=service)
        self._graphs[service] = graph, output
        buffers.news.copy_(before)
        self.step.inputs.copy_(inputs)
        buffers.mail.ids.zero_()
        buffers.mail.guesses.zero_()
        if buffers.supply is not None:
            for told in (buffers.supply.told, buffers.supply.ended, buffers.supply.routed):
                told.zero_()  # that run had the number of the step to come
        torch.cuda.synchronize()

    def chosen(self, layer: int, stamp: int, idle: Idle) -> Chosen:
        """Wait until a layer has chosen."""
        while (found := arrived(self._seen[layer], stamp)) is None and idle():
            pass
        return found or self._await(self._seen[layer], layer, stamp)

    def guessed(self, layer: int, ahead: int, stamp: int) -> Ints:
        """Return what a layer behind will probably choose."""
        return self._await(self._guesses[layer, ahead - 1], layer, stamp).experts

    def _await(self, words: Ints, layer: int, stamp: int) -> Chosen:
        deadline = 0.0
        while True:
            for _ in range(_GLANCES):
                found = arrived(words, stamp)
                if found is not None:
                    return found
            now = time.monotonic()
            deadline = deadline or now + _PATIENCE_S
            if now > deadline:
                raise DeviceLost(f"layer {layer} of a step did not come to an end in {_PATIENCE_S:.0f} s")
            time.sleep(0)  # another thread's turn

    def begun(self, layer: int, stamp: int) -> list[int | None]:
        """Return the experts that were begun ahead."""
        return begun_of(self._await(self._told[layer], layer, stamp).experts)

    def ended(self, layer: int, stamp: int) -> list[float]:
        """Return how much of each guess has come."""
        return shares_of(self._await(self._ended[layer], layer, stamp).experts)

    def offer(self) -> None:
        """Let the device have spares."""
        supply = supply_of(self.buffers)
        self._copies.send(supply.spares.data_ptr(), supply.own_spares.data_ptr(), supply.spares.nbytes)

    def tell_hosted(self) -> None:
        """Let the device know what is in host memory."""
        supply, self._is_told = supply_of(self.buffers), True
        self._copies.send(supply.hosted.data_ptr(), supply.own_hosted.data_ptr(), supply.hosted.nbytes)

    def flush(self) -> None:
        """Wait until the device has what it was told."""
        self._copies.stream.synchronize()

    def tell(self, table: NDArray[np.int32]) -> None:
        """Let the device have the slot table."""
        self._send_news(self._message(table), len(table))

    def release(self, news: NDArray[np.int32], number: int) -> None:
        """Answer a layer that waits."""
        message = self._message(news)
        self._send_news(message, len(news))
        self._release(message, number)

    def _send_news(self, message: int, words: int) -> None:
        source = self._news.data_ptr() + message * self._news.stride(0) * 4
        self._copies.send(self.buffers.news.data_ptr(), source, words * 4)

    def _release(self, message: int, number: int) -> None:
        self._numbers[message] = number
        self._copies.send(self.buffers.released.data_ptr(), self._numbers.data_ptr() + 8 * message, 8)


class Eager:
    """Runs steps operation by operation, the host being the device; a layer is served while it runs."""

    def __init__(self, step: Step, buffers: Buffers) -> None:
        self.step, self.buffers = step, buffers
        self._launched: Callable[[Serve], Answer]

    def launch(self, words: Words, news: NDArray[np.int32] | None, *, service: Service) -> None:
        """Write what a step is told: it is run while it is followed."""
        buffers = self.buffers
        words.write(buffers.control.numpy(), with_addresses=True)
        if news is not None:
            buffers.news[: len(news)] = torch.from_numpy(news)
        tensors = [list(layer) for layer in zip(*(each.tensors for each in words.states), strict=True)]
        kv = buffers.key_values._replace(tensors=tensors)
        self._launched = lambda serve: self.step.run(kv, service=service, lacking=serve)

    def follow(self, serve: Serve) -> Answer:
        """Run a step."""
        return self._launched(serve)

    def end(self) -> None:
        """Do nothing: the step is over."""

    def abandon(self) -> None:
        """Do nothing: no step runs but one that is followed."""

    def chosen(self, layer: int, stamp: int, idle: Idle) -> Chosen:
        """Return what a layer has chosen."""
        while idle():
            pass
        return self._read(self.buffers.mail.ids[layer], layer, stamp)

    def guessed(self, layer: int, ahead: int, stamp: int) -> Ints:
        """Return what a layer behind will probably choose."""
        return self._read(self.buffers.mail.guesses[layer, ahead - 1], layer, stamp).experts

    def _read(self, words: torch.Tensor, layer: int, stamp: int) -> Chosen:
        found = arrived(words.numpy(), stamp)
        if found is None:
            raise DeviceLost(f"layer {layer} has not chosen yet")
        return found

    def begun(self, layer: int, stamp: int) -> list[int | None]:
        """Return the experts that were begun ahead."""
        return begun_of(self._read(supply_of(self.buffers).told[layer], layer, stamp).experts)

    def ended(self, layer: int, stamp: int) -> list[float]:
        """Return how much of each guess has come."""
        return shares_of(self._read(supply_of(self.buffers).ended[layer], layer, stamp).experts)

    def offer(self) -> None:
        """Let the device have spares."""
        supply = supply_of(self.buffers)
        supply.spares.copy_(supply.own_spares)

    def tell_hosted(self) -> None:
        """Let the device know what is in host memory."""
        supply = supply_of(self.buffers)
        supply.hosted.copy_(supply.own_hosted)

    def flush(self) -> None:
        """Wait until the device has what it was told: it has."""

    def tell(self, table: NDArray[np.int32]) -> None:
        """Let the device have the slot table."""
        self.buffers.news[: len(table)] = torch.from_numpy(table)

    def release(self, news: NDArray[np.int32], number: int) -> None:
        """Answer the layer that runs."""
        self.buffers.news.copy_(torch.from_numpy(news))
        self.buffers.released[0] = number


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
