"""What a node computes with: the device of its config for as long as that lasts, and the processor from then on.

Decides what is a fault of the device, what memory the processor has for what lay there, and with which words that is
said. What was in the device's memory is gone; whoever asks for the fall has the weights obtained anew. Must not know
sockets, epochs or sessions.
"""

import gc
import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch

from agent.settings import Settings
from runtime.cuda.devices import available_host_bytes, first_words, is_device_fault, usable_device
from runtime.errors import RuntimeFault
from runtime.models import Model
from runtime.predictors import read_uses
from runtime.reads import reads_of
from runtime.slots import Caching, Residency
from schemas.messages import TierBytes
from schemas.precision import Precision
from schemas.topology import TIERS
from schemas.units import format_bytes

log = logging.getLogger(__name__)

_SPARE_HOST: Final = 0.7  # of what is available: activations and everybody else need some


class Computing:
    """The device of one node and the experts on it. One thread lets it fall, others read.

    Attributes
    ----------
    device
        What computes now: cpu, or a CUDA device.
    fault
        Why it is not what the config asks for; "" where it is.
    memory
        Bytes that may be used by tier; what was a device's is the processor's memory after a fall, as far as there is.
    residency
        Replaced whole by a fall, and by another precision.
    precision
        In which experts are held.
    """

    def __init__(self, settings: Settings, model: Model, precision: Precision) -> None:
        self._settings = settings
        self._model = model
        self.precision = precision
        memory = settings.memory
        self._uses = read_uses(Path(settings.uses) if settings.uses is not None else None, model.spec)
        self.memory = TierBytes(device=memory.device, host=memory.host, disk=memory.disk)
        self.device, self.fault = usable_device(settings.torch_device)
        try:
            self.residency = self._make_residency(self.device)
        except RuntimeFault as error:
            if not self.is_fault(error):
                raise
            self._note(error)
            self.residency = self._make_residency(self.device)

    def _make_residency(self, device: str) -> Residency:
        settings, spec = self._settings, self._model.spec
        return Residency(
            self._model.layout,
            {tier: int(getattr(settings.memory, tier)) for tier in TIERS},  # reserves slots; `memory` may be less
            Path(settings.data) / "records",
            device=device,
            reads=reads_of(settings.reads),
            max_slots=spec.layers * spec.experts,
            caching=Caching(
                spec.layers,
                spec.experts,
                eviction=settings.eviction,
                uses=self._uses,
                prefetch=settings.prefetch,
                in_place=settings.in_place,
            ),
            precision=None if self.precision == "checkpoint" else self.precision,
        )

    @property
    def torch_device(self) -> str:
        """Where trunk and experts lie."""
        return str(self.residency.device)

    def is_fault(self, error: BaseException) -> bool:
        """Whether an error is the device's, so that the processor can do what it cannot."""
        return self.device != "cpu" and self.is_of_device(error)

    @staticmethod
    def is_of_device(error: BaseException) -> bool:
        """Whether an error is that of a device, perhaps one that is used no more."""
        return is_device_fault(error) or (error.__cause__ is not None and is_device_fault(error.__cause__))

    def fall(self, error: BaseException) -> None:
        """Let the processor take over, with nothing in memory yet. Modifies."""
        self._note(error)
        self.residency = self._make_residency(self.device)

    def hold_in(self, precision: Precision) -> None:
        """Hold experts in another precision, with nothing in memory yet. Modifies."""
        self.precision = precision
        inside = self.residency.inside
        for pool in (inside.pool, inside.host_pool):
            pool.vacate()  # a device need not have room for the slots of both
        self.residency = self._make_residency(self.device)

    def _note(self, error: BaseException) -> None:
        """Note why the device is not used, and what memory there is without it."""
        self.fault = f"{self.device} failed: {first_words(error.__cause__ or error)}"
        log.warning("%s; the processor computes instead", self.fault)
        self.device = "cpu"
        there = int(_SPARE_HOST * available_host_bytes())
        wanted = self.memory.device
        if wanted > there:
            log.warning("of %s of the device, %s of memory are available", *map(format_bytes, (wanted, there)))
            self.memory = self.memory.model_copy(update={"device": there})


def release_device_memory() -> None:
    """Give back what nobody uses of a device's memory, as far as it still answers."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
