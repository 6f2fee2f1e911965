"""How a step is run: as a captured graph on a CUDA device, or operation by operation where the host is the device.

Decides when a graph is captured: at the first step of its kind. Flow: control words and slot table → the step is
launched → the host watches `ids` come in, and answers a layer that lacks experts with `release`. Must not know what is missing, or why.
"""

import time
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.buffers import Buffers, arrived
from runtime.cuda.copies import DeviceCopies
from runtime.cuda.layers import Step
from runtime.errors import DeviceLost

_PATIENCE_S: Final = 60.0
_GLANCES: Final = 256
_FOR_EVER: Final = 1 << 62

Ints = NDArray[np.int64]
Serve = Callable[[int], None]
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
            Called with each layer when it is about to choose; it asks for `ids` and may `release` it.

        Returns
        -------
        torch.Tensor
            The normed hidden states, [B, D].
        """
        ...

    def ids(self, layer: int, stamp: int) -> Ints:
        """Wait until a layer has chosen; returns the experts, [B, K]. Raises `DeviceLost`."""
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
        self._control = torch.zeros_like(buffers.control, device="cpu").pin_memory()
        self._news = torch.zeros_like(buffers.news, device="cpu").pin_memory()
        self._released = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._seen: Ints = buffers.mail.ids.numpy()

    def run(
        self, control: Ints, news: NDArray[np.int32] | None, _: Caches, *, waits: bool, serve: Serve
    ) -> torch.Tensor:
        """Run a step."""
        buffers = self.buffers
        if waits not in self._graphs:
            self._capture(control, waits)
        self._control.numpy()[:] = control
        buffers.control.copy_(self._control, non_blocking=True)
        if news is not None:
            self._news.numpy()[:] = news
            buffers.news.copy_(self._news, non_blocking=True)
        graph, output = self._graphs[waits]
        graph.replay()
        try:
            for layer in range(len(buffers.slots)):
                serve(layer)
        except BaseException:
            self._abandon()
            raise
        answer = output.clone()
        self._copies.fences.read_all()
        torch.cuda.current_stream().wait_stream(self._copies.stream)
        return answer

    def _abandon(self) -> None:
        """Let a step come to its end without the experts that it lacks."""
        self._send_release(_FOR_EVER)
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
        torch.cuda.synchronize()

    def ids(self, layer: int, stamp: int) -> Ints:
        """Wait until a layer has chosen."""
        words = self._seen[layer]
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

    def release(self, news: NDArray[np.int32], number: int) -> None:
        """Answer a layer that waits."""
        self._news.numpy()[:] = news
        with torch.cuda.stream(self._copies.stream):
            self.buffers.news.copy_(self._news, non_blocking=True)
        self._send_release(number)

    def _send_release(self, number: int) -> None:
        self._released[0] = number
        with torch.cuda.stream(self._copies.stream):
            self.buffers.released.copy_(self._released, non_blocking=True)


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

    def ids(self, layer: int, stamp: int) -> Ints:
        """Return what a layer has chosen."""
        found = arrived(self.buffers.mail.ids[layer].numpy(), stamp)
        if found is None:
            raise DeviceLost(f"layer {layer} has not chosen yet")
        return found

    def release(self, news: NDArray[np.int32], number: int) -> None:
        """Answer the layer that runs."""
        self.buffers.news.copy_(torch.from_numpy(news))
        self.buffers.released[0] = number
