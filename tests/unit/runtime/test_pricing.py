"""Prices of experts: from gradients, exactly what moving a weight does to the loss."""

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.forcing import cut_pieces
from runtime.loading import load_tokenizer, load_whole
from runtime.pricing import measure_prices
from runtime.routers import routers_of
from schemas.checkpoint import read_checkpoint
from tests.families import FAMILIES, reference

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "examples" / "models" / "tinymoe-demo"


@pytest.fixture(scope="module")
def model():
    return load_whole(DEMO, dtype="float32")


def test_prices_are_relative_and_leave_the_model_as_it_was(model):
    ids = load_tokenizer(DEMO)((ROOT / "LICENSE").read_text(), verbose=False)["input_ids"]
    pieces = cut_pieces([ids], window=64, max_tokens=512)
    before = model(input_ids=pieces[:1, :-1], use_cache=False).logits
    prices, sensitivity = measure_prices(model, pieces, layers=4, experts=16)
    assert sensitivity.given.shape[:2] == (4, 32)
    assert prices.shape == (4, 16)
    assert prices.mean() == pytest.approx(1)
    assert (prices > 0).all()
    assert prices.max() > 1.2 * prices.min()
    assert torch.equal(model(input_ids=pieces[:1, :-1], use_cache=False).logits, before)
    assert not any(each.requires_grad for each in model.parameters())


def test_an_expert_that_puts_out_more_is_dearer(model):
    experts = next(module for module in model.modules() if type(module).__name__.endswith("Experts"))
    ids = torch.arange(1, 258)[None]
    before = measure_prices(model, ids, layers=4, experts=16).experts
    used = []
    hook = routers_of(model)[0].register_forward_hook(lambda _, __, output: used.append(output[2]))
    model(input_ids=ids[:, :-1], use_cache=False)
    hook.remove()
    expert = int(torch.bincount(used[0][:, -1], minlength=16).argmax())
    kept = experts.down_proj.data[expert].clone()
    try:
        experts.down_proj.data[expert] *= 3
        after = measure_prices(model, ids, layers=4, experts=16).experts
    finally:
        experts.down_proj.data[expert] = kept
    others = np.arange(16) != expert
    assert after[0, expert] / after[0, others].mean() > 1.5 * before[0, expert] / before[0, others].mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_prices(checkpoint, family):
    model = reference(checkpoint(family))
    routers, pieces = routers_of(model), torch.arange(2 * 33).view(2, 33)
    experts = read_checkpoint(checkpoint(family)).model_spec.experts
    prices = measure_prices(model, pieces, layers=len(routers), experts=experts).experts
    assert np.isfinite(prices).all()
    assert prices.std() > 0
