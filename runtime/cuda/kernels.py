"""The operations of a decode step as Triton kernels: one launch each, weights read where they lie in their slots.

Decides nothing that `reference` does not say in plain torch: the same arithmetic, rounded at the same places, summed in
another order. Here are those of attention; `product_kernels`, `expert_kernels` and `fetch_kernels` have others.
Imported only where there is a CUDA device and Triton. Axes: B tokens, D hidden, H heads, d head size.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from runtime.cuda.buffers import KeyValues
from runtime.cuda.early_kernels import early, follow
from runtime.cuda.expert_kernels import down, gate_up, route, wait
from runtime.cuda.fetch_kernels import bring, bring_ahead, join, join_all
from runtime.cuda.product_kernels import add_norm, normed_product, product, shared
from runtime.cuda.shapes import ATTENTION_SPLITS, HeadNorms, Heads

__all__ = [
    "add_norm",
    "angles",
    "attend",
    "bring",
    "bring_ahead",
    "down",
    "gate_up",
    "join",
    "join_all",
    "normed_product",
    "product",
    "rotate_store",
    "route",
    "shared",
    "wait",
]


@triton.jit
def _angles(frequencies, positions, cos_out, sin_out, scaling, half, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < half
    turned = tl.load(frequencies + cols, mask=inside, other=0.0) * tl.load(positions + row).to(tl.float32)
    cos = (tl.cos(turned) * scaling).to(cos_out.dtype.element_ty)
    sin = (tl.sin(turned) * scaling).to(sin_out.dtype.element_ty)
    at = row * 2 * half + cols
    tl.store(cos_out + at, cos, mask=inside)
    tl.store(cos_out + half + at, cos, mask=inside)
    tl.store(sin_out + at, sin, mask=inside)
    tl.store(sin_out + half + at, sin, mask=inside)


def angles(rotary: Any, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [B, 1, d] of rotary embeddings whose frequencies stay as they are."""
    half = len(rotary.inv_freq)
    made = torch.empty((2, len(positions), 1, 2 * half), dtype=dtype, device=positions.device)
    _angles[(len(positions),)](
        rotary.inv_freq, positions, made[0], made[1], rotary.attention_scaling, half,
        BLOCK=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return made[0], made[1]


@triton.jit
def _rotate_store(
    qkv, cos, sin, q_norm, k_norm, addresses, strides, positions, q_out, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr, WHOLE: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    follow(IS_EARLY)
    row = tl.program_id(0)
    head = tl.program_id(1)
    size: tl.constexpr = 2 * HALF
    cols = tl.arange(0, HALF)
    source = qkv + row * (Q_HEADS + 2 * KV_HEADS) * size + head * size
    first = tl.load(source + cols)
    second = tl.load(source + HALF + cols)
    dtype = first.dtype
    if head < Q_HEADS + KV_HEADS:
        if HAS_NORM:
            a = first.to(tl.float32)
            b = second.to(tl.float32)
            norm = k_norm
            if head < Q_HEADS:
                norm = q_norm
            if WHOLE:  # each program looks at all heads: they are few, and one launch less
                begin = tl.where(head < Q_HEADS, 0, Q_HEADS)
                count = tl.where(head < Q_HEADS, Q_HEADS, KV_HEADS) * size
                every = tl.arange(0, WHOLE)
                wide = tl.load(source + (begin - head) * size + every, mask=every < count, other=0.0).to(tl.float32)
                scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / count + eps)
                norm += (head - begin) * size
            else:
                scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / size + eps)
            first = ((a * scale).to(dtype).to(tl.float32) * tl.load(norm + cols).to(tl.float32)).to(dtype)
            second = ((b * scale).to(dtype).to(tl.float32) * tl.load(norm + HALF + cols).to(tl.float32)).to(dtype)
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        turn = row * size
        cos_a = tl.load(cos + turn + cols).to(tl.float32)
        cos_b = tl.load(cos + turn + HALF + cols).to(tl.float32)
        sin_a = tl.load(sin + turn + cols).to(tl.float32)
        sin_b = tl.load(sin + turn + HALF + cols).to(tl.float32)
        first = ((a * cos_a).to(dtype).to(tl.float32) + (-b * sin_a).to(dtype).to(tl.float32)).to(dtype)
        second = ((b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)).to(dtype)
    if head < Q_HEADS:
        target = q_out + (row * Q_HEADS + head) * size
        tl.store(target + cols, first)
        tl.store(target + HALF + cols, second)
    else:
        which = (head - Q_HEADS) // KV_HEADS
        kv_head = (head - Q_HEADS) % KV_HEADS
        base = tl.load(addresses + 2 * row + which).to(tl.pointer_type(dtype))
        place = base + kv_head * tl.load(strides + row) + tl.load(positions + row) * size
        tl.store(place + cols, first)
        tl.store(place + HALF + cols, second)


def rotate_store(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None, heads: Heads, kv: KeyValues,
    layer: int,
) -> torch.Tensor:  # fmt: skip
    """Norm and rotate queries and keys, append keys and values to the caches; returns the queries [B, H, d]."""
    rows = qkv.shape[0]
    queries = torch.empty((rows, heads.queries, heads.size), dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm, eps, is_whole = norms or HeadNorms(qkv, qkv, 0.0, is_whole=False)
    most = triton.next_power_of_2(max(heads.queries, heads.kv) * heads.size)
    _rotate_store[(rows, heads.queries + 2 * heads.kv)](
        qkv, cos, sin, q_norm, k_norm, kv.addresses[layer], kv.strides, kv.positions, queries, eps,
        Q_HEADS=heads.queries, KV_HEADS=heads.kv, HALF=heads.size // 2, HAS_NORM=norms is not None,
        WHOLE=most if is_whole else 0, num_warps=4 if is_whole else 1, **early(qkv.device),
    )  # fmt: skip
    return queries


@triton.jit
def _attend(
    queries, addresses, strides, positions, partial, scaling,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    follow(IS_EARLY)
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    dtype = queries.dtype.element_ty
    length = tl.load(positions + row) + 1
    stride = kv_head * tl.load(strides + row)
    keys = tl.load(addresses + 2 * row).to(tl.pointer_type(dtype)) + stride
    values = tl.load(addresses + 2 * row + 1).to(tl.pointer_type(dtype)) + stride
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)
    members = tl.arange(0, ROWS)
    cols = tl.arange(0, SIZE)
    heads = kv_head * GROUP + members
    is_head = members < GROUP
    q = tl.load(
        queries + (row * KV_HEADS * GROUP + heads[:, None]) * SIZE + cols[None, :], mask=is_head[:, None], other=0.0
    )
    best = tl.full([ROWS], -1e30, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < end
        k = tl.load(keys + places[:, None] * SIZE + cols[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(inside[None, :], scores, -1e30)
        top = tl.maximum(best, tl.max(scores, axis=1))
        fade = tl.exp(best - top)
        p = tl.where(inside[None, :], tl.exp(scores - top[:, None]), 0.0)
        mass = mass * fade + tl.sum(p, axis=1)
        v = tl.load(values + places[:, None] * SIZE + cols[None, :], mask=inside[:, None], other=0.0)
        sums = sums * fade[:, None] + tl.dot(p.to(dtype), v, input_precision="ieee")
        best = top
    target = partial + ((row * KV_HEADS * GROUP + heads) * SPLITS + split) * (SIZE + 2)
    tl.store(target[:, None] + cols[None, :], sums, mask=is_head[:, None])
    tl.store(target + SIZE, best, mask=is_head)
    tl.store(target + SIZE + 1, mass, mask=is_head)


@triton.jit
def _join(partial, out, SPLITS: tl.constexpr, SIZE: tl.constexpr, IS_EARLY: tl.constexpr):
    follow(IS_EARLY)
    head = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    cols = tl.arange(0, SIZE)
    source = partial + (head * SPLITS + splits) * (SIZE + 2)
    best = tl.load(source + SIZE)
    mass = tl.load(source + SIZE + 1)
    scale = tl.exp(best - tl.max(best, axis=0))
    sums = tl.load(source[:, None] + cols[None, :])
    joined = tl.sum(sums * scale[:, None], axis=0) / tl.sum(mass * scale, axis=0)
    tl.store(out + head * SIZE + cols, joined.to(out.dtype.element_ty))


def attend(queries: torch.Tensor, heads: Heads, kv: KeyValues, layer: int) -> torch.Tensor:
    """Attend to all tokens up to each row's own, [B, H * d]."""
    rows = queries.shape[0]
    group = heads.queries // heads.kv
    splits = ATTENTION_SPLITS
    partial = torch.empty((rows, heads.queries, splits, heads.size + 2), dtype=torch.float32, device=queries.device)
    _attend[(rows, heads.kv, splits)](
        queries, kv.addresses[layer], kv.strides, kv.positions, partial, heads.scaling,
        KV_HEADS=heads.kv, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), SIZE=heads.size,
        SPLITS=splits, BLOCK=32, num_warps=4, **early(queries.device),
    )  # fmt: skip
    out = torch.empty((rows, heads.queries * heads.size), dtype=queries.dtype, device=queries.device)
    _join[(rows * heads.queries,)](partial, out, SPLITS=splits, SIZE=heads.size, num_warps=2, **early(queries.device))
    return out
