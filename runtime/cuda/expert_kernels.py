"""The kernels of routed experts: a router's choice told to host and device, the wait for the host, and the experts.

Decides nothing that `reference` does not say. Weights are read where they lie in their slots. Axes: B tokens, D hidden,
E experts, K top-k, F ffn.
"""

from typing import Final

import torch
import triton
import triton.language as tl

from runtime.cuda.buffers import FOUND, STAMP, Buffers
from runtime.cuda.choice_kernels import best_of, weights_of
from runtime.cuda.early_kernels import early, follow
from runtime.cuda.product_kernels import store_gated
from runtime.cuda.shapes import Lanes, RouterShape

_SPIN_LIMIT: Final = 1 << 26  # some 30 s: a host that died must not hold the device for ever


@triton.jit
def _route(
    logits, table, slots, first, weights, stamp, seen_ids, seen_guesses, seen_weights, seen_scores, fence,
    own_ids, own_guesses, routed, limit, limits, layer, layers,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, TOP_BLOCK: tl.constexpr,
    IS_NORMALISED: tl.constexpr, IS_ROUNDED: tl.constexpr, STAMP: tl.constexpr, FOUND: tl.constexpr,
    HAS_SUPPLY: tl.constexpr, IS_TOLD: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    follow(IS_EARLY)
    row = tl.program_id(0)
    ahead = tl.program_id(1)
    if HAS_SUPPLY:
        if row + ahead == 0:  # what is begun ahead stops
            tl.store(routed, tl.load(stamp).to(tl.int64) * layers + layer + 1)
            tl.store(limits + layer, tl.load(limit, volatile=True))
    experts = tl.arange(0, BLOCK)
    is_expert = experts < EXPERTS
    raw = tl.load(logits + row * WIDTH + ahead * EXPERTS + experts, mask=is_expert, other=0.0)
    scores, chosen, best = best_of(raw, experts, is_expert, TOP, TOP_BLOCK)
    places = tl.arange(0, TOP_BLOCK)
    is_place = places < TOP
    at = row * TOP + places
    word = tl.load(stamp).to(tl.int64) * STAMP + chosen.to(tl.int64)
    if ahead > 0:
        guess = (ahead - 1) * tl.num_programs(0) * TOP + at
        tl.store(own_guesses + guess, chosen, mask=is_place)
        if IS_TOLD:
            tl.store(seen_guesses + guess, word, mask=is_place)
    else:
        best = weights_of(best, is_place, raw.dtype, IS_NORMALISED, IS_ROUNDED)
        found = tl.load(table + chosen, mask=is_place, other=0, volatile=True)
        tl.store(slots + at, found, mask=is_place)
        tl.store(first + at, found, mask=is_place)
        tl.store(weights + at, best, mask=is_place)
        tl.store(own_ids + at, chosen, mask=is_place)
        if IS_TOLD:
            tl.store(seen_scores + row * EXPERTS + experts, scores, mask=is_expert)
            tl.store(seen_weights + at, best, mask=is_place)
            tl.debug_barrier()
            tl.atomic_add(fence, 0, sem="release", scope="sys")  # the host sees ids only after what they are about
            tl.store(seen_ids + at, word + tl.where(found >= 0, FOUND, 0), mask=is_place)


def route(logits: torch.Tensor, shape: RouterShape, buffers: Buffers, layer: int, *, is_told: bool = True) -> None:
    """Choose experts, look their slots up; guess likewise from logits of layers after, behind [B, E].

    What is behind them and fewer than E is no router's.

    Parameters
    ----------
    is_told
        The host, now: where the link is busy that takes some 10 us.
    """
    mail, supply = buffers.mail, buffers.supply
    routed, limit, limits = (
        (buffers.fence,) * 3 if supply is None else (supply.routed, supply.spares[-1:], supply.limits)
    )
    _route[(logits.shape[0], logits.shape[1] // shape.experts)](
        logits, buffers.table[layer], buffers.slots[layer], buffers.first[layer], buffers.weights[layer],
        buffers.stamp, mail.ids[layer], mail.guesses[layer], mail.weights[layer], mail.scores[layer], buffers.fence,
        buffers.chosen[layer], buffers.guessed[layer], routed, limit, limits, layer, len(buffers.slots),
        EXPERTS=shape.experts, WIDTH=logits.shape[1], BLOCK=max(16, triton.next_power_of_2(shape.experts)),
        TOP=shape.top_k, TOP_BLOCK=triton.next_power_of_2(shape.top_k), IS_NORMALISED=shape.is_normalised,
        IS_ROUNDED=shape.is_rounded, STAMP=STAMP, FOUND=FOUND, HAS_SUPPLY=supply is not None, IS_TOLD=is_told,
        num_warps=1, **early(logits.device),
    )  # fmt: skip


@triton.jit
def _wait(
    slots, weights, inbox_slots, inbox_weights, released, stamp, waited, layer, layers, limit,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, IS_TIMED: tl.constexpr,
):  # fmt: skip
    places = tl.arange(0, BLOCK)
    inside = places < COUNT
    found = tl.load(slots + places, mask=inside, other=0)
    took = tl.zeros([1], tl.int64)
    if tl.min(found, axis=0) < 0:
        began = tl.zeros([1], tl.int64)
        if IS_TIMED:
            began += tl.extra.cuda.globaltimer()
        wanted = tl.load(stamp).to(tl.int64) * layers + layer + 1
        seen = tl.atomic_add(released, 0, sem="acquire", scope="sys")
        tries = 0
        while (seen < wanted) & (tries < limit):
            seen = tl.atomic_add(released, 0, sem="acquire", scope="sys")
            tries += 1
        tl.store(slots + places, tl.load(inbox_slots + places, mask=inside, other=0, volatile=True), mask=inside)
        tl.store(weights + places, tl.load(inbox_weights + places, mask=inside, other=0.0, volatile=True), mask=inside)
        if IS_TIMED:
            took += tl.extra.cuda.globaltimer() - began
        if seen < wanted:
            took = tl.full([1], -1, tl.int64)
    turn = tl.load(stamp).to(tl.int64) % 2
    tl.store(waited + turn * layers + layer + tl.arange(0, 1), took)


def wait(buffers: Buffers, layer: int) -> None:
    """Wait until the host has brought what the layer lacks, where it lacks anything; take the host's slots then."""
    count = buffers.slots[layer].numel()
    _wait[(1,)](
        buffers.slots[layer], buffers.weights[layer], buffers.inbox_slots, buffers.inbox_weights, buffers.released,
        buffers.stamp, buffers.mail.waited_ns, layer, len(buffers.slots), _SPIN_LIMIT,
        COUNT=count, BLOCK=triton.next_power_of_2(count), IS_TIMED=buffers.table.is_cuda, num_warps=1,
    )  # fmt: skip


@triton.jit
def _gate_up(
    x, memory, slots, first, out, stride, offset, hidden, ffn,
    TOP: tl.constexpr, IS_LATE: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    follow(IS_EARLY)
    pair = tl.program_id(0)
    slot = tl.load(slots + pair).to(tl.int64)
    wanted = slot >= 0
    if IS_LATE:
        wanted = wanted & (tl.load(first + pair) < 0)
    if wanted:
        rows = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        weight = memory + slot * stride + offset
        store_gated(x + (pair // TOP) * hidden, weight, out + pair * ffn, rows, hidden, ffn, BLOCK_F, BLOCK_D)


@triton.jit
def _down(
    active, memory, slots, weights, beside, out, stride, offset, hidden, ffn,
    TOP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, HAS_BESIDE: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row = rows < hidden
    dtype = out.dtype.element_ty
    total = tl.zeros([BLOCK_D], tl.float32)
    for place in range(TOP):
        pair = row * TOP + place
        slot = tl.load(slots + pair).to(tl.int64)
        if slot >= 0:
            sums = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
            base = memory + slot * stride + offset + rows[:, None] * ffn
            for start in range(0, ffn, BLOCK_F):
                cols = start + tl.arange(0, BLOCK_F)
                is_col = cols < ffn
                both = is_row[:, None] & is_col[None, :]
                part = tl.load(base + cols[None, :], mask=both, other=0.0).to(tl.float32)
                follow(IS_EARLY)
                sums += part * tl.load(active + pair * ffn + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
            answer = tl.sum(sums, axis=1).to(dtype).to(tl.float32)
            total += answer * tl.load(weights + pair)
    follow(IS_EARLY)
    if HAS_BESIDE:
        added = tl.load(beside + row * hidden + rows, mask=is_row, other=0.0).to(tl.float32)
        total = total.to(dtype).to(tl.float32) + added
    tl.store(out + row * hidden + rows, total.to(dtype), mask=is_row)


def gate_up(x: torch.Tensor, lanes: Lanes, buffers: Buffers, layer: int, out: torch.Tensor, *, late: bool) -> None:
    """Compute what goes into the down projections, [B, K, F], of experts at hand, or of those that came late."""
    block = 4
    top = buffers.slots.shape[2]
    slots = buffers.slots if late else buffers.first  # slots may be changing meanwhile
    _gate_up[(x.shape[0] * top, triton.cdiv(lanes.ffn, block))](
        x, lanes.memory, slots[layer], buffers.first[layer], out, lanes.stride, lanes.gate_up, lanes.hidden,
        lanes.ffn, TOP=top, IS_LATE=late, BLOCK_F=block,
        BLOCK_D=min(1024, triton.next_power_of_2(lanes.hidden)), num_warps=4, **early(x.device, waits_for_others=late),
    )  # fmt: skip


def down(
    active: torch.Tensor, lanes: Lanes, buffers: Buffers, layer: int, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted sum of the experts' answers, [B, D], and what is beside them."""
    rows, block = active.shape[0], 4
    out = torch.empty((rows, lanes.hidden), dtype=active.dtype, device=active.device)
    _down[(rows, triton.cdiv(lanes.hidden, block))](
        active, lanes.memory, buffers.slots[layer], buffers.weights[layer], out if beside is None else beside, out,
        lanes.stride, lanes.down, lanes.hidden, lanes.ffn, TOP=active.shape[1], BLOCK_D=block,
        BLOCK_F=min(1024, triton.next_power_of_2(lanes.ffn)), HAS_BESIDE=beside is not None, num_warps=2,
        **early(active.device),
    )  # fmt: skip
    return out
