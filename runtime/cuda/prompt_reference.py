"""The operations of a prompt's layers in plain torch: what `prompt_kernels` must compute.

Decides the arithmetic: the same roundings as transformers' modules and `runtime.experts`.
Axes: T tokens, K top-k, R = T K rows, E experts, D hidden, F ffn, H query and G key heads, d of a head.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional

from runtime.cuda.reference import add_norm, normed_heads, shared
from runtime.cuda.shapes import HeadNorms, Heads, Lanes, RouterShape

__all__ = ["add_norm", "arrange", "choose", "combine", "down", "gate_up", "shared", "turn"]


def turn(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None, heads: Heads
) -> torch.Tensor:
    """Norm and rotate queries and keys, [T, H + 2 G, d] in place; returns it."""
    whole = qkv.view(len(qkv), -1, heads.size)
    cos, sin = cos.view(len(qkv), 1, heads.size), sin.view(len(qkv), 1, heads.size)
    queries, keys, _ = whole.split([heads.queries, heads.kv, heads.kv], dim=1)
    for part, x in zip((queries, keys), normed_heads(queries, keys, norms), strict=True):
        first, second = x.chunk(2, dim=-1)
        part.copy_(x * cos + torch.cat((-second, first), dim=-1) * sin)
    return whole


def choose(logits: torch.Tensor, shape: RouterShape) -> torch.Tensor:
    """Choose experts by logits [T, E], and guess what the next layer will by those behind, if any.

    Returns
    -------
    torch.Tensor
        [2 or 3, T, K] int32: experts, best first; their weights, the bits of float32; the next layer's.
    """
    own, *ahead = logits.split(shape.experts, dim=1)
    weights, chosen = own.float().softmax(-1).topk(shape.top_k, dim=-1)
    if shape.is_normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    if shape.is_rounded:
        weights = weights.to(logits.dtype).float()
    guessed = [guess.topk(shape.top_k, dim=-1).indices.int() for guess in ahead[:1]]
    return torch.stack([chosen.int(), weights.contiguous().view(torch.int32), *guessed])


def arrange(chosen: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the rows of choices [T, K] by expert, [R] int32; `ends` [E] int32 takes where each expert's end."""
    flat = chosen.reshape(-1)
    ends.copy_(flat.bincount(minlength=len(ends)).cumsum(0))
    return flat.argsort(stable=True).int()


def gate_up(  # noqa: PLR0917
    x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor, lanes: Lanes, out: torch.Tensor
) -> None:
    """Compute what goes into the down projections, [R, F] by expert, of experts that have a slot, [E] int32."""
    top_k = len(order) // len(x)
    for rows, slot in _present(ends, slots):
        base = slot * lanes.stride + lanes.gate_up
        weight = lanes.memory[base : base + 2 * lanes.ffn * lanes.hidden].view(2 * lanes.ffn, lanes.hidden)
        gate, up = functional.linear(x[order[rows] // top_k], weight).chunk(2, dim=-1)
        out[rows] = functional.silu(gate) * up


def down(  # noqa: PLR0917
    active: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor, lanes: Lanes, out: torch.Tensor
) -> None:
    """Compute the experts' answers, [R, D] in the order of the rows, of experts that have a slot."""
    for rows, slot in _present(ends, slots):
        base = slot * lanes.stride + lanes.down
        weight = lanes.memory[base : base + lanes.hidden * lanes.ffn].view(lanes.hidden, lanes.ffn)
        out[order[rows].long()] = functional.linear(active[rows], weight)


def _present(ends: torch.Tensor, slots: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """Yield the rows and the slot of each expert that has both."""
    start = 0
    for end, slot in zip(ends.tolist(), slots.tolist(), strict=True):
        if slot >= 0 and end > start:
            yield slice(start, end), slot
        start = end


def combine(answers: torch.Tensor, weights: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of each token's answers [R, D] by its weights [T, K], [T, D], and what is beside them."""
    each = answers.view(*weights.shape, -1).float() * weights.float().unsqueeze(-1)
    total = each.sum(1).to(answers.dtype)
    return total if beside is None else total + beside
