"""Kernels that begin while the one before them ends: programmatic dependent launch, on devices that can (sm_90 on).

Decides the one rule that makes it safe. A kernel launched like this calls `follow` before it reads what the one before
it writes, and before it writes anything; only then may the next one begin. So what it reads earlier may come from any
kernel but the one right before: weights, and what was ready when that one went on.
"""

from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl

_LEAST: Final = (9, 0)


@triton.jit
def follow(IS_EARLY: tl.constexpr):
    """Wait until the kernel before has ended; the next one may begin from then on. More than once does no harm."""
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def early(device: torch.device, *, waits_for_others: bool = False) -> dict[str, bool]:
    """Return how to launch a kernel that calls `follow`.

    Parameters
    ----------
    waits_for_others
        It comes behind kernels of another stream, too: it begins when all have ended, and the next one early again.
    """
    is_early = _can(device)
    return {"IS_EARLY": True, "launch_pdl": True} if is_early and not waits_for_others else {"IS_EARLY": is_early}


@cache
def _can(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST
