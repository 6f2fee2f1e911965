"""Norms compute in one operation wherever that gives their own bits, and only there."""

import pytest
import torch

from runtime.loading import load_trunk
from runtime.quick import quicken
from tests.families import FAMILIES


def norms(model):
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_norms_give_their_own_bits(checkpoint, family, dtype):
    trunk = load_trunk(checkpoint(family), dtype=dtype)
    assert all("forward" in vars(norm) for norm in norms(trunk.model))
    for norm in norms(trunk.model):
        hidden = 30 * torch.randn(9, *norm.weight.shape, generator=torch.Generator().manual_seed(5)).to(
            norm.weight.dtype
        )
        with torch.inference_mode():
            assert torch.equal(norm(hidden), type(norm).forward(norm, hidden))


def test_a_norm_that_computes_otherwise_is_left_alone():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, hidden):
            return hidden * (1 + self.weight)

    odd = OddRMSNorm()
    quicken(odd, torch.float32)
    assert "forward" not in vars(odd)
