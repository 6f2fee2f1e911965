"""How a step is run: as a captured graph on a CUDA device, or operation by operation where the host is the device.

Decides when a graph is captured: at the first step of its kind. Flow: control words and slot table → the step is
launched → the host watches what is `chosen`, and answers a layer that lacks experts with `release`. Must not know what
is missing, or why.
"""

import time
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.buffers import Buffers, Chosen, arrived
from runtime.cuda.copies import DeviceCopies
from runtime.cuda.layers import Step
from runtime.errors import DeviceLost

_PATIENCE_S: Final = 60.0
_GLANCES: Final = 256
_FOR_EVER: Final = 1 << 62

Ints = NDArray[np.int64]
Serve = Callable[[int], None]
Idle = Callable[[], bool]
"""Does some work, unless there is none."""
Caches = list[list[tuple[torch.Tensor, torch.Tensor]]]
"""Keys and values [H, S, d] by layer and token."""


class Runner(Protocol):
    """Runs steps of one number of tokens, one at a time."""

    buffers: Buffers
    step: Step

    def run(
        self, control: Ints, news: NDArray[np.int32] | None, caches: Caches, *, waits: bool, serve: Serve
    ) -> torch.Tensor:
        """Run a step; what it launches comes behind what was launched before. Modifies the caches.

        Parameters
        ----------
        control, news
            Of `Buffers`; news only where it has changed.
        waits
            Whether layers may lack experts.
        serve
            Called with each layer when it is about to choose; it asks for what is `chosen` and may `release` it.

        Returns
        -------
        torch.Tensor
            The normed hidden states, [B, D].
        """
        ...

    def chosen(self, layer: int, stamp: int, idle: Idle) -> Chosen:
        """Wait until a layer has chosen, doing what can be done meanwhile. Raises `DeviceLost`."""
        ...

    def guessed(self, layer: int, ahead: int, stamp: int) -> Ints:
        """Return what the layer so far behind one that has chosen will probably choose, [B, K]."""
        ...

    def tell(self, table: NDArray[np.int32]) -> None:
        """Let the device have the slot table behind what was launched on the copy stream before. Modifies."""
        ...

    def release(self, news: NDArray[np.int32], number: int) -> None:
        """Answer a layer that waits: what was launched on the copy stream before is there then. Modifies."""
        ...


class Graphs:
    """Runs steps as graphs, one for steps that may wait and one for those that cannot."""

    def __init__(self, step: Step, buffers: Buffers, copies: DeviceCopies) -> None:
        self.step, self.buffers = step, buffers
        self._copies = copies
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        # what is sent is read later, behind copies that take their time: each message has memory of its own, and there
        # are no more messages under way than two for each layer of a step, and of the one before
        messages = 4 * len(buffers.slots) + 8
        self._control = torch.zeros((2, buffers.control.numel()), dtype=torch.int64).pin_memory()
        self._news = torch.zeros((messages, buffers.news.numel()), dtype=torch.int32).pin_memory()
        self._numbers = torch.zeros(messages, dtype=torch.int64).pin_memory()
        self._controls, self._messages = self._control.numpy(), self._news.numpy()
        self._next = 0
        self._seen: Ints = buffers.mail.ids.numpy()
        self._guesses: Ints = buffers.mail.guesses.numpy()

    def run(
        self, control: Ints, news: NDArray[np.int32] | None, _: Caches, *, waits: bool, serve: Serve
    ) -> torch.Tensor:
        """Run a step."""
        with torch.cuda.device(self.buffers.control.device):
            return self._run(control, news, waits, serve)

    def _run(self, control: Ints, news: NDArray[np.int32] | None, waits: bool, serve: Serve) -> torch.Tensor:
        buffers = self.buffers
        if waits not in self._graphs:
            self._capture(control, waits)
        turn = int(control[0]) % 2
        self._controls[turn] = control
        buffers.control.copy_(self._control[turn], non_blocking=True)
        if news is not None:
            buffers.news.copy_(self._news[self._message(news)], non_blocking=True)
        graph, output = self._graphs[waits]
        graph.replay()
        answer = output.clone()
        try:
            for layer in range(len(buffers.slots)):
                serve(layer)
        except BaseException:
            self._abandon()
            raise
        self._copies.fences.read_all()
        torch.cuda.current_stream().wait_stream(self._copies.stream)
        return answer

    def _message(self, words: NDArray[np.int32]) -> int:
        """Write words into the next message; returns its number."""
        number = self._next = (self._next + 1) % len(self._messages)
        self._messages[number, : len(words)] = words
        return number

    def _abandon(self) -> None:
        """Let a step come to its end without the experts that it lacks."""
        self._release(0, _FOR_EVER)
        torch.cuda.synchronize()
        self.buffers.released.zero_()

    def _capture(self, control: Ints, waits: bool) -> None:
        """Capture a graph, after a run that compiles its kernels and computes nothing that lasts.

        That run has the positions of the step to come, whose keys and values it writes as the step will, and a
        table in which every expert is in slot 0, so that it waits for nobody.
        """
        buffers = self.buffers
        before = buffers.news.clone()
        buffers.news.zero_()
        buffers.control.copy_(torch.from_numpy(control))
        side = torch.cuda.Stream(buffers.control.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step.run(buffers.key_values, waits=waits)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.step.run(buffers.key_values, waits=waits)
        self._graphs[waits] = graph, output
        buffers.news.copy_(before)
        buffers.mail.ids.zero_()
        buffers.mail.guesses.zero_()
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

    def run(
        self, control: Ints, news: NDArray[np.int32] | None, caches: Caches, *, waits: bool, serve: Serve
    ) -> torch.Tensor:
        """Run a step."""
        buffers = self.buffers
        buffers.control.copy_(torch.from_numpy(control))
        if news is not None:
            buffers.news.copy_(torch.from_numpy(news))
        kv = buffers.key_values._replace(tensors=caches)
        return self.step.run(kv, waits=waits, lacking=serve)

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

    def tell(self, table: NDArray[np.int32]) -> None:
        """Let the device have the slot table."""
        self.buffers.news[: len(table)] = torch.from_numpy(table)

    def release(self, news: NDArray[np.int32], number: int) -> None:
        """Answer the layer that runs."""
        self.buffers.news.copy_(torch.from_numpy(news))
        self.buffers.released[0] = number
