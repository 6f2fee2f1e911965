"""Small arrays between the host and a device, without either waiting where it need not. Decides nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def sent(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array of less than 64 KiB on a device, for what is launched there from now on."""
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array).to(device, non_blocking=True)  # the driver takes so little with it at once


def reading(tensor: torch.Tensor) -> Callable[[], NDArray[Any]]:
    """Begin to read a tensor as it is after what was launched so far; what is returned waits for that alone."""
    if tensor.device.type == "cpu":
        return lambda: np.array(tensor.numpy())
    copied = tensor.to("cpu", non_blocking=True)  # pinned by torch
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))

    def read() -> NDArray[Any]:
        event.synchronize()
        return copied.numpy()

    return read
