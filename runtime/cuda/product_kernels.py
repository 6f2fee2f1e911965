"""The kernels of norms and of products with dense weights: projections, routers, the expert that every token uses.

Decides nothing that `reference` does not say. Few tokens are multiplied as vectors, each weight read once for each;
more go through torch's products of matrices. Axes: B tokens, D hidden, F ffn.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch.nn import functional

from runtime.cuda import reference
from runtime.cuda.early_kernels import early, follow
from runtime.cuda.shapes import Scale, SharedExpert

_FEW_ROWS: Final = 2  # so many products with a vector each read their weight faster than one with a matrix


@triton.jit
def _add_norm(x, delta, weight, total, out, eps, size, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    value = tl.load(x + row * size + cols, mask=inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + row * size + cols, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
    tl.store(total + row * size + cols, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(value.dtype).to(tl.float32)
    scaled = normed * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + cols, scaled.to(value.dtype), mask=inside)


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMS norm of residual + delta, and that sum, [B, D] each."""
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    size = residual.shape[1]
    block = triton.next_power_of_2(size)
    _add_norm[(residual.shape[0],)](
        residual, residual if delta is None else delta, weight, total, out, eps, size,
        BLOCK=block, HAS_DELTA=delta is not None, num_warps=8,
    )  # fmt: skip
    return out, total


@triton.jit
def _product(
    x, weight, out, scores, score_stride, rows, columns,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, IS_WEIGHTED: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = at < rows
    base = weight + at.to(tl.int64)[:, None] * columns
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, columns, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        is_col = cols < columns
        both = is_row[:, None] & is_col[None, :]
        weights = tl.load(base + cols[None, :], mask=both, other=0.0).to(tl.float32)
        follow(IS_EARLY)
        sums += weights * tl.load(x + row * columns + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    dtype = out.dtype.element_ty
    answer = tl.sum(sums, axis=1).to(dtype)
    if IS_WEIGHTED:
        odds = tl.sigmoid(tl.load(scores + row * score_stride).to(tl.float32)).to(dtype)
        answer = (answer.to(tl.float32) * odds.to(tl.float32)).to(dtype)
    tl.store(out + row * rows + at, answer, mask=is_row)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x times the transpose of a weight [N, D]: [B, N]."""
    return functional.linear(x, weight) if len(x) > _FEW_ROWS else _few_products(x, weight, None)


def _few_products(x: torch.Tensor, weight: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
    """Return the product of few rows with a weight; of each, weighted by the sigmoid of its score [B, 1]."""
    rows, columns = weight.shape
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    block = 2
    _product[(len(x), triton.cdiv(rows, block))](
        x, weight, out, x if score is None else score, 0 if score is None else score.stride(0), rows, columns,
        BLOCK_N=block, BLOCK_D=min(1024, triton.next_power_of_2(columns)), IS_WEIGHTED=score is not None, num_warps=4,
        **early(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _normed_product(
    x, delta, scale, weight, bias, total, normed, out, eps, rows, columns,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    is_col = cols < columns
    at = part * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = at < rows
    both = is_row[:, None] & is_col[None, :]
    weights = tl.load(weight + at[:, None] * columns + cols[None, :], mask=both, other=0.0)
    scales = tl.load(scale + cols, mask=is_col, other=0.0).to(tl.float32)
    follow(IS_EARLY)
    value = tl.load(x + row * columns + cols, mask=is_col, other=0.0)
    dtype = value.dtype
    if HAS_DELTA:
        added = tl.load(delta + row * columns + cols, mask=is_col, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(dtype)
    wide = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    scaled = (wide * root).to(dtype).to(tl.float32)
    scaled = (scaled * scales).to(dtype)
    if part == 0:
        tl.store(total + row * columns + cols, value, mask=is_col)
        tl.store(normed + row * columns + cols, scaled, mask=is_col)
    sums = tl.sum(weights.to(tl.float32) * scaled.to(tl.float32)[None, :], axis=1)
    if HAS_BIAS:
        sums += tl.load(bias + at, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + row * rows + at, sums.to(dtype), mask=is_row)


def normed_product(
    residual: torch.Tensor, delta: torch.Tensor | None, norm: Scale, weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the product [B, N] of the RMS norm of residual + delta with a weight [N, D], that norm, and that sum."""
    if len(residual) > _FEW_ROWS:
        normed, total = add_norm(residual, delta, *norm)
        return functional.linear(normed, weight, bias), normed, total
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    rows, columns = weight.shape
    out = torch.empty((len(residual), rows), dtype=residual.dtype, device=residual.device)
    block = 1 if rows <= 512 else 4
    _normed_product[(len(residual), triton.cdiv(rows, block))](
        residual, residual if delta is None else delta, norm.weight, weight, weight if bias is None else bias, total,
        normed, out, norm.eps, rows, columns, BLOCK_N=block, BLOCK_D=triton.next_power_of_2(columns),
        HAS_DELTA=delta is not None, HAS_BIAS=bias is not None, num_warps=4, **early(residual.device),
    )  # fmt: skip
    return out, normed, total


@triton.jit
def store_gated(x, weight, out, rows, hidden, ffn, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store silu(gate x) * (up x) of some rows; x [D], gate and up lie behind each other in a weight [2F, D]."""
    is_row = rows < ffn
    gate_at = weight + rows[:, None] * hidden
    up_at = gate_at + ffn * hidden
    gates = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    ups = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for start in range(0, hidden, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        is_col = cols < hidden
        value = tl.load(x + cols, mask=is_col, other=0.0).to(tl.float32)
        both = is_row[:, None] & is_col[None, :]
        gates += tl.load(gate_at + cols[None, :], mask=both, other=0.0).to(tl.float32) * value[None, :]
        ups += tl.load(up_at + cols[None, :], mask=both, other=0.0).to(tl.float32) * value[None, :]
    dtype = out.dtype.element_ty
    gate = tl.sum(gates, axis=1).to(dtype).to(tl.float32)
    up = tl.sum(ups, axis=1).to(dtype).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out + rows, (active * up).to(dtype), mask=is_row)


@triton.jit
def _gated(x, weight, out, hidden, ffn, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, IS_EARLY: tl.constexpr):
    follow(IS_EARLY)
    row = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    store_gated(x + row * hidden, weight, out + row * ffn, rows, hidden, ffn, BLOCK_F, BLOCK_D)


def shared(x: torch.Tensor, score: torch.Tensor, expert: SharedExpert) -> torch.Tensor:
    """Return what an expert that every token uses makes of x, [B, D], weighted by the sigmoid of its score [B, 1]."""
    if len(x) > _FEW_ROWS:
        return reference.shared(x, score, expert)
    (rows, hidden), ffn, block = x.shape, expert.down.shape[1], 4
    active = torch.empty((rows, ffn), dtype=x.dtype, device=x.device)
    _gated[(rows, triton.cdiv(ffn, block))](
        x, expert.gate_up, active, hidden, ffn,
        BLOCK_F=block, BLOCK_D=min(1024, triton.next_power_of_2(hidden)), num_warps=4, **early(x.device),
    )  # fmt: skip
    return _few_products(active, expert.down, score)
