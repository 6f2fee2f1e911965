"""Loading the trunk: no expert is read or allocated, transformers is left as it was, faults are told in one line."""

import json
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.monkey_patching import get_patch_mapping

from runtime.loading import RoutedExperts, load_tokenizer, load_trunk, load_whole
from schemas.checkpoint import InvalidCheckpoint, read_checkpoint
from tests.families import FAMILIES, make_checkpoint, reference

HUGE_FFN = 1 << 16  # 16 MiB per matrix: 384 MiB of experts in one layer


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_holds_everything_but_experts(checkpoint, family):
    trunk = load_trunk(checkpoint(family), dtype="float32")
    names = {name for name, _ in trunk.model.named_parameters()}
    assert not [name for name in names if ".experts." in name]
    layers = [module.layer for module in trunk.model.modules() if isinstance(module, RoutedExperts)]
    assert layers == list(range(trunk.spec.layers))
    for name, tensor in reference(checkpoint(family)).state_dict().items():
        if ".experts." not in name:
            assert torch.equal(trunk.model.state_dict()[name], tensor), name
    assert (trunk.has_embedding, trunk.has_head, trunk.stop_ids) == (True, True, {1})


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
    from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
    from transformers.utils import logging

    was = (Qwen3MoeForCausalLM._keys_to_ignore_on_load_unexpected, logging.get_verbosity())
    load_trunk(checkpoint("qwen3_moe"))
    assert get_patch_mapping() == {}
    assert (Qwen3MoeForCausalLM._keys_to_ignore_on_load_unexpected, logging.get_verbosity()) == was
    whole = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"))
    assert whole.model.layers[0].mlp.experts.gate_up_proj.shape == (8, 64, 64)


def test_patches_are_removed_when_loading_fails(tmp_path):
    model = make_checkpoint("qwen3_moe", tmp_path / "model", layers=1)
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "q_proj" not in k}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"weights are missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_trunk(model)
    assert get_patch_mapping() == {}


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
