"""Layers decode leanly where that gives their modules' bits, and only there."""

import pytest
import torch

from runtime.caches import session_cache
from runtime.decoding import Angles
from runtime.lean import Attention, Layer, Mixture
from runtime.leaning import ModuleAttention, ModuleExperts, ModuleLayer, lean_layers
from runtime.loading import TensorPool, load_trunk
from tests.families import FAMILIES

LEAN = {"qwen3_moe", "qwen2_moe", "mixtral", "olmoe"}
DTYPES = ["float32", "bfloat16", "float16"]


def routed(layer, hidden, index, weights):
    """Stand in for experts: whatever it is, it tells who was chosen and with which weight."""
    return hidden * (weights * (index + layer + 1)).sum(-1, keepdim=True).to(hidden.dtype)


def by_modules(trunk, cache, hidden, positions):
    """What the model's own layers make of hidden states [1, T, D]."""
    inner = trunk.model.model
    options = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "attention_mask": None}
    rotary = inner.rotary_emb(hidden, position_ids=positions)
    for layer in inner.layers:
        hidden = layer(hidden, position_embeddings=rotary, **options)
    return inner.norm(hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lean_layer_gives_its_modules_bits(checkpoint, family, dtype):
    trunk = load_trunk(checkpoint(family), dtype=dtype, first_layer=1)
    kinds = {(type(layer.attention), type(layer.experts)) for layer in trunk.decoder.layers}
    attention, experts = (Attention, Mixture) if family in LEAN else (ModuleAttention, Mixture)
    assert kinds == {(attention, ModuleExperts if family.startswith("deepseek") else experts)}
    ours, theirs = session_cache(trunk.model.config, 40), session_cache(trunk.model.config, 40)
    hidden = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(7)).to(trunk.dtype)
    positions = torch.arange(30)[None]
    trunk.dispatch.set(routed)
    with torch.inference_mode():
        for cache in (ours, theirs):
            by_modules(trunk, cache, hidden[:, :12], positions[:, :12])  # gpt_oss's windows are 16
        for at in range(12, 30):
            want = by_modules(trunk, theirs, hidden[:, at : at + 1], positions[:, at : at + 1])
            assert torch.equal(trunk.decoder.run(hidden[0, at : at + 1], [ours], [at], routed, None), want[0])
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(own.keys, other.keys)
        assert torch.equal(own.values, other.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_sessions_of_any_length(checkpoint, family):
    trunk = load_trunk(checkpoint(family), dtype="float32", first_layer=1)
    seen = [3, 25, 12]
    caches = [[session_cache(trunk.model.config, 40) for _ in seen] for _ in range(2)]
    hidden = torch.randn(3, 30, 64, generator=torch.Generator().manual_seed(7))
    trunk.dispatch.set(routed)
    with torch.inference_mode():
        for each in caches:
            for row, (cache, count) in enumerate(zip(each, seen, strict=True)):
                by_modules(trunk, cache, hidden[row : row + 1, :count], torch.arange(count)[None])
        for step in range(4):
            new = hidden[:, 25 + step]
            lengths = [count + step for count in seen]
            alone = [
                trunk.decoder.run(new[row : row + 1], [cache], [lengths[row]], routed, None)
                for row, cache in enumerate(caches[0])
            ]
            together = trunk.decoder.run(new, caches[1], lengths, routed, None)
            torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_whoever_looks_at_routers_sees_each(checkpoint):
    trunk = load_trunk(checkpoint("qwen3_moe"), dtype="float32")
    seen, logits = [], []
    for layer in trunk.model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda router, _, output: logits.append((router, output[0])))
    with torch.inference_mode():
        trunk.decoder.run(
            torch.tensor([5]), [session_cache(trunk.model.config, 4)], [0], routed, lambda *each: seen.append(each)
        )
        trunk.dispatch.set(routed)
        cache = session_cache(trunk.model.config, 4)
        trunk.model.model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert [router for router, _ in seen] == [router for router, _ in logits]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(seen, logits, strict=True))


def test_a_layer_that_computes_otherwise_keeps_its_modules(checkpoint):
    trunk = load_trunk(checkpoint("qwen3_moe"), dtype="float32")
    layers = trunk.model.model.layers
    attend, experts, whole = layers[0].self_attn.forward, layers[1].mlp.forward, layers[2].forward
    layers[0].self_attn.forward = lambda *args, **options: (attend(*args, **options)[0] * 2, None)
    layers[1].mlp.forward = lambda hidden: experts(hidden) + hidden
    layers[2].forward = lambda hidden, **options: whole(hidden, **options) * 2
    layers[3].self_attn.extra = torch.nn.Linear(2, 2)  # a part that nobody knows
    made = lean_layers(trunk.model, torch.float32, trunk.dispatch)
    assert isinstance(made[2], ModuleLayer)
    kinds = [(type(each.attention), type(each.experts)) for each in (made[0], made[1], made[3])]
    assert kinds == [(ModuleAttention, Mixture), (Attention, ModuleExperts), (ModuleAttention, Mixture)]
    assert all(isinstance(layer, Layer) for layer in (made[0], made[1], made[3]))


def test_projections_are_one_tensor_that_ranges_share(checkpoint):
    pool = TensorPool()
    first = load_trunk(checkpoint("qwen2_moe"), last_layer=2, pool=pool)
    second = load_trunk(checkpoint("qwen2_moe"), first_layer=1, pool=pool)
    ours, theirs = first.decoder.layers[1].attention, second.decoder.layers[0].attention
    assert (
        ours.qkv.data_ptr() == theirs.qkv.data_ptr() == first.model.model.layers[1].self_attn.q_proj.weight.data_ptr()
    )
    assert ours.bias.data_ptr() == theirs.bias.data_ptr()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_angles_are_those_of_each_position_alone(checkpoint, family):
    rotary = load_trunk(checkpoint(family), dtype="float32").model.model.rotary_emb
    table = Angles(rotary, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        for position in (0, 1, 255, 256, 400, 511):
            cosine, sine = table.at(position)
            want = rotary(torch.empty(1, 1, 1), position_ids=torch.tensor([[position]]))
            half = sine.shape[-1] // 2
            assert torch.equal(cosine, want[0][0])
            assert torch.equal(torch.cat((-sine[:, :half], sine[:, half:]), -1), want[1][0])
