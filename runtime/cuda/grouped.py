"""A layer's experts computed together where they lie in a device's slots: two products for all, not two for each.

Decides when that can be done: all are at hand, as plain weights in 16 bits, in slots that lie near one another. A slot
of theirs is a group; slots between them are empty groups. Must not know whose rows they are.
Axes: R rows, D hidden, F ffn, G slots.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from runtime.slots import Residency

_MOST_GROUPS: Final = 1000  # of torch's grouped product


def grouped_answers(
    residency: Residency, layer: int, experts: Sequence[int], bounds: Sequence[int], gathered: torch.Tensor
) -> torch.Tensor | None:
    """Return what experts make of their rows, [R, D] in the rows' order; None, with nothing done, where they cannot.

    Parameters
    ----------
    bounds
        Where the rows of each expert start, and the end.
    gathered
        [R, D].
    """
    form = residency.layout.form
    is_plain = form.kind == "swiglu" and form.activation == "silu" and residency.packed is None
    if not is_plain or gathered.dtype != torch.bfloat16 or residency.layout.dtype != "bfloat16":
        return None
    copies = residency.take(layer, experts)
    if copies is None:
        return None
    try:
        slots = np.array([copy.slot for copy in copies])
        is_near = slots.max() - slots.min() < _MOST_GROUPS and all(copy.tier == "device" for copy in copies)
        return _answers(residency, slots, np.diff(bounds), gathered) if is_near else None
    finally:
        residency.end(layer, copies)


def _answers(
    residency: Residency, slots: NDArray[np.int64], sizes: NDArray[np.int64], gathered: torch.Tensor
) -> torch.Tensor:
    """Compute `sizes` rows each with the experts in `slots`."""
    first, device = int(slots.min()), gathered.device
    slot_of_row = np.repeat(slots - first, sizes)
    ends = torch.from_numpy(np.bincount(slot_of_row).cumsum().astype(np.int32)).to(device)
    gate_up, down = weights_by_slot(residency, first, len(ends))
    order = None
    if (np.diff(slot_of_row) < 0).any():
        order = torch.from_numpy(np.argsort(slot_of_row, kind="stable")).to(device)
        gathered = gathered[order]
    gate, up = functional.grouped_mm(gathered, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    made = functional.grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    return made if order is None else torch.empty_like(made).index_copy_(0, order, made)


def weights_by_slot(residency: Residency, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the weights in `count` slots from `first` on: gate_up [G, 2F, D] and down [G, D, F]."""
    memory, stride, starts = residency.inside.pool.lanes()
    gate_up, down = (
        memory.as_strided((count, *part.shape), (stride, part.shape[1], 1), first * stride + start)
        for part, start in zip(residency.layout.parts, starts, strict=True)
    )
    return gate_up, down
