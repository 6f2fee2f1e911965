"""The kernels with which a device brings the experts that a layer lacks, by itself, from pinned host memory.

Decides nothing that `reference` does not say: which spare goes to which expert. They run beside the layer's other
kernels: `fetch` what a layer lacks; then `ahead` what the next one will probably lack, and the one after it, until the
next router runs. What of that came true is continued where it stopped. Each has a stream of its own: the next `fetch`
has begun by then, and has but to see that `ahead` has stopped, where behind it on one stream it would begin some 7 us
after the router, and the link rest as long. Axes as in `supply`.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl

from runtime.cuda.buffers import FOUND, STAMP, Buffers
from runtime.cuda.supply import CHUNK, FAR, GUESSES, NEAR, PARTS, WHOLE, Supply
from runtime.errors import RuntimeFault

_SPIN_LIMIT: Final = 1 << 24  # some 30 s: a host that died must not hold the device for ever
_FEW: Final = 16  # experts, of which one warp keeps count without spilling


@triton.jit
def _copy_chunk(source, target, chunk, part, WORDS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    at = (chunk * PARTS + part) * CHUNK + tl.arange(0, CHUNK)
    inside = at < WORDS
    tl.store(target + at, tl.load(source + at, mask=inside, other=0, cache_modifier=".cg"), mask=inside)


@triton.jit
def _tell(
    ids, found, places, inside, weights, progress, seen_ids, seen_weights, ended, fence, now,
    CHUNKS: tl.constexpr, GUESSES: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr, STAMP: tl.constexpr,
    FOUND: tl.constexpr,
):  # fmt: skip
    tl.store(seen_weights + places, tl.load(weights + places, mask=inside, other=0.0), mask=inside)
    parts = tl.arange(0, PARTS)
    for number in tl.static_range(GUESSES):
        came = tl.sum(tl.load(progress + number * PARTS + parts), axis=0)
        tl.store(ended + number, now * STAMP + came * WHOLE // (CHUNKS * PARTS))
    tl.debug_barrier()
    tl.atomic_add(fence, 0, sem="release", scope="sys")  # the host sees ids only after what they are about
    tl.store(seen_ids + places, now * STAMP + ids.to(tl.int64) + tl.where(found >= 0, FOUND, 0), mask=inside)


@triton.jit
def _last_stopped(stopped, part, until, limit, PARTS: tl.constexpr):
    """Wait until what a program needs was told: by all for those that tell on, else by the first, and its own share."""
    parts = tl.arange(0, PARTS)
    needed = (parts == part) | (parts == 0) | (part % PARTS == 0)
    words = stopped + parts
    last = tl.min(tl.where(needed, tl.atomic_add(words, 0, needed, sem="acquire", scope="gpu"), until), axis=0)
    tries = 0
    while (last < until) & (tries < limit):
        last = tl.min(tl.where(needed, tl.atomic_add(words, 0, needed, sem="acquire", scope="gpu"), until), axis=0)
        tries += 1
    return last


@triton.jit
def _fetch(
    chosen, first, slots, weights, table, hosted, spares, before, after, ahead_ids, ahead_slots, progress, source,
    target, released, stopped, stamp, seen_ids, seen_weights, ended, fence, waited, layer, layers, limit,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr,
    GUESSES: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, STAMP: tl.constexpr,
    FOUND: tl.constexpr, IS_TIMED: tl.constexpr, IS_BEHIND: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    inside = places < COUNT
    found = tl.load(first + places, mask=inside, other=0)
    ids = tl.load(chosen + places, mask=inside, other=-1)
    now = tl.load(stamp).to(tl.int64)
    is_late = now < 0
    if IS_BEHIND:  # what was begun ahead stops now, but has not yet
        is_late = _last_stopped(stopped, part, now * layers + layer + 1, limit, PARTS) < now * layers + layer + 1
    used = tl.load(before)
    taken = used * 0
    took = tl.zeros([1], tl.int64)
    if part == PARTS:  # a program beside those that copy: while the link is busy it takes some 10 us
        _tell(
            ids, found, places, inside, weights, progress, seen_ids, seen_weights, ended, fence, now,
            CHUNKS, GUESSES, PARTS, WHOLE, STAMP, FOUND,
        )  # fmt: skip
    elif (tl.min(found, axis=0) < 0) & (is_late == 0):
        began = tl.zeros([1], tl.int64)
        if IS_TIMED:
            began += tl.extra.cuda.globaltimer()
        lacks = (found < 0) & inside
        same = (ids[:, None] == ids[None, :]) & lacks[None, :] & lacks[:, None]
        repeated = tl.sum((same & (places[None, :] < places[:, None])).to(tl.int32), axis=1) > 0
        fresh = lacks & (repeated == 0)
        guess = tl.full([BLOCK], -1, tl.int32)
        slot = tl.full([BLOCK], -1, tl.int32)
        for number in tl.static_range(GUESSES):
            is_guess = fresh & (ids == tl.load(ahead_ids + number))
            guess = tl.where(is_guess, number, guess)
            slot = tl.where(is_guess, tl.load(ahead_slots + number), slot)
        needs = fresh & (guess < 0)
        order = used + tl.cumsum(needs.to(tl.int64), axis=0) - 1
        entry = tl.load(spares + order % RING, mask=needs, other=0, volatile=True)
        lies = tl.load(hosted + ids, mask=fresh, other=-1, volatile=True)
        wanted = now * layers + layer + 1
        seen = tl.load(released, volatile=True)
        short = tl.sum(((needs & ((entry >> 32) != order + 1)) | (fresh & (lies < 0))).to(tl.int32), axis=0)
        tries = 0
        while (short > 0) & (tries < limit) & (seen < wanted):
            entry = tl.load(spares + order % RING, mask=needs, other=0, volatile=True)
            lies = tl.load(hosted + ids, mask=fresh, other=-1, volatile=True)
            seen = tl.load(released, volatile=True)
            short = tl.sum(((needs & ((entry >> 32) != order + 1)) | (fresh & (lies < 0))).to(tl.int32), axis=0)
            tries += 1
        if short > 0:  # the host has given the step up, or died: nothing is computed with what is missing
            took += tl.where(seen < wanted, -1, 0)
        else:
            slot = tl.where(needs, (entry & 0xFFFFFFFF).to(tl.int32), slot)
            taken += tl.sum(needs.to(tl.int64), axis=0)
            both = same & fresh[None, :]
            given = tl.sum(tl.where(both, slot[None, :] + 1, 0), axis=1) - 1
            if part == 0:
                tl.store(slots + places, given, mask=lacks)
                tl.store(table + ids, slot, mask=fresh)
            for place in range(COUNT):
                mine = (places == place) & fresh
                if tl.sum(mine.to(tl.int32), axis=0) > 0:
                    to = tl.sum(tl.where(mine, slot, 0), axis=0).to(tl.int64) * WORDS
                    lay = tl.sum(tl.where(mine, lies, 0), axis=0).to(tl.int64) * WORDS
                    resumed = tl.sum(tl.where(mine, guess, 0), axis=0)
                    begin = tl.load(progress + tl.maximum(resumed, 0) * PARTS + part)
                    for chunk in range(tl.where(resumed >= 0, begin, 0), CHUNKS):
                        _copy_chunk(source + lay, target + to, chunk, part, WORDS, PARTS, CHUNK)
            if IS_TIMED:
                took += tl.extra.cuda.globaltimer() - began
    if part == 0:
        tl.store(after, used + taken)
        tl.store(waited + (now % 2) * layers + layer + tl.arange(0, 1), tl.where(is_late, -1, took))


@triton.jit
def _likely(
    guessed, table, hosted, spares, known, used, most,
    ROWS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr, MOST: tl.constexpr,
    KNOWN: tl.constexpr,
):  # fmt: skip
    places = tl.arange(0, BLOCK)
    inside = places < ROWS * TOP
    ids = tl.load(guessed + (places % ROWS) * TOP + places // ROWS, mask=inside, other=-1)  # every row's best first
    slot_now = tl.load(table + ids, mask=inside, other=0)
    lies = tl.load(hosted + ids, mask=inside, other=-1, volatile=True)
    can = inside & (slot_now < 0) & (lies >= 0)
    for number in tl.static_range(KNOWN):
        can = can & (ids != tl.load(known + number))
    before = places[None, :] < places[:, None]
    same = (ids[:, None] == ids[None, :]) & can[None, :] & before
    can = can & (tl.sum(same.to(tl.int32), axis=1) == 0)
    is_better = (slot_now[None, :] < slot_now[:, None]) | ((slot_now[None, :] == slot_now[:, None]) & before)
    rank = tl.sum((is_better & can[None, :]).to(tl.int64), axis=1)
    can = can & (rank < MOST) & (used + rank < most)
    entry = tl.load(spares + (used + rank) % RING, mask=can, other=0, volatile=True)
    is_old = can & ((entry >> 32) != used + rank + 1)  # the limit may have come before the spares that it is for
    can = can & (rank < tl.min(tl.where(is_old, rank, MOST), axis=0))
    is_short = tl.max(is_old.to(tl.int32), axis=0) > 0
    return ids, lies, (entry & 0xFFFFFFFF).to(tl.int32), rank, can, is_short


@triton.jit
def _note(
    ids, slot, rank, can, ahead_ids, ahead_slots, told, now, part, MOST: tl.constexpr, STAMP: tl.constexpr
):  # fmt: skip
    if part == 0:
        for number in tl.static_range(MOST):
            mine = can & (rank == number)
            expert = tl.max(tl.where(mine, ids, -1), axis=0)
            tl.store(ahead_ids + number, expert)
            tl.store(ahead_slots + number, tl.max(tl.where(mine, slot, -1), axis=0))
            tl.store(told + number, now * STAMP + expert + 1)


@triton.jit
def _copy_some(
    source, target, lies, slot, begin, is_wanted, routed, until, progress, part,
    WORDS: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = begin
    if is_wanted:
        lay = lies.to(tl.int64) * WORDS
        to = slot.to(tl.int64) * WORDS
        seen = tl.load(routed, volatile=True)
        while (chunk < CHUNKS) & (seen < until):
            seen = tl.load(routed, volatile=True)
            _copy_chunk(source + lay, target + to, chunk, part, WORDS, PARTS, CHUNK)
            chunk += 1
    tl.store(progress + part, chunk)


@triton.jit
def _ahead(
    guessed, table, hosted, spares, before, after, limits, ahead_ids, ahead_slots, progress, source, target, routed,
    stopped, stamp, told, layer, layers,
    ROWS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr, WORDS: tl.constexpr,
    CHUNKS: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    STAMP: tl.constexpr, EXPERTS: tl.constexpr, HAS_FAR: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    now = tl.load(stamp).to(tl.int64)
    used = tl.load(before)
    most = tl.load(limits + layer)
    until = now * layers + layer + 2
    ids, lies, slot, rank, can, is_short = _likely(
        guessed, table, hosted, spares, ahead_ids + NEAR, used, most, ROWS, TOP, BLOCK, RING, NEAR, FAR
    )
    _note(ids, slot, rank, can, ahead_ids, ahead_slots, told, now, part, NEAR, STAMP)
    used += tl.sum(can.to(tl.int64), axis=0)
    far_at = NEAR + FAR + NEAR  # behind what is guessed of the next layer
    if HAS_FAR:
        far_ids, far_lies, far_slot, far_rank, far_can, _ = _likely(
            guessed + ROWS * TOP, table + EXPERTS, hosted + EXPERTS, spares, ahead_ids, used, most,
            ROWS, TOP, BLOCK, RING, FAR, 0,
        )  # fmt: skip
        far_can = far_can & (is_short == 0)  # programs that see spares come at this moment may count otherwise
        _note(
            far_ids, far_slot, far_rank, far_can, ahead_ids + far_at, ahead_slots + far_at, told + NEAR, now, part,
            FAR, STAMP,
        )  # fmt: skip
        used += tl.sum(far_can.to(tl.int64), axis=0)
    if part == 0:
        tl.store(after, used)
        if not HAS_FAR:
            for number in tl.static_range(FAR):
                tl.store(told + NEAR + number, now * STAMP)
    for number in tl.static_range(FAR):  # what was begun a layer ago, and still seems to be asked for
        expert = tl.load(ahead_ids + NEAR + number)
        still_lies = tl.load(hosted + tl.maximum(expert, 0), volatile=True)  # or has made room for what a layer lacked
        is_likely = (expert >= 0) & (still_lies >= 0) & (tl.max((ids == expert).to(tl.int32), axis=0) > 0)
        begun = progress + (NEAR + number) * PARTS
        _copy_some(
            source, target, still_lies, tl.load(ahead_slots + NEAR + number), tl.load(begun + part), is_likely, routed,
            until, begun, part, WORDS, CHUNKS, PARTS, CHUNK,
        )  # fmt: skip
    for turn in tl.static_range(NEAR):
        mine = can & (rank == turn)
        _copy_some(
            source, target, tl.sum(tl.where(mine, lies, 0), axis=0), tl.sum(tl.where(mine, slot, 0), axis=0), part * 0,
            tl.sum(mine.to(tl.int32), axis=0) > 0, routed, until, progress + turn * PARTS, part,
            WORDS, CHUNKS, PARTS, CHUNK,
        )  # fmt: skip
    if HAS_FAR:
        for turn in tl.static_range(FAR):
            mine = far_can & (far_rank == turn)
            _copy_some(
                source, target, tl.sum(tl.where(mine, far_lies, 0), axis=0),
                tl.sum(tl.where(mine, far_slot, 0), axis=0), part * 0, tl.sum(mine.to(tl.int32), axis=0) > 0, routed,
                until, progress + (far_at + turn) * PARTS, part, WORDS, CHUNKS, PARTS, CHUNK,
            )  # fmt: skip
    tl.debug_barrier()
    tl.atomic_xchg(stopped + part, until, sem="release", scope="gpu")


def bring(buffers: Buffers, layer: int) -> Any:
    """Tell the host what a layer chose, and begin to bring what it lacks beside what follows; returns what to join."""
    supply = _supply(buffers)
    side = supply.side
    if side is None:
        _launch_fetch(buffers, supply, layer)
        return None
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _launch_fetch(buffers, supply, layer)
        return side.record_event()


def bring_ahead(buffers: Buffers, layer: int) -> None:
    """Begin to bring what the next layers will probably lack, until the next one knows."""
    supply = _supply(buffers)
    if supply.side is None:
        _launch_ahead(buffers, supply, layer)
        return
    supply.ahead_side.wait_stream(supply.side)
    with torch.cuda.stream(supply.ahead_side):
        _launch_ahead(buffers, supply, layer)


def join(event: Any) -> None:
    """Let what is launched next come behind what a `bring` brings."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def join_all(buffers: Buffers) -> None:
    """Let what is launched next come behind all that was brought."""
    supply = _supply(buffers)
    if supply.side is not None:
        torch.cuda.current_stream().wait_stream(supply.side)
        torch.cuda.current_stream().wait_stream(supply.ahead_side)


def _supply(buffers: Buffers) -> Supply:
    if buffers.supply is None:
        raise RuntimeFault("these steps cannot bring experts by themselves")
    return buffers.supply


def _launch_fetch(buffers: Buffers, supply: Supply, layer: int) -> None:
    count = buffers.slots[layer].numel()
    before = supply.taken[2 * layer - 1 :] if layer else buffers.control[1:]
    mail = buffers.mail
    _fetch[(PARTS + 1,)](
        buffers.chosen[layer], buffers.first[layer], buffers.slots[layer], buffers.weights[layer],
        buffers.table[layer], supply.hosted[layer], supply.spares, before, supply.taken[2 * layer :],
        supply.ahead_ids[layer], supply.ahead_slots[layer], supply.progress[layer], supply.source, supply.target,
        buffers.released, supply.stopped, buffers.stamp, mail.ids[layer], mail.weights[layer], supply.ended[layer],
        buffers.fence, mail.waited_ns, layer, len(buffers.slots), _SPIN_LIMIT,
        COUNT=count, BLOCK=triton.next_power_of_2(count), RING=supply.ring, WORDS=supply.words,
        CHUNKS=supply.chunks, GUESSES=GUESSES, PARTS=PARTS, CHUNK=CHUNK, WHOLE=WHOLE, STAMP=STAMP, FOUND=FOUND,
        IS_TIMED=buffers.table.is_cuda, IS_BEHIND=layer > 0, num_warps=1 if count <= _FEW else 4,
    )  # fmt: skip


def _launch_ahead(buffers: Buffers, supply: Supply, layer: int) -> None:
    layers, rows, top = buffers.slots.shape
    after = layer + 1
    _ahead[(PARTS,)](
        buffers.guessed[layer], buffers.table[after], supply.hosted[after], supply.spares,
        supply.taken[2 * layer :], supply.taken[2 * layer + 1 :], supply.limits, supply.ahead_ids[after],
        supply.ahead_slots[after], supply.progress[after], supply.source, supply.target, supply.routed,
        supply.stopped, buffers.stamp, supply.told[layer], layer, layers,
        ROWS=rows, TOP=top, BLOCK=triton.next_power_of_2(rows * top), RING=supply.ring, WORDS=supply.words,
        CHUNKS=supply.chunks, NEAR=NEAR, FAR=FAR, PARTS=PARTS, CHUNK=CHUNK, STAMP=STAMP,
        EXPERTS=supply.hosted.shape[1], HAS_FAR=after + 1 < layers,
        num_warps=1,  # each warp reads `routed` for itself: of more than one some would stop a chunk before others
    )  # fmt: skip
