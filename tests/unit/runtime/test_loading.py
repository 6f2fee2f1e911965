"""Loading the trunk: no expert is read or allocated, transformers is left as it was, faults are told in one line."""

import gc
import json
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import InvalidStore
from runtime.loading import RoutedExperts, TensorPool, load_tokenizer, load_trunk, load_whole
from runtime.trunk import CheckpointSource, RecordSource, part_keys
from schemas.checkpoint import InvalidCheckpoint, read_checkpoint
from tests.families import FAMILIES, make_checkpoint, make_store, reference

HUGE_FFN = 1 << 16  # 16 MiB per matrix: 384 MiB of experts in one layer


def held(model, first=0, last=3):
    """Parameters and buffers of a model by their names in the whole one, of layers first … last and the rotary."""
    found = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        found[".".join(parts)] = tensor
    return found


def wanted(model, first, last):
    def is_wanted(name):
        parts = name.split(".")
        if ".experts." in name:
            return False
        if parts[:2] == ["model", "layers"]:
            return first <= int(parts[2]) <= last
        ends = {"embed_tokens": first == 0, "norm": last == 3, "weight": last == 3}
        return "rotary_emb" in parts or any(wanted for part, wanted in ends.items() if part in parts[:2])

    return {name: tensor for name, tensor in held(model).items() if is_wanted(name)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_range_is_what_from_pretrained_builds(checkpoint, family, dtype):
    whole = reference(checkpoint(family), dtype=dtype)
    for first, last in [(0, 3), (0, 0), (1, 2), (2, 3)]:
        trunk = load_trunk(
            checkpoint(family), dtype=str(dtype).removeprefix("torch."), first_layer=first, last_layer=last
        )
        got, want = held(trunk.model, first), wanted(whole, first, last)
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert tensor.dtype == got[name].dtype, name
            assert torch.equal(tensor, got[name]), name
        assert trunk.model.config._attn_implementation == whole.config._attn_implementation
        assert trunk.stop_ids == {1}
        layers = [module.layer for module in trunk.model.modules() if isinstance(module, RoutedExperts)]
        assert layers == [n for n, decoder in enumerate(trunk.spec.moe_layer_indices) if first <= decoder <= last]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_records_give_the_trunk_of_the_checkpoint(checkpoint, tmp_path, family, dtype):
    store = make_store(checkpoint(family), tmp_path / "store", dtype)
    card = tmp_path / "card"
    shutil.copytree(store.path, card, ignore=shutil.ignore_patterns("records.bin"))
    records = {key: store.read(part.sha256) for key, part in store.trunk.items()}
    for first, last in [(0, 1), (2, 3)]:
        ends = {"first_layer": first, "last_layer": last}
        want = load_trunk(checkpoint(family), dtype=dtype, **ends)
        needed = {key: records[key] for key in part_keys(first, last, 4)}
        for got in (load_trunk(store.path, **ends), load_trunk(card, source=RecordSource(needed), **ends)):
            assert got.spec.model_copy(update={"id": want.spec.id}) == want.spec
            assert got.stop_ids == want.stop_ids
            assert held(got.model).keys() == held(want.model).keys()
            assert all(torch.equal(tensor, held(want.model)[name]) for name, tensor in held(got.model).items())
    with pytest.raises(InvalidStore, match=r"holds no records\.bin"):
        load_trunk(card)
    with pytest.raises(InvalidStore, match="no record of layer 1"):
        load_trunk(card, source=RecordSource(needed), first_layer=1)
    with pytest.raises(InvalidStore, match="layer 2 is damaged"):
        load_trunk(card, source=RecordSource(needed | {("layer", 2): b"nothing"}), first_layer=2)


def test_only_the_tensors_of_the_range_are_read(checkpoint):
    class Recording:
        def __init__(self):
            self.source, self.asked = CheckpointSource(read_checkpoint(checkpoint("olmoe"))), []

        def tensors(self, part, layer):
            self.asked.append((part, layer))
            return self.source.tensors(part, layer)

    source = Recording()
    load_trunk(checkpoint("olmoe"), first_layer=2, source=source)
    assert source.asked == [("layer", 2), ("layer", 3), ("head", 3)]


def test_ranges_of_one_pool_share_their_weights(checkpoint, store, tmp_path):
    pool = TensorPool()
    ends = load_trunk(checkpoint("deepseek_v3"), last_layer=2, pool=pool)
    names = set(pool)
    later = load_trunk(checkpoint("deepseek_v3"), first_layer=1, last_layer=2, pool=pool)
    assert set(pool) == names  # nothing was read again
    first, second = held(ends.model), held(later.model, 1)
    assert all(first[name] is second[name] for name in second if "rotary" not in name)
    card = shutil.copytree(store("deepseek_v3").path, tmp_path / "card", ignore=shutil.ignore_patterns("records.bin"))
    load_trunk(card, first_layer=1, last_layer=2, pool=pool)  # nothing is missing, so no records are needed
    del ends, first
    gc.collect()
    assert set(pool) == {name for name in second if "rotary" not in name}


def test_draft_layers_are_neither_counted_nor_read(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    draft = {
        name.replace("layers.3", "layers.4"): tensor.clone() for name, tensor in weights.items() if "layers.3" in name
    }
    draft["model.layers.4.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights | draft, model / "model.safetensors", {"format": "pt"})
    spec = read_checkpoint(checkpoint("deepseek_v3")).model_spec
    assert read_checkpoint(model).model_spec.model_copy(update={"id": spec.id}) == spec
    want, got = held(load_trunk(checkpoint("deepseek_v3")).model), held(load_trunk(model).model)
    assert got.keys() == want.keys()
    assert len(make_store(model, tmp_path / "store").trunk) == 6


@pytest.mark.parametrize("is_written", [False, True])
def test_tied_weights_are_held_once_and_sent_with_both_ends(tmp_path, is_written):
    model = make_checkpoint("olmoe", tmp_path / "model", layers=2)
    text = (model / "config.json").read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    (model / "config.json").write_text(text)
    weights = load_file(model / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()} if is_written else {}
    save_file(
        {k: v for k, v in weights.items() if k != "lm_head.weight"} | head,
        model / "model.safetensors",
        {"format": "pt"},
    )
    store = make_store(model, tmp_path / "store")
    for place in (model, store.path):
        whole, end = load_trunk(place), load_trunk(place, first_layer=1)
        assert whole.model.lm_head.weight.data_ptr() == whole.model.model.embed_tokens.weight.data_ptr()
        assert torch.equal(end.model.lm_head.weight, whole.model.model.embed_tokens.weight)
        assert torch.equal(end.model.lm_head.weight, reference(model).lm_head.weight)


def resident_bytes():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_experts_are_neither_read_nor_allocated(tmp_path):
    model = make_checkpoint("mixtral", tmp_path / "model", layers=1)
    weights = load_file(model / "model.safetensors")
    trunk_only = {name: tensor.clone() for name, tensor in weights.items() if ".experts." not in name}
    (model / "model.safetensors").unlink()
    save_file(trunk_only, model / "trunk.safetensors", {"format": "pt"})
    experts = [name for name in weights if ".experts." in name]
    write_sparse(model / "experts.safetensors", experts)
    files = dict.fromkeys(trunk_only, "trunk.safetensors") | dict.fromkeys(experts, "experts.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": HUGE_FFN}))
    assert read_checkpoint(model).model_spec.total_expert_bytes == 384 << 20
    before = resident_bytes()
    trunk = load_trunk(model, dtype="float32")
    assert resident_bytes() - before < 60 << 20
    assert torch.equal(trunk.model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


def write_sparse(path, names):
    """A safetensors file of huge experts, all holes: reading it would show in memory, having it costs nothing."""
    size, header = HUGE_FFN * 64 * 4, {}
    for index, name in enumerate(names):
        shape = [64, HUGE_FFN] if ".w2." in name else [HUGE_FFN, 64]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [index * size, (index + 1) * size]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + len(names) * size)


def test_transformers_is_left_as_it_was(checkpoint):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    was = logging.get_verbosity()
    load_trunk(checkpoint("qwen3_moe"))
    assert logging.get_verbosity() == was
    whole = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"))
    assert whole.model.layers[0].mlp.experts.gate_up_proj.shape == (8, 64, 64)


def test_patches_are_removed_when_loading_fails(tmp_path):
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    model, experts = make_checkpoint("qwen3_moe", tmp_path / "model", layers=1), modeling_qwen3_moe.Qwen3MoeExperts
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "q_proj" not in k}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"weights are missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_trunk(model)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"num_key_value_heads": 2', '"num_key_value_heads": 0'))
    with pytest.raises(InvalidCheckpoint):
        load_trunk(model)
    assert modeling_qwen3_moe.Qwen3MoeExperts is experts is not RoutedExperts


def test_a_config_of_another_model_is_refused(tmp_path):
    model = make_checkpoint("qwen3_moe", tmp_path / "model", layers=1)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"vocab_size": 256', '"vocab_size": 300'))
    with pytest.raises(InvalidCheckpoint, match=r"other shapes than its config\.json says"):
        load_trunk(model)


def test_trunks_and_whole_models_load_from_several_threads(checkpoint):
    found, faults = [], []

    def load(what):
        try:
            found.append(what(checkpoint("olmoe"), dtype="float32"))
        except Exception as error:  # noqa: BLE001
            faults.append(error)

    checkpoint("olmoe")
    threads = [threading.Thread(target=load, args=(what,)) for what in (load_trunk, load_whole) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    with_experts = [
        hasattr(each, "lm_head") and hasattr(each.model.layers[0].mlp.experts, "down_proj") for each in found
    ]
    assert sorted(with_experts) == [False] * 3 + [True] * 3


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 4)])
def test_a_range_outside_of_the_model_is_refused(checkpoint, first, last):
    with pytest.raises(InvalidCheckpoint, match="layers are 0 … 3"):
        load_trunk(checkpoint("olmoe"), first_layer=first, last_layer=last)


def test_a_range_has_only_its_ends(checkpoint):
    middle = load_trunk(checkpoint("gpt_oss"), first_layer=1, last_layer=2)
    names = {name for name, _ in middle.model.named_parameters()}
    assert {name.split(".")[1] for name in names} == {"layers"}
    assert not middle.has_embedding
    assert not middle.has_head


def test_a_missing_tokenizer_is_told(tmp_path):
    model = make_checkpoint("olmoe", tmp_path / "model", layers=1)
    with pytest.raises(InvalidCheckpoint, match="has no tokenizer"):
        load_tokenizer(model)
