"""Steps run operation by operation, the host being the device: what a device does, anywhere.

Decides nothing; must not know what is missing, or why.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cuda.buffers import Buffers, Chosen, arrived
from runtime.cuda.layers import Answer, Step
from runtime.cuda.runners import Idle, Ints, Serve, Words, begun_of, shares_of, supply_of
from runtime.cuda.supply import Service
from runtime.errors import DeviceLost


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
