"""Steps run as captured graphs on a CUDA device.

Decides when a graph is captured: at the first step of its kind. Must not know what is missing, or why.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.buffers import Buffers, Chosen, arrived
from runtime.cuda.copies import DeviceCopies
from runtime.cuda.layers import Answer, Step
from runtime.cuda.runners import Idle, Ints, Serve, Words, begun_of, shares_of, supply_of
from runtime.cuda.supply import Service
from runtime.errors import DeviceLost

_PATIENCE_S: Final = 60.0
_GLANCES: Final = 256
_FOR_EVER: Final = 1 << 62


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
            supply = buffers.supply
            for told in (supply.told, supply.ended, supply.routed, supply.stopped):
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
