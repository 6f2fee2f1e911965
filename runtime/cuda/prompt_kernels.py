"""The operations of a prompt's layers as Triton kernels: few launches, experts read by slot where they lie.

Decides nothing that `prompt_reference` does not say. Rows are not moved: a row (one token at one expert) is read and
written through `order`, which lists the rows by expert. Imported only where there is a CUDA device and Triton.
Axes: T tokens, K top-k, R = T K rows, E experts, D hidden, F ffn, H query and G key heads, d of a head.
"""

from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl

from runtime.cuda.choice_kernels import best_of, weights_of
from runtime.cuda.product_kernels import add_norm
from runtime.cuda.reference import shared
from runtime.cuda.shapes import HeadNorms, Heads, Lanes, RouterShape
from runtime.cuda.tiles import down_tiles, gate_up_tiles

__all__ = ["add_norm", "arrange", "choose", "combine", "down", "gate_up", "shared", "turn"]

_NOBODY: Final = 1 << 30
_LEAST_MEMORY: Final = 64 << 10  # of devices that say nothing


@triton.jit
def _turn(
    qkv, cos, sin, q_norm, k_norm, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    heads = part * BLOCK + tl.arange(0, BLOCK)
    is_head = (heads < Q_HEADS + KV_HEADS)[:, None]
    if IS_WHOLE:  # one program has all query heads, the other all key heads
        heads = part * Q_HEADS + tl.arange(0, BLOCK)
        is_head = (heads < Q_HEADS + part * KV_HEADS)[:, None]
    size: tl.constexpr = 2 * HALF
    cols = tl.arange(0, HALF)
    place = qkv + row * (Q_HEADS + 2 * KV_HEADS) * size + heads[:, None] * size + cols[None, :]
    first = tl.load(place, mask=is_head, other=0.0)
    second = tl.load(place + HALF, mask=is_head, other=0.0)
    dtype = first.dtype
    if HAS_NORM:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        mass = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if IS_WHOLE:
            scale = tl.rsqrt(tl.sum(mass, axis=0) / (tl.where(part == 0, Q_HEADS, KV_HEADS) * size) + eps)
            weight = k_norm
            if part == 0:
                weight = q_norm
            weight += (heads - part * Q_HEADS)[:, None] * size + cols[None, :]
            of_first = tl.load(weight, mask=is_head, other=0.0)
            of_second = tl.load(weight + HALF, mask=is_head, other=0.0)
        else:
            scale = tl.rsqrt(mass / size + eps)[:, None]
            is_query = (heads < Q_HEADS)[:, None]
            of_first = tl.where(is_query, tl.load(q_norm + cols)[None, :], tl.load(k_norm + cols)[None, :])
            behind = HALF + cols
            of_second = tl.where(is_query, tl.load(q_norm + behind)[None, :], tl.load(k_norm + behind)[None, :])
        first = ((a * scale).to(dtype).to(tl.float32) * of_first.to(tl.float32)).to(dtype)
        second = ((b * scale).to(dtype).to(tl.float32) * of_second.to(tl.float32)).to(dtype)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    angle = row * size + cols
    cos_a = tl.load(cos + angle).to(tl.float32)[None, :]
    cos_b = tl.load(cos + angle + HALF).to(tl.float32)[None, :]
    sin_a = tl.load(sin + angle).to(tl.float32)[None, :]
    sin_b = tl.load(sin + angle + HALF).to(tl.float32)[None, :]
    first = ((a * cos_a).to(dtype).to(tl.float32) + (-b * sin_a).to(dtype).to(tl.float32)).to(dtype)
    second = ((b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)).to(dtype)
    tl.store(place, first, mask=is_head)
    tl.store(place + HALF, second, mask=is_head)


def turn(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None, heads: Heads
) -> torch.Tensor:
    """Norm and rotate queries and keys, [T, H + 2 G, d] in place; returns it."""
    q_norm, k_norm, eps, is_whole = norms or HeadNorms(qkv, qkv, 0.0, is_whole=False)
    block = min(16, triton.next_power_of_2(heads.queries + heads.kv))
    parts = triton.cdiv(heads.queries + heads.kv, block)
    if is_whole:
        block, parts = triton.next_power_of_2(max(heads.queries, heads.kv)), 2
    _turn[(len(qkv), parts)](
        qkv, cos, sin, q_norm, k_norm, eps, Q_HEADS=heads.queries, KV_HEADS=heads.kv, HALF=heads.size // 2,
        BLOCK=block, HAS_NORM=norms is not None, IS_WHOLE=is_whole, num_warps=4,
    )  # fmt: skip
    return qkv.view(len(qkv), -1, heads.size)


@triton.jit
def _choose(
    logits, told, rows, width,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, TOP_BLOCK: tl.constexpr,
    IS_NORMALISED: tl.constexpr, IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ahead = tl.program_id(1)
    experts = tl.arange(0, BLOCK)
    is_expert = experts < EXPERTS
    raw = tl.load(logits + row * width + ahead * EXPERTS + experts, mask=is_expert, other=0.0)
    _, chosen, best = best_of(raw, experts, is_expert, TOP, TOP_BLOCK)
    places = tl.arange(0, TOP_BLOCK)
    is_place = places < TOP
    at = row * TOP + places
    tl.store(told + 2 * ahead * rows * TOP + at, chosen, mask=is_place)
    if ahead == 0:
        best = weights_of(best, is_place, raw.dtype, IS_NORMALISED, IS_ROUNDED)
        tl.store(told + rows * TOP + at, best.to(tl.int32, bitcast=True), mask=is_place)


def choose(logits: torch.Tensor, shape: RouterShape) -> torch.Tensor:
    """Choose experts by logits [T, E], and guess what the next layer will by those behind, if any.

    Returns
    -------
    torch.Tensor
        [2 or 3, T, K] int32: experts, best first; their weights, the bits of float32; the next layer's.
    """
    rows, width = logits.shape
    is_ahead = width > shape.experts
    told = torch.empty((2 + is_ahead, rows, shape.top_k), dtype=torch.int32, device=logits.device)
    _choose[(rows, 1 + is_ahead)](
        logits, told, rows, width, EXPERTS=shape.experts, BLOCK=max(16, triton.next_power_of_2(shape.experts)),
        TOP=shape.top_k, TOP_BLOCK=triton.next_power_of_2(shape.top_k), IS_NORMALISED=shape.is_normalised,
        IS_ROUNDED=shape.is_rounded, num_warps=1,
    )  # fmt: skip
    return told


@triton.jit
def _arrange(chosen, order, ends, rows, NOBODY: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(chosen + at, mask=at < rows, other=NOBODY)
        before += (ids < expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(chosen + at, mask=at < rows, other=NOBODY)
        mine = ids == expert
        ranks = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order + place + ranks - 1, at, mask=mine)
        place += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(ends + expert, place)


def arrange(chosen: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the rows of choices [T, K] by expert, [R] int32; `ends` [E] int32 takes where each expert's end."""
    rows = chosen.numel()
    order = torch.empty(rows, dtype=torch.int32, device=chosen.device)
    _arrange[(len(ends),)](
        chosen, order, ends, rows, NOBODY=_NOBODY, BLOCK=min(4096, triton.next_power_of_2(rows)), num_warps=8
    )
    return order


@cache
def _memory(device: torch.device) -> int:
    """Return the bytes that the threads of a program may share."""
    if device.type == "cpu":  # Triton's interpreter
        return _LEAST_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _LEAST_MEMORY))


@triton.jit
def _part(ends, number, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return whose rows part `number` computes, the first of them, and where that expert's end."""
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < EXPERTS
    end = tl.load(ends + experts, mask=is_expert, other=0)
    begin = tl.load(ends + experts - 1, mask=is_expert & (experts > 0), other=0)
    parts = tl.where(is_expert, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    until = tl.cumsum(parts, axis=0)
    expert = tl.sum((is_expert & (until <= number)).to(tl.int32), axis=0)
    is_mine = experts == expert
    skipped = tl.sum(tl.where(is_mine, until - parts, 0), axis=0)
    start = tl.sum(tl.where(is_mine, begin, 0), axis=0) + (number - skipped) * BLOCK_M
    return expert, start, tl.sum(tl.where(is_mine, end, 0), axis=0)


@triton.jit
def _gate_up(
    x, order, ends, slots, memory, out, stride, offset, hidden, ffn,
    TOP: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    expert, start, end = _part(ends, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M)
    slot = tl.load(slots + expert, mask=expert < EXPERTS, other=-1).to(tl.int64)
    if slot >= 0:
        places = start + tl.arange(0, BLOCK_M)
        is_row = places < end
        token = (tl.load(order + places, mask=is_row, other=0) // TOP).to(tl.int64)
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_col = cols < ffn
        inner = tl.arange(0, BLOCK_D)
        rows_at = x + token[:, None] * hidden + inner[None, :]
        gate_at = memory + slot * stride + offset + cols[None, :] * hidden + inner[:, None]
        up_at = gate_at + ffn * hidden
        gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        ups = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, hidden, BLOCK_D):
            if IS_EVEN:
                a = tl.load(rows_at + begin, mask=is_row[:, None], other=0.0)
                gate = tl.load(gate_at + begin)
                up = tl.load(up_at + begin)
            else:
                is_inner = begin + inner < hidden
                both = is_inner[:, None] & is_col[None, :]
                a = tl.load(rows_at + begin, mask=is_row[:, None] & is_inner[None, :], other=0.0)
                gate = tl.load(gate_at + begin, mask=both, other=0.0)
                up = tl.load(up_at + begin, mask=both, other=0.0)
            gates = tl.dot(a, gate, gates, input_precision="ieee")
            ups = tl.dot(a, up, ups, input_precision="ieee")
        dtype = out.dtype.element_ty
        wide = gates.to(dtype).to(tl.float32)
        active = (wide * tl.sigmoid(wide)).to(dtype).to(tl.float32) * ups.to(dtype).to(tl.float32)
        target = out + places.to(tl.int64)[:, None] * ffn + cols[None, :]
        tl.store(target, active.to(dtype), mask=is_row[:, None] & is_col[None, :])


@triton.jit
def _down(
    active, order, ends, slots, memory, out, stride, offset, hidden, ffn,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_EVEN: tl.constexpr,
):  # fmt: skip
    expert, start, end = _part(ends, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_M)
    slot = tl.load(slots + expert, mask=expert < EXPERTS, other=-1).to(tl.int64)
    if slot >= 0:
        places = start + tl.arange(0, BLOCK_M)
        is_row = places < end
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_col = cols < hidden
        inner = tl.arange(0, BLOCK_D)
        rows_at = active + places.to(tl.int64)[:, None] * ffn + inner[None, :]
        down_at = memory + slot * stride + offset + cols[None, :] * ffn + inner[:, None]
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, ffn, BLOCK_D):
            if IS_EVEN:
                a = tl.load(rows_at + begin, mask=is_row[:, None], other=0.0)
                weight = tl.load(down_at + begin)
            else:
                is_inner = begin + inner < ffn
                a = tl.load(rows_at + begin, mask=is_row[:, None] & is_inner[None, :], other=0.0)
                weight = tl.load(down_at + begin, mask=is_inner[:, None] & is_col[None, :], other=0.0)
            sums = tl.dot(a, weight, sums, input_precision="ieee")
        row = tl.load(order + places, mask=is_row, other=0).to(tl.int64)
        target = out + row[:, None] * hidden + cols[None, :]
        tl.store(target, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_col[None, :])


def gate_up(
    x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor, lanes: Lanes, out: torch.Tensor
) -> None:
    """Compute what goes into the down projections, [R, F] by expert, of experts that have a slot, [E] int32."""
    rows, experts = len(order), len(ends)
    tiles = gate_up_tiles(rows, experts, itemsize=x.itemsize, memory=_memory(x.device))
    is_even = not (lanes.hidden % tiles.depth or lanes.ffn % tiles.columns)
    _gate_up[(triton.cdiv(lanes.ffn, tiles.columns), rows // tiles.rows + min(rows, experts))](
        x, order, ends, slots, lanes.memory, out, lanes.stride, lanes.gate_up, lanes.hidden, lanes.ffn,
        TOP=rows // len(x), EXPERTS=experts, BLOCK_E=triton.next_power_of_2(experts), BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns, BLOCK_D=tiles.depth, IS_EVEN=is_even, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def down(
    active: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor, lanes: Lanes, out: torch.Tensor
) -> None:
    """Compute the experts' answers, [R, D] in the order of the rows, of experts that have a slot."""
    rows, experts = len(order), len(ends)
    tiles = down_tiles(rows, experts, itemsize=active.itemsize, memory=_memory(active.device))
    is_even = not (lanes.ffn % tiles.depth or lanes.hidden % tiles.columns)
    _down[(triton.cdiv(lanes.hidden, tiles.columns), rows // tiles.rows + min(rows, experts))](
        active, order, ends, slots, lanes.memory, out, lanes.stride, lanes.down, lanes.hidden, lanes.ffn,
        EXPERTS=experts, BLOCK_E=triton.next_power_of_2(experts), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
        BLOCK_D=tiles.depth, IS_EVEN=is_even, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def _combine(
    answers, weights, beside, out, size, TOP: tl.constexpr, BLOCK: tl.constexpr, HAS_BESIDE: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP):
        answer = tl.load(answers + (token * TOP + place) * size + cols, mask=inside, other=0.0)
        total += answer.to(tl.float32) * tl.load(weights + token * TOP + place).to(tl.float32)
    dtype = out.dtype.element_ty
    if HAS_BESIDE:
        added = tl.load(beside + token * size + cols, mask=inside, other=0.0).to(tl.float32)
        total = total.to(dtype).to(tl.float32) + added
    tl.store(out + token * size + cols, total.to(dtype), mask=inside)


def combine(answers: torch.Tensor, weights: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of each token's answers [R, D] by its weights [T, K], [T, D], and what is beside them."""
    tokens, top_k = weights.shape
    size = answers.shape[1]
    out = torch.empty((tokens, size), dtype=answers.dtype, device=answers.device)
    block = min(1024, triton.next_power_of_2(size))
    _combine[(tokens, triton.cdiv(size, block))](
        answers, weights, out if beside is None else beside, out, size, TOP=top_k, BLOCK=block,
        HAS_BESIDE=beside is not None, num_warps=4,
    )  # fmt: skip
    return out
