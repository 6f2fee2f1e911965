"""How many bytes an expert takes in memory, by the precision in which a node holds it.

Decides sizes from shapes alone, as `runtime.precision` packs: from a checkpoint's headers, or, where only counts are
known, as of a gated network without biases. Must not know who holds what in which precision.
"""

import math
from collections.abc import Iterable, Mapping

from schemas.checkpoint import Checkpoint
from schemas.model import DTYPE_ITEMSIZE, HeldDtype, ModelSpec
from schemas.precision import BIASES, LOW_PRECISIONS, LowPrecision, Precision, packed_matrix_bytes

ExpertSizes = Mapping[Precision, int]
"""Bytes of one expert by precision; a precision that does not fit the model is left out."""


def sizes_of_spec(model: ModelSpec) -> ExpertSizes:
    """Return the sizes of experts of which only the bytes are known: three matrices of D × F and no more."""
    elements, hidden = model.expert_bytes // model.itemsize, model.hidden_size
    found: dict[Precision, int] = {"checkpoint": model.expert_bytes}
    ffn, rest = divmod(elements, 3 * hidden)
    if rest == 0 and ffn:
        matrices = ((2 * ffn * hidden, hidden), (hidden * ffn, ffn))
        found |= _known({low: _sum(packed_matrix_bytes(*each, low) for each in matrices) for low in LOW_PRECISIONS})
    return found


def sizes_of_checkpoint(checkpoint: Checkpoint, dtype: HeldDtype) -> ExpertSizes:
    """Return the sizes of a checkpoint's experts whose weights are otherwise held in `dtype`."""
    parts = next(iter(checkpoint.expert_tensors.values()))
    held = checkpoint.model_spec.held_as(dtype)
    axis = 0 if checkpoint.family == "gpt_oss" else 1
    itemsize = DTYPE_ITEMSIZE[checkpoint.dtype if dtype == "checkpoint" else dtype]

    def packed(low: LowPrecision) -> int | None:
        sizes: list[int | None] = []
        for name, entry in parts.items():
            elements = math.prod(entry.shape)
            is_bias = name in BIASES
            sizes.append(elements * itemsize if is_bias else packed_matrix_bytes(elements, entry.shape[axis], low))
        return _sum(sizes)

    found: dict[Precision, int] = {"checkpoint": held.expert_bytes}
    return found | _known({low: packed(low) for low in LOW_PRECISIONS})


def _sum(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)


def _known(sizes: Mapping[LowPrecision, int | None]) -> dict[Precision, int]:
    return {low: size for low, size in sizes.items() if size is not None}
