"""The Triton kernels against plain torch; on a CUDA device, or in Triton's interpreter where TRITON_INTERPRET is set."""

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from runtime.cuda import reference
from runtime.cuda.buffers import STAMP, Buffers, KeyValues, arrived, make_buffers
from runtime.cuda.shapes import HeadNorms, Heads, Lanes, RouterShape, Scale, SharedExpert
from runtime.cuda.supply import CHUNK, PARTS, WHOLE, Spares, make_supply

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")),
    reason="needs Triton and a CUDA device, or its interpreter",
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
ROWS, HIDDEN, FFN, EXPERTS, TOP, SLOTS = 2, 96, 40, 12, 3, 9


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels() -> Any:
    from runtime.cuda import kernels

    return kernels


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    tolerance = 1e-5 if want.dtype == torch.float32 else 1e-2
    return bool(((got.double() - want.double()).norm() / want.double().norm()) < tolerance)


def lanes_of(dtype: torch.dtype) -> Lanes:
    gate_up, down = 2 * FFN * HIDDEN, HIDDEN * FFN
    stride = gate_up + down + 64
    return Lanes(drawn(SLOTS * stride, dtype=dtype, seed=5) * 0.2, stride, 0, gate_up, HIDDEN, FFN)


def filled() -> Buffers:
    """One layer whose row 0 lacks one expert, and whose row 1 has one that nobody computes."""
    buffers = make_buffers(DEVICE, layers=1, rows=ROWS, experts=EXPERTS, top_k=TOP)
    buffers.slots[0] = torch.tensor([[4, 2, 8], [0, -1, 3]])
    buffers.first[0] = torch.tensor([[4, -1, 8], [0, -1, 3]])
    buffers.weights[0] = drawn(ROWS, TOP, dtype=torch.float32, seed=3).abs()
    return buffers


def test_norm_of_a_sum(kernels: Any, dtype: torch.dtype) -> None:
    x, delta, weight = (drawn(ROWS, HIDDEN, dtype=dtype, seed=n) for n in range(3))
    for added in (None, delta):
        got, want = (each.add_norm(x, added, weight[0], 1e-6) for each in (kernels, reference))
        assert close(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_products(kernels: Any, dtype: torch.dtype, rows: int) -> None:
    x, delta = (drawn(rows, HIDDEN, dtype=dtype, seed=n) for n in range(2))
    weight, norm = drawn(50, HIDDEN, dtype=dtype, seed=2), Scale(drawn(HIDDEN, dtype=dtype, seed=3), 1e-6)
    assert close(kernels.product(x, weight), reference.product(x, weight))
    for added, bias in ((None, drawn(50, dtype=dtype, seed=4)), (delta, None)):
        got, want = (each.normed_product(x, added, norm, weight, bias) for each in (kernels, reference))
        assert all(close(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_expert_that_every_token_uses(kernels: Any, dtype: torch.dtype, rows: int) -> None:
    x, logits = drawn(rows, HIDDEN, dtype=dtype), drawn(rows, EXPERTS + 1, dtype=dtype, seed=1)
    gate_up, down = drawn(2 * 50, HIDDEN, dtype=dtype, seed=2) * 0.2, drawn(HIDDEN, 50, dtype=dtype, seed=3)
    expert = SharedExpert(gate_up, down, drawn(1, HIDDEN, dtype=dtype, seed=4))
    got, want = (each.shared(x, logits[:, -1:], expert) for each in (kernels, reference))
    assert close(got, want)


def norms_of(kind: str | None, heads: Heads, dtype: torch.dtype) -> HeadNorms | None:
    """Draw norms of queries and keys."""
    if kind is None:
        return None
    sizes = [count * heads.size if kind == "whole" else heads.size for count in (heads.queries, heads.kv)]
    weights = [drawn(size, dtype=dtype, seed=3 + number) for number, size in enumerate(sizes)]
    return HeadNorms(*weights, 1e-6, is_whole=kind == "whole")


@pytest.mark.parametrize("factor", [None, 4.0])
def test_angles(kernels: Any, dtype: torch.dtype, factor: float | None) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if factor is not None:
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 4096}
    config = Qwen3MoeConfig(head_dim=24, max_position_embeddings=16384, rope_parameters=parameters)
    rotary = Qwen3MoeRotaryEmbedding(config).to(DEVICE)
    positions = torch.tensor([0, 3, 16001], device=DEVICE)
    for got, want in zip(*(each.angles(rotary, positions, dtype) for each in (kernels, reference)), strict=True):
        assert got.shape == want.shape == (3, 1, 24)
        assert close(got, want)


@pytest.mark.parametrize("normed", ["each", "whole", None])
def test_rotation_and_attention(kernels: Any, dtype: torch.dtype, normed: str | None) -> None:
    heads, most = Heads(6, 2, 16, 0.25), 80
    qkv = drawn(ROWS, 10 * 16, dtype=dtype)
    cos, sin = drawn(ROWS, 1, 16, dtype=dtype, seed=1), drawn(ROWS, 1, 16, dtype=dtype, seed=2)
    norms = norms_of(normed, heads, dtype)
    answers = []
    for each in (kernels, reference):
        caches = [tuple(drawn(2, most, 16, dtype=dtype, seed=9 + row + n) for n in (0, 5)) for row in range(ROWS)]
        kv = KeyValues(
            torch.tensor([[[t.data_ptr() for t in row] for row in caches]], device=DEVICE),
            torch.full((ROWS,), most * 16, device=DEVICE),
            torch.tensor([70, 3], device=DEVICE),
            [caches],  # type: ignore[list-item]
        )
        queries = each.rotate_store(qkv, cos, sin, norms, heads, kv, 0)
        answers.append((queries, each.attend(queries, heads, kv, 0), caches))
    (got_q, got, got_caches), (want_q, want, want_caches) = answers
    assert close(got_q, want_q)
    assert close(got, want)
    for ours, theirs in zip(got_caches, want_caches, strict=True):
        assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("behind", [0, 1])  # what weighs an expert that every token uses
def test_routing_tells_the_host(kernels: Any, dtype: torch.dtype, is_normalised: bool, behind: int) -> None:
    shape = RouterShape(EXPERTS, TOP, is_normalised, is_rounded=True)
    logits = drawn(ROWS, 3 * EXPERTS + behind, dtype=dtype)
    table = torch.arange(EXPERTS, dtype=torch.int32) * 2 - 3
    told = []
    for each in (kernels, reference):
        buffers = make_buffers(DEVICE, layers=1, rows=ROWS, experts=EXPERTS, top_k=TOP)
        buffers.table[0] = table
        buffers.control[0] = 7
        each.route(logits, shape, buffers, 0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        told.append(buffers)
    got, want = told
    assert torch.equal(got.mail.ids, want.mail.ids)
    assert torch.equal(got.mail.guesses, want.mail.guesses)
    chosen = arrived(got.mail.ids[0].cpu().numpy(), 7)
    assert chosen is not None
    assert (chosen.found == (chosen.experts > 1)).all()
    assert torch.equal(got.slots, want.slots)
    assert torch.equal(got.first, want.slots)
    assert close(got.weights, want.weights)
    assert close(got.mail.weights, want.mail.weights)
    assert close(got.mail.scores, want.mail.scores)


def test_experts_read_where_they_lie(kernels: Any, dtype: torch.dtype) -> None:
    lanes, x = lanes_of(dtype), drawn(ROWS, HIDDEN, dtype=dtype)
    answers = []
    for each in (kernels, reference):
        buffers = filled()
        late = buffers.slots.clone()
        buffers.slots.copy_(buffers.first)
        active = torch.zeros((ROWS, TOP, FFN), dtype=dtype, device=DEVICE)
        each.gate_up(x, lanes, buffers, 0, active, late=False)
        assert not active[0, 1].any()
        buffers.slots.copy_(late)
        each.gate_up(x, lanes, buffers, 0, active, late=True)
        beside = drawn(ROWS, HIDDEN, dtype=dtype, seed=4)
        answers.append((active, *(each.down(active, lanes, buffers, 0, more) for more in (None, beside))))
    for got, want in zip(*answers, strict=True):
        assert close(got, want)


def test_what_was_waited_for_is_taken_from_the_host(kernels: Any) -> None:
    for each in (kernels, reference):
        buffers = filled()
        buffers.control[0] = 2
        buffers.released[0] = 3
        buffers.inbox_slots.copy_(torch.tensor([4, 6, 8, 0, -1, 3], dtype=torch.int32))
        buffers.inbox_weights.copy_(torch.arange(6.0))
        each.wait(buffers, 0)
        assert buffers.slots[0].tolist() == [[4, 6, 8], [0, -1, 3]]
        assert buffers.weights[0].tolist() == [[0, 1, 2], [3, 4, 5]]
        whole = filled()
        whole.slots[0] = 1
        before = whole.weights.clone()
        each.wait(whole, 0)
        assert torch.equal(whole.weights, before)


WORDS = PARTS * CHUNK + 3200  # two chunks of each program, the last of some of them empty


def supplied(*, spare: list[int], layers: int = 2) -> tuple[Buffers, Spares]:
    """Two layers or more; row 0 of the first lacks experts 5 and 2, row 1 lacks 5, and has 7 in slot 1."""
    source, target = (
        torch.randint(1, 1 << 40, (n * WORDS,), generator=torch.Generator().manual_seed(n)) for n in (6, 9)
    )
    if DEVICE.type == "cuda":
        source, target = source.pin_memory(), target.to(DEVICE)
    supply = make_supply(DEVICE, source, target, 8 * WORDS, layers=layers, experts=EXPERTS)
    buffers = make_buffers(DEVICE, layers=layers, rows=2, experts=EXPERTS, top_k=2, supply=supply)
    buffers.control[0], buffers.control[1] = 4, 0
    buffers.table[0, 7] = 1
    buffers.table[1, 3] = 0
    buffers.chosen[0] = torch.tensor([[5, 2], [7, 5]])
    buffers.first[0] = buffers.slots[0] = torch.tensor([[-1, -1], [1, -1]])
    buffers.guessed[0, 0] = torch.tensor([[3, 8], [9, 4]])
    buffers.table[1, 8:10] = torch.tensor([-2, -3], dtype=torch.int32)
    supply.hosted[0, :6] = torch.arange(6)
    supply.hosted[1, 6:] = torch.arange(6)
    spares = Spares(supply.own_spares.numpy()[:-1])
    spares.append(spare)
    supply.spares.copy_(supply.own_spares)
    supply.limits[:] = spares.end
    return buffers, spares


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("guessed", [None, 5])
def test_a_device_brings_what_a_layer_lacks(kernels: Any, guessed: int | None) -> None:
    made = []
    for each in (kernels, reference):
        buffers, _ = supplied(spare=[8, 6, 3])
        supply = buffers.supply
        assert supply is not None
        if guessed is not None:  # half of it is there already
            supply.ahead_ids[0, 1], supply.ahead_slots[0, 1], supply.progress[0, 1] = guessed, 7, 1
            half = PARTS * CHUNK
            supply.target[7 * WORDS : 7 * WORDS + half] = supply.source[5 * WORDS : 5 * WORDS + half]
        each.join(each.bring(buffers, 0))
        each.join_all(buffers)
        synchronize()
        made.append((buffers, supply))
    (got, ours), (want, theirs) = made
    assert want.slots[0].tolist() == ([[8, 6], [1, 8]] if guessed is None else [[7, 8], [1, 7]])
    assert torch.equal(ours.target, theirs.target)
    lying = theirs.target.view(-1, WORDS).cpu()
    assert torch.equal(lying[want.slots[0, 0, 0]], theirs.source.view(-1, WORDS)[5].cpu())
    assert torch.equal(lying[want.slots[0, 0, 1]], theirs.source.view(-1, WORDS)[2].cpu())
    for a, b in zip(
        (got.slots, got.table, ours.taken, ours.ended),
        (want.slots, want.table, theirs.taken, theirs.ended),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert ours.ended[0].tolist() == [4 * STAMP, 4 * STAMP + (0 if guessed is None else WHOLE // 2), 4 * STAMP]


@pytest.mark.parametrize("is_late", [True, False])
def test_a_device_brings_ahead_until_the_next_router_runs(kernels: Any, is_late: bool) -> None:
    made = []
    for each in (kernels, reference):
        buffers, _ = supplied(spare=[8, 6, 3])
        supply = buffers.supply
        assert supply is not None
        supply.routed[0] = 4 * 2 + 2 if is_late else 4 * 2 + 1
        each.bring_ahead(buffers, 0)
        each.join_all(buffers)
        synchronize()
        made.append(supply)
    ours, theirs = made
    assert theirs.ahead_ids[1].tolist() == [9, 8, -1]  # the likeliest first; 3 is in a slot, 4 not in host memory
    for a, b in ((ours.ahead_ids, theirs.ahead_ids), (ours.ahead_slots, theirs.ahead_slots), (ours.told, theirs.told)):
        assert torch.equal(a, b)
    assert torch.equal(ours.taken[:2], theirs.taken[:2])
    lying, source = ours.target.view(-1, WORDS).cpu(), ours.source.view(-1, WORDS).cpu()
    assert (ours.progress[1, :2] == (0 if is_late else 2)).all()
    for slot, host in ((8, 3), (6, 2)):
        assert torch.equal(lying[slot], source[host]) != is_late


@pytest.mark.parametrize("is_still_likely", [True, False])
def test_a_device_goes_on_with_what_it_began_for_the_layer_after_the_next(kernels: Any, is_still_likely: bool) -> None:
    made = []
    for each in (kernels, reference):
        buffers, _ = supplied(spare=[8, 6, 3], layers=3)
        supply = buffers.supply
        assert supply is not None
        buffers.control[0] = 6
        supply.hosted[2, 4:6] = torch.tensor([1, 5])
        buffers.guessed[0, 0] = 3  # which is in a slot
        buffers.guessed[0, 1], buffers.guessed[1, 0] = 4, 4 if is_still_likely else 5
        supply.routed[0] = 6 * 3 + 2  # there is no time for it
        each.bring_ahead(buffers, 0)
        each.join_all(buffers)
        synchronize()
        assert (supply.progress[2, 2] == 0).all()
        supply.routed[0] = 6 * 3 + 1
        supply.taken[2] = supply.taken[1]
        each.bring_ahead(buffers, 1)
        each.join_all(buffers)
        synchronize()
        made.append(supply)
    ours, theirs = made
    assert theirs.ahead_ids.tolist() == [[-1] * 3, [-1] * 3, [-1 if is_still_likely else 5, -1, 4]]
    assert theirs.ahead_slots[2].tolist() == [-1 if is_still_likely else 6, -1, 8]
    assert theirs.told.tolist() == [[6 * STAMP] * 2 + [6 * STAMP + 5], ours.told[1].tolist(), [0] * 3]
    for a, b in ((ours.ahead_ids, theirs.ahead_ids), (ours.ahead_slots, theirs.ahead_slots), (ours.told, theirs.told)):
        assert torch.equal(a, b)
    assert torch.equal(ours.taken, theirs.taken)
    assert (ours.progress[2, 2] == (2 if is_still_likely else 0)).all()
    slot, host = (8, 1) if is_still_likely else (6, 5)
    assert torch.equal(ours.target.view(-1, WORDS)[slot].cpu(), ours.source.view(-1, WORDS)[host].cpu())


def test_a_device_leaves_what_it_began_where_host_memory_has_lost_it(kernels: Any) -> None:
    buffers, _ = supplied(spare=[8, 6, 3], layers=3)
    supply = buffers.supply
    assert supply is not None
    buffers.control[0] = 6
    supply.hosted[2, 4] = 1
    buffers.guessed[0, 0] = 3  # which is in a slot
    buffers.guessed[0, 1], buffers.guessed[1, 0] = 4, 4
    supply.routed[0] = 6 * 3 + 2  # there is no time for it
    kernels.bring_ahead(buffers, 0)
    kernels.join_all(buffers)
    synchronize()
    supply.hosted[2, 4] = -1  # the host made room for what the next layer lacked
    supply.routed[0] = 6 * 3 + 1
    supply.taken[2] = supply.taken[1]
    before = supply.target.clone()
    kernels.bring_ahead(buffers, 1)
    kernels.join_all(buffers)
    synchronize()
    assert (supply.progress[2, 2] == 0).all()
    assert torch.equal(supply.target, before)


def test_guesses_leave_spares_behind_their_limit(kernels: Any) -> None:
    for each in (kernels, reference):
        buffers, _ = supplied(spare=[8, 6, 3])
        assert buffers.supply is not None
        buffers.supply.limits[0] = 1
        each.bring_ahead(buffers, 0)
        synchronize()
        assert buffers.supply.ahead_ids[1].tolist() == [9, -1, -1]
        assert buffers.supply.taken[1] == 1


def test_a_device_that_cannot_stop_what_it_began_says_so(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.cuda.fetch_kernels._SPIN_LIMIT", 3)
    buffers, _ = supplied(spare=[8, 6, 3])
    supply = buffers.supply
    assert supply is not None
    buffers.chosen[1], buffers.first[1], buffers.slots[1] = buffers.chosen[0], buffers.first[0], buffers.slots[0]
    before = supply.target.clone()
    supply.stopped[:] = 4 * 2 + 2
    supply.stopped[3] -= 1
    kernels.join(kernels.bring(buffers, 1))
    kernels.join_all(buffers)
    synchronize()
    assert buffers.mail.waited_ns[0].tolist() == [0, -1]
    assert torch.equal(supply.target, before)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="what runs at the same time needs a CUDA device")
def test_what_was_begun_ahead_is_whole_wherever_it_was_stopped(kernels: Any) -> None:
    buffers, _ = supplied(spare=[8, 6, 3])
    supply = buffers.supply
    assert supply is not None
    rows = 80  # as many chunks as it takes to be stopped in the middle
    words = rows * PARTS * CHUNK
    source = torch.randint(1, 1 << 40, (6 * words,)).pin_memory()
    supply = replace(
        supply, source=source, target=torch.zeros(9 * words, dtype=torch.int64, device=DEVICE), words=words
    )
    buffers = replace(buffers, supply=supply)
    buffers.chosen[1] = torch.tensor([[9, 3], [3, 9]])
    buffers.first[1] = torch.tensor([[-1, 0], [0, -1]])
    main, partly = torch.cuda.current_stream(), 0
    for turn in range(60):
        now = buffers.control[0] = 5 + turn
        supply.target.zero_()
        buffers.slots[1] = buffers.first[1]
        buffers.table[1, 9], supply.taken[0] = -3, 0
        synchronize()
        kernels.bring_ahead(buffers, 0)
        torch.cuda._sleep(2000 + 700 * turn)  # cycles of this stream, on which the router is
        supply.routed.fill_(now * 2 + 2)
        kernels.join(kernels.bring(buffers, 1))
        kernels.join_all(buffers)
        main.synchronize()
        came = supply.progress[1, 0]
        partly += int((came > 0).any() and (came < rows).any())
        assert torch.equal(supply.target.view(-1, words)[8].cpu(), source.view(-1, words)[3]), came.tolist()
    assert partly
