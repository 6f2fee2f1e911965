"""The operations of a decode step in plain torch: what `kernels` must compute, and what runs where there is no Triton.

Decides the arithmetic: the same roundings as transformers' modules and `runtime.experts`. A layer that lacks experts is
the caller's business between `route` and `down`: nothing here waits.
"""

from typing import Any

import torch
from torch.nn import functional

from runtime.cuda.buffers import FOUND, STAMP, Buffers, KeyValues
from runtime.cuda.shapes import HeadNorms, Heads, Lanes, RouterShape, Scale, SharedExpert
from runtime.cuda.supply import CHUNK, GUESSES, NEAR, PARTS, WHOLE, Supply
from runtime.errors import DeviceLost, RuntimeFault


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
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    norm: Scale,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the product [B, N] of the RMS norm of residual + delta with a weight [N, D], that norm, and that sum."""
    normed, total = add_norm(residual, delta, *norm)
    return functional.linear(normed, weight, bias), normed, total


def angles(rotary: Any, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [B, 1, d] of rotary embeddings."""
    cos, sin = rotary(positions.new_empty(0, dtype=dtype), position_ids=positions[:, None])
    return cos, sin


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def normed_heads(
    queries: torch.Tensor, keys: torch.Tensor, norms: HeadNorms | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [B, H, d] and keys [B, G, d] with their norms, of each head or of all as one vector."""
    if norms is None:
        return queries, keys
    if not norms.is_whole:
        return _norm(queries, norms.queries, norms.eps), _norm(keys, norms.keys, norms.eps)
    return (
        _norm(queries.flatten(1), norms.queries, norms.eps).view_as(queries),
        _norm(keys.flatten(1), norms.keys, norms.eps).view_as(keys),
    )


def rotate_store(  # noqa: PLR0917
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
    heads: Heads,
    kv: KeyValues,
    layer: int,
) -> torch.Tensor:
    """Norm and rotate queries and keys, append keys and values to the caches; returns the queries [B, H, d]."""
    sizes = [heads.queries, heads.kv, heads.kv]
    queries, keys, values = qkv.view(len(qkv), -1, heads.size).split(sizes, dim=1)
    queries, keys = normed_heads(queries, keys, norms)
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


def route(logits: torch.Tensor, shape: RouterShape, buffers: Buffers, layer: int, *, is_told: bool = True) -> None:
    """Choose experts, look their slots up, tell the host; guess likewise from logits of layers after, behind [B, E].

    What is behind them and fewer than E is no router's.
    """
    scores = logits[:, : shape.experts].float().softmax(-1)
    weights, chosen = scores.topk(shape.top_k, dim=-1)
    if shape.is_normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    if shape.is_rounded:
        weights = weights.to(logits.dtype)
    found = buffers.table[layer][chosen]
    buffers.slots[layer], buffers.first[layer], buffers.weights[layer] = found, found, weights.float()
    mail = buffers.mail
    buffers.chosen[layer] = chosen
    if is_told:
        mail.scores[layer] = scores
        tell(buffers, layer)
    for ahead in range(logits.shape[1] // shape.experts - 1):
        guess = logits[:, (ahead + 1) * shape.experts :][:, : shape.experts]
        likely = guess.topk(shape.top_k, dim=-1).indices
        if is_told:
            mail.guesses[layer, ahead] = buffers.stamp * STAMP + likely
        buffers.guessed[layer, ahead] = likely
    if (supply := buffers.supply) is not None:
        supply.routed[0] = int(buffers.stamp) * len(buffers.slots) + layer + 1
        supply.limits[layer] = supply.spares[-1]


def wait(buffers: Buffers, layer: int) -> None:
    """Take the host's slots where the layer lacked experts; the host has answered before."""
    if (buffers.slots[layer] < 0).any():
        shape = buffers.slots[layer].shape
        buffers.slots[layer], buffers.weights[layer] = (
            buffers.inbox_slots.view(shape),
            buffers.inbox_weights.view(shape),
        )


def tell(buffers: Buffers, layer: int) -> None:
    """Tell the host what a layer chose."""
    mail, found = buffers.mail, buffers.first[layer]
    mail.weights[layer] = buffers.weights[layer]
    mail.ids[layer] = buffers.stamp * STAMP + (found >= 0) * FOUND + buffers.chosen[layer]


def bring(buffers: Buffers, layer: int) -> None:
    """Tell the host what a layer chose, and bring what it lacks: to slots of guesses that came true, else to spares."""
    tell(buffers, layer)
    supply, chosen, slots = _supply(buffers), buffers.chosen[layer].view(-1), buffers.slots[layer].view(-1)
    used = int(supply.taken[2 * layer - 1] if layer else buffers.control[1])
    ahead_ids, given = supply.ahead_ids[layer].tolist(), {}
    came = supply.progress[layer].sum(1)
    supply.ended[layer] = buffers.stamp * STAMP + came * WHOLE // (supply.chunks * PARTS)
    for place, (expert, slot) in enumerate(zip(chosen.tolist(), slots.tolist(), strict=True)):
        if slot >= 0:
            continue
        if expert not in given and expert in ahead_ids:
            number = ahead_ids.index(expert)
            given[expert] = int(supply.ahead_slots[layer, number])
            _copy_chunks(
                supply, layer, expert, given[expert], range(int(supply.progress[layer, number, 0]), supply.chunks)
            )
        elif expert not in given:
            given[expert] = _spare(supply, used)
            used += 1
            _copy_chunks(supply, layer, expert, given[expert], range(supply.chunks))
        slots[place] = given[expert]
        buffers.table[layer, expert] = given[expert]
    supply.taken[2 * layer] = used


def bring_ahead(buffers: Buffers, layer: int) -> None:
    """Begin to bring what the next layers will probably lack: as if there were time for more and for less, in turns."""
    supply, after = _supply(buffers), layer + 1
    used, limit = int(supply.taken[2 * layer]), int(supply.limits[layer])
    supply.told[layer] = buffers.stamp * STAMP
    near = _likely(buffers, layer, 0)
    for number in range(NEAR, GUESSES):  # what was begun a layer ago, and still seems to be asked for
        expert, begun = int(supply.ahead_ids[after, number]), int(supply.progress[after, number, 0])
        if expert in near:
            near.remove(expert)
            _copy_chunks(supply, after, expert, int(supply.ahead_slots[after, number]), range(begun, supply.chunks))
            supply.progress[after, number] = supply.chunks
    used = _begin(buffers, layer, after, near, range(NEAR), used, limit)
    if after + 1 < len(buffers.slots):
        used = _begin(buffers, layer, after + 1, _likely(buffers, layer, 1), range(NEAR, GUESSES), used, limit)
    supply.taken[2 * layer + 1] = used


def _likely(buffers: Buffers, layer: int, ahead: int) -> list[int]:
    """Return the experts that a layer behind the next so many will probably lack, the likeliest first."""
    after, supply = layer + 1 + ahead, _supply(buffers)
    guesses = dict.fromkeys(buffers.guessed[layer, ahead].T.reshape(-1).tolist())
    missing = [each for each in guesses if buffers.table[after, each] < 0 <= supply.hosted[after, each]]
    return sorted(missing, key=lambda expert: int(buffers.table[after, expert]))


def _begin(  # noqa: PLR0917
    buffers: Buffers, layer: int, target: int, experts: list[int], places: range, used: int, limit: int
) -> int:
    """Begin to bring as many experts as there are places for and spares; returns how many spares are used then."""
    supply, numbers = _supply(buffers), list(places)
    supply.ahead_ids[target, numbers], supply.ahead_slots[target, numbers] = -1, -1
    supply.progress[target, numbers] = 0
    for number, expert in zip(numbers[: max(0, limit - used)], experts, strict=False):
        slot, chunks = _spare(supply, used), (int(buffers.stamp) + layer + used) % 3 * supply.chunks // 2
        _copy_chunks(supply, target, expert, slot, range(chunks))
        supply.ahead_ids[target, number], supply.ahead_slots[target, number] = expert, slot
        supply.progress[target, number] = chunks
        supply.told[layer, number] += expert + 1
        used += 1
    return used


def join(event: None) -> None:
    """Come behind what `bring` brings: it has."""


def join_all(buffers: Buffers) -> None:
    """Come behind all that was brought: it is there."""


def _supply(buffers: Buffers) -> Supply:
    if buffers.supply is None:
        raise RuntimeFault("these steps cannot bring experts by themselves")
    return buffers.supply


def _spare(supply: Supply, number: int) -> int:
    entry = int(supply.spares[number % supply.ring])
    if entry >> 32 != number + 1:
        raise DeviceLost(f"there is no spare slot number {number}")
    return entry & 0xFFFFFFFF


def _copy_chunks(supply: Supply, layer: int, expert: int, slot: int, chunks: range) -> None:
    host, words = int(supply.hosted[layer, expert]), supply.words
    if host < 0:
        raise DeviceLost(f"layer {layer} expert {expert} is not in host memory")
    first, last = (min(words, each * PARTS * CHUNK) for each in (chunks.start, max(chunks.start, chunks.stop)))
    source = supply.source[host * words : (host + 1) * words]
    supply.target[slot * words : (slot + 1) * words][first:last] = source[first:last]


def gate_up(x: torch.Tensor, lanes: Lanes, buffers: Buffers, layer: int, out: torch.Tensor, *, late: bool) -> None:
    """Compute what goes into the down projections, [B, K, F], of experts at hand, or of those that came late."""
    for row, place, slot in _wanted(buffers, layer, late=late):
        base = slot * lanes.stride + lanes.gate_up
        weight = lanes.memory[base : base + 2 * lanes.ffn * lanes.hidden].view(2 * lanes.ffn, lanes.hidden)
        gate, up = functional.linear(x[row], weight).chunk(2)
        out[row, place] = functional.silu(gate) * up


def shared(x: torch.Tensor, score: torch.Tensor, expert: SharedExpert) -> torch.Tensor:
    """Return what an expert that every token uses makes of x, [B, D], weighted by the sigmoid of its score [B, 1]."""
    gate, up = functional.linear(x, expert.gate_up).chunk(2, dim=-1)
    return torch.sigmoid(score) * functional.linear(functional.silu(gate) * up, expert.down)


def down(
    active: torch.Tensor, lanes: Lanes, buffers: Buffers, layer: int, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted sum of the experts' answers, [B, D], and what is beside them."""
    total = torch.zeros((len(active), lanes.hidden), dtype=torch.float32, device=active.device)
    for row, place, slot in _wanted(buffers, layer, late=None):
        base = slot * lanes.stride + lanes.down
        weight = lanes.memory[base : base + lanes.hidden * lanes.ffn].view(lanes.hidden, lanes.ffn)
        total[row] += functional.linear(active[row, place], weight).float() * buffers.weights[layer, row, place]
    answer = total.to(active.dtype)
    return answer if beside is None else answer + beside


def _wanted(buffers: Buffers, layer: int, *, late: bool | None) -> list[tuple[int, int, int]]:
    """Return (row, place, slot) of what is to be computed: all, or only what came late, or what did not."""
    slots, first = buffers.slots[layer].tolist(), buffers.first[layer].tolist()
    return [
        (row, place, slot)
        for row, (now, then) in enumerate(zip(slots, first, strict=True))
        for place, (slot, before) in enumerate(zip(now, then, strict=True))
        if slot >= 0 and (late is None or (before < 0) == late)
    ]
