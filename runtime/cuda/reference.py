"""The operations of a decode step in plain torch: what `kernels` must compute, and what runs where there is no Triton.

Decides the arithmetic: the same roundings as transformers' modules and `runtime.experts`. A layer that lacks experts is
the caller's business between `route` and `down`: nothing here waits.
"""

from typing import Any

import torch
from torch.nn import functional

from runtime.cuda.buffers import FOUND, STAMP, Buffers, KeyValues
from runtime.cuda.shapes import Heads, Lanes, RouterShape, Scale
from runtime.errors import RuntimeFault


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMS norm of residual + delta, and that sum, [B, D] each."""
    total = residual if delta is None else residual + delta
    return _norm(total, weight, eps), total


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x times the transpose of a weight [N, D]: [B, N]."""
    return functional.linear(x, weight)


def normed_product(
    residual: torch.Tensor, delta: torch.Tensor | None, norm: Scale, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the product [B, N] of the RMS norm of residual + delta with a weight [N, D], that norm, and that sum."""
    normed, total = add_norm(residual, delta, *norm)
    return functional.linear(normed, weight), normed, total


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_store(  # noqa: PLR0917
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: Any, heads: Heads, kv: KeyValues, layer: int
) -> torch.Tensor:
    """Norm and rotate queries and keys, append keys and values to the caches; returns the queries [B, H, d]."""
    sizes = [heads.queries, heads.kv, heads.kv]
    queries, keys, values = qkv.view(len(qkv), -1, heads.size).split(sizes, dim=1)
    if norms is not None:
        q_norm, k_norm, eps = norms
        queries, keys = _norm(queries, q_norm, eps), _norm(keys, k_norm, eps)
    cos, sin = cos.view(len(qkv), 1, heads.size), sin.view(len(qkv), 1, heads.size)
    keys = _rotated(keys, cos, sin)
    for row, position in enumerate(kv.positions.tolist()):
        all_keys, all_values = _tensors(kv)[layer][row]
        all_keys[:, position], all_values[:, position] = keys[row], values[row]
    return _rotated(queries, cos, sin)


def attend(queries: torch.Tensor, heads: Heads, kv: KeyValues, layer: int) -> torch.Tensor:
    """Attend to all tokens up to each row's own, [B, H * d]."""
    rows = []
    for row, position in enumerate(kv.positions.tolist()):
        keys, values = (each[None, :, : position + 1] for each in _tensors(kv)[layer][row])
        rows.append(
            functional.scaled_dot_product_attention(
                queries[row][None, :, None], keys, values, scale=heads.scaling, enable_gqa=heads.queries != heads.kv
            ).reshape(1, -1)
        )
    return torch.cat(rows)


def _tensors(kv: KeyValues) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    if kv.tensors is None:
        raise RuntimeFault("plain torch cannot read a cache by its address; hand the caches over themselves")
    return kv.tensors


def route(logits: torch.Tensor, shape: RouterShape, buffers: Buffers, layer: int) -> None:
    """Choose experts, look their slots up, tell the host; guess likewise from logits of layers after, behind [B, E]."""
    scores = logits[:, : shape.experts].float().softmax(-1)
    weights, chosen = scores.topk(shape.top_k, dim=-1)
    if shape.is_normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    if shape.is_rounded:
        weights = weights.to(logits.dtype)
    found = buffers.table[layer][chosen]
    buffers.slots[layer], buffers.first[layer], buffers.weights[layer] = found, found, weights.float()
    mail = buffers.mail
    mail.scores[layer], mail.weights[layer] = scores, weights.float()
    mail.ids[layer] = buffers.stamp * STAMP + (found >= 0) * FOUND + chosen
    for ahead, guess in enumerate(logits.split(shape.experts, dim=1)[1:]):
        mail.guesses[layer, ahead] = buffers.stamp * STAMP + guess.topk(shape.top_k, dim=-1).indices


def wait(buffers: Buffers, layer: int) -> None:
    """Take the host's slots where the layer lacked experts; the host has answered before."""
    if (buffers.slots[layer] < 0).any():
        shape = buffers.slots[layer].shape
        buffers.slots[layer], buffers.weights[layer] = (
            buffers.inbox_slots.view(shape),
            buffers.inbox_weights.view(shape),
        )


def gate_up(x: torch.Tensor, lanes: Lanes, buffers: Buffers, layer: int, out: torch.Tensor, *, late: bool) -> None:
    """Compute what goes into the down projections, [B, K, F], of experts at hand, or of those that came late."""
    for row, place, slot in _wanted(buffers, layer, late=late):
        base = slot * lanes.stride + lanes.gate_up
        weight = lanes.memory[base : base + 2 * lanes.ffn * lanes.hidden].view(2 * lanes.ffn, lanes.hidden)
        gate, up = functional.linear(x[row], weight).chunk(2)
        out[row, place] = functional.silu(gate) * up


def down(active: torch.Tensor, lanes: Lanes, buffers: Buffers, layer: int) -> torch.Tensor:
    """Return the weighted sum of the experts' answers, [B, D]."""
    total = torch.zeros((len(active), lanes.hidden), dtype=torch.float32, device=active.device)
    for row, place, slot in _wanted(buffers, layer, late=None):
        base = slot * lanes.stride + lanes.down
        weight = lanes.memory[base : base + lanes.hidden * lanes.ffn].view(lanes.hidden, lanes.ffn)
        total[row] += functional.linear(active[row, place], weight).float() * buffers.weights[layer, row, place]
    return total.to(active.dtype)


def _wanted(buffers: Buffers, layer: int, *, late: bool | None) -> list[tuple[int, int, int]]:
    """Return (row, place, slot) of what is to be computed: all, or only what came late, or what did not."""
    slots, first = buffers.slots[layer].tolist(), buffers.first[layer].tolist()
    return [
        (row, place, slot)
        for row, (now, then) in enumerate(zip(slots, first, strict=True))
        for place, (slot, before) in enumerate(zip(now, then, strict=True))
        if slot >= 0 and (late is None or (before < 0) == late)
    ]
