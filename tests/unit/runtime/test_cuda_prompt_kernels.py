"""The Triton kernels of prompts against plain torch; on a CUDA device, or in Triton's interpreter."""

from typing import Any

import pytest
import torch

from runtime.cuda import prompt_reference
from runtime.cuda.shapes import Heads, Lanes, RouterShape
from tests.unit.runtime.test_cuda_kernels import DEVICE, DTYPES, close, drawn, norms_of, pytestmark

__all__ = ["pytestmark"]

TOKENS, TOP, EXPERTS = 70, 3, 12


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels() -> Any:
    from runtime.cuda import prompt_kernels

    return prompt_kernels


@pytest.mark.parametrize("normed", ["each", "whole", None])
def test_queries_and_keys_are_turned_in_place(kernels: Any, dtype: torch.dtype, normed: str | None) -> None:
    heads = Heads(6, 2, 16, 0.25)
    cos, sin = drawn(1, 5, 16, dtype=dtype, seed=1), drawn(1, 5, 16, dtype=dtype, seed=2)
    norms = norms_of(normed, heads, dtype)
    got, want = (
        each.turn(drawn(5, 10 * 16, dtype=dtype), cos, sin, norms, heads) for each in (kernels, prompt_reference)
    )
    assert got.shape == (5, 10, 16)
    assert close(got, want)
    assert torch.equal(got[:, 8:], drawn(5, 10 * 16, dtype=dtype).view(5, 10, 16)[:, 8:])


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_routers_choose(kernels: Any, dtype: torch.dtype, is_normalised: bool, ahead: int) -> None:
    shape = RouterShape(EXPERTS, TOP, is_normalised, is_rounded=True)
    logits = drawn(TOKENS, (1 + ahead) * EXPERTS, dtype=torch.float32).to(dtype)
    logits = logits + torch.linspace(0, 0.5, logits.shape[1], device=DEVICE).to(dtype)  # hardly two are equal
    got, want = (each.choose(logits, shape) for each in (kernels, prompt_reference))
    assert got.shape == want.shape == (2 + bool(ahead), TOKENS, TOP)
    assert close(got[1].view(torch.float32), want[1].view(torch.float32))
    for mine, theirs, raw in zip(got[::2], want[::2], logits.split(EXPERTS, dim=1), strict=False):
        assert torch.equal(raw.gather(1, mine.long()), raw.gather(1, theirs.long()))


def choices(tokens: int) -> torch.Tensor:
    """Draw [T, K] choices of which one expert gets most rows, and one none."""
    scores = torch.rand((tokens, EXPERTS), generator=torch.Generator().manual_seed(7))
    scores[:, 4] += 0.7
    scores[:, 9] = -1
    return scores.topk(TOP, dim=-1).indices.to(DEVICE)


@pytest.mark.parametrize("tokens", [2, TOKENS])
def test_rows_by_expert(kernels: Any, tokens: int) -> None:
    answers = []
    for each in (kernels, prompt_reference):
        ends = torch.full((EXPERTS,), -5, dtype=torch.int32, device=DEVICE)
        answers.append((each.arrange(choices(tokens), ends), ends))
    (got, got_ends), (want, want_ends) = answers
    assert torch.equal(got, want)
    assert torch.equal(got_ends, want_ends)


@pytest.mark.parametrize(("hidden", "ffn"), [(96, 40), (128, 128)])
@pytest.mark.parametrize("tokens", [2, TOKENS, 300])
def test_experts_in_two_waves(kernels: Any, dtype: torch.dtype, tokens: int, hidden: int, ffn: int) -> None:
    if DEVICE.type == "cpu" and tokens == 300 and dtype != torch.float32:
        pytest.skip("takes long in the interpreter")
    stride = 3 * ffn * hidden + 64
    memory = drawn(9 * stride, dtype=dtype, seed=5) * 0.2
    lanes = Lanes(memory, stride, 0, 2 * ffn * hidden, hidden, ffn)
    first = torch.tensor([8, -1, 2, 0, 5, -1, -1, 1, -1, -1, 3, -1], dtype=torch.int32, device=DEVICE)
    second = torch.where(first < 0, 4, -1).int()
    x, weights = drawn(tokens, hidden, dtype=dtype), drawn(tokens, TOP, dtype=torch.float32, seed=3).abs().to(dtype)
    answers = []
    for each in (kernels, prompt_reference):
        ends = torch.empty(EXPERTS, dtype=torch.int32, device=DEVICE)
        order = each.arrange(choices(tokens), ends)
        active, made = x.new_empty((tokens * TOP, ffn)), x.new_empty((tokens * TOP, hidden))
        for slots in (first, second):
            each.gate_up(x, order, ends, slots, lanes, active)
            each.down(active, order, ends, slots, lanes, made)
        answers.append((made, each.combine(made, weights), each.combine(made, weights, x)))
    for got, want in zip(*answers, strict=True):
        assert close(got, want)
