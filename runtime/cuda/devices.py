"""Which device experts and trunk are on, and what is done when there is none, or it is lost: the processor takes over.

Decides what counts as a fault of a device rather than of the model. Must not know what runs there.
"""

import logging
import os

import torch

from runtime.errors import DeviceLost, InvalidInput

log = logging.getLogger(__name__)


def usable_device(name: str) -> tuple[str, str]:
    """Return the device to use, and why it is another than asked for ("" where it is not).

    Raises
    ------
    InvalidInput
        The name is none of a processor or CUDA device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidInput(f"{name!r} is no device; cpu, cuda or cuda:0 are") from error
    if device.type == "cpu":
        return "cpu", ""
    if device.type != "cuda":
        raise InvalidInput(f"{name!r} is no device that models are run on; cpu, cuda or cuda:0 are")
    why = _fault_of(device)
    if why:
        log.warning("%s cannot be used: %s; the processor computes instead", name, why)
        return "cpu", f"{name} cannot be used: {why}"
    return str(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)), ""


def _fault_of(device: torch.device) -> str:
    """Return what is wrong with a device; "" where nothing is."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} CUDA devices"
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        return first_words(error)
    return ""


def is_device_fault(error: BaseException) -> bool:
    """Whether an error means that a device has no memory left, or cannot be used any more."""
    kinds = (DeviceLost, torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "CUDA" in str(error))


def first_words(error: BaseException) -> str:
    """Return the first sentence of an error of torch, which may tell more than anybody wants to know."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def free_bytes(device: str) -> int:
    """Return the memory of a CUDA device that nobody uses."""
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(free)


def available_host_bytes() -> int:
    """Return the memory of this machine that nobody uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
