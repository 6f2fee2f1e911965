"""What of a model the kernels must know: sizes, and where in a slot an expert's matrices lie.

Pure values. Must not know a device.
"""

from typing import Final, NamedTuple

import torch

ATTENTION_SPLITS: Final = 16  # so many programs share the tokens that one head attends to; a power of two


class Scale(NamedTuple):
    """An RMS norm."""

    weight: torch.Tensor
    eps: float


class Heads(NamedTuple):
    """Attention heads of a layer."""

    queries: int
    kv: int
    size: int
    scaling: float


class HeadNorms(NamedTuple):
    """RMS norms of queries and keys, before they are turned.

    Attributes
    ----------
    queries, keys
        Weights, [d] each; [H d] and [G d] where all heads are normed as one vector (`is_whole`).
    """

    queries: torch.Tensor
    keys: torch.Tensor
    eps: float
    is_whole: bool


class SharedExpert(NamedTuple):
    """An expert that every token uses, whose answer is weighted by the sigmoid of a score of its own.

    Attributes
    ----------
    gate_up, down
        [2 S, D] and [D, S].
    weigh
        [1, D], what gives the score.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    weigh: torch.Tensor


class RouterShape(NamedTuple):
    """A softmax router; `is_rounded`: its weights are rounded to the model's dtype."""

    experts: int
    top_k: int
    is_normalised: bool
    is_rounded: bool


class Lanes(NamedTuple):
    """All slots of a pool as one vector of weights.

    Attributes
    ----------
    memory
        [slots * stride] in the records' dtype.
    stride, gate_up, down
        Weights between two slots, and from the start of a slot to its gate_up [2F, D] and down [D, F].
    """

    memory: torch.Tensor
    stride: int
    gate_up: int
    down: int
    hidden: int
    ffn: int
