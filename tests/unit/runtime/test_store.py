"""Stores: records equal the checkpoint's weights, bad input is refused, nothing is left half-written."""

import errno
import hashlib
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from runtime import store as store_module
from runtime.errors import DiskFull, InvalidInput, InvalidStore
from runtime.models import open_model
from runtime.precision import UnfitPrecision, pack_record, packed_layout
from runtime.store import Store, layout_of, prepare_store
from runtime.tensors import torch_dtype
from schemas.checkpoint import InvalidCheckpoint, read_checkpoint
from schemas.store import RECORDS_NAME
from tests.families import make_checkpoint


def tensors_of(store, key):
    record = store.by_key[key]
    data = np.frombuffer(store.read(record.sha256), dtype=np.uint8).copy()
    elements = torch.from_numpy(data).view(torch_dtype(store.manifest.dtype))
    starts = [part.offset // elements.element_size() for part in store.manifest.layout.parts]
    return {
        part.name: elements[start : start + part.elements].view(part.shape)
        for start, part in zip(starts, store.manifest.layout.parts, strict=True)
    }


@pytest.mark.parametrize("dtype", ["checkpoint", "float32", "float16", "bfloat16"])
def test_records_hold_the_weights_of_each_expert(checkpoint, tmp_path, dtype):
    seen = []
    prepare_store(
        checkpoint("mixtral"), tmp_path / "s", dtype=dtype, progress=lambda done, total: seen.append((done, total))
    )
    store, weights = Store.open(tmp_path / "s"), load_file(checkpoint("mixtral") / "model.safetensors")
    assert seen == [(n, 38) for n in range(1, 39)]  # 4 × 8 experts, 4 layers, embedding and head
    held = torch_dtype(store.manifest.dtype)
    assert store.manifest.model.expert_bytes == 3 * 64 * 32 * held.itemsize
    prefix = "model.layers.2.block_sparse_moe.experts.5."
    gate, up, down = (weights[f"{prefix}{name}.weight"].to(held) for name in ("w1", "w3", "w2"))
    found = tensors_of(store, (2, 5))
    assert torch.equal(found["gate_up_proj"], torch.cat([gate, up]))
    assert torch.equal(found["down_proj"], down)


def test_gpt_oss_records_keep_its_own_layout(checkpoint, store):
    weights = load_file(checkpoint("gpt_oss") / "model.safetensors")
    found = tensors_of(store("gpt_oss"), (1, 3))
    assert found.keys() == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[f"model.layers.1.mlp.experts.{name}"][3])


def test_records_are_aligned_and_named_by_content(store):
    opened = store("deepseek_v3")
    assert opened.manifest.model.moe_layer_indices == (1, 2, 3)  # the first layer is dense
    for record in opened.manifest.records:
        assert record.offset % 4096 == 0
        assert hashlib.sha256(opened.read(record.sha256)).hexdigest() == record.sha256
    first = opened.manifest.records[0]
    assert opened.read(first.sha256, 100, 50) == opened.read(first.sha256)[100:150]
    with pytest.raises(InvalidInput, match="leave its"):
        opened.read(first.sha256, first.bytes, 1)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_trunk_records_are_whole_safetensors_files(checkpoint, store, family):
    opened, weights = store(family), load_file(checkpoint(family) / "model.safetensors")
    assert list(opened.trunk) == [("embedding", 0), *(("layer", layer) for layer in range(4)), ("head", 3)]
    found = {}
    for part in opened.trunk.values():
        assert part.offset % 4096 == 0
        assert hashlib.sha256(opened.read(part.sha256)).hexdigest() == part.sha256
        found |= load(opened.read(part.sha256))
    wanted = {name.replace("block_sparse_moe", "mlp"): name for name in weights if ".experts." not in name}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weights[stored]) for name, stored in wanted.items())
    spec = opened.manifest.model
    sizes = sum(tensor.nbytes for tensor in found.values())
    assert sizes <= spec.trunk_bytes == spec.range_bytes(range(4)) <= sizes + spec.num_decoder_layers


def test_a_store_has_what_a_node_needs_beside_weights(tmp_path):
    model = make_checkpoint("olmoe", tmp_path / "model", layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (model / name).write_text(name)
    prepare_store(model, tmp_path / "s")
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(left(tmp_path / "s")) == beside | {"manifest.json", "records.bin"}
    assert (tmp_path / "s" / "tokenizer.json").read_text() == "tokenizer.json"


def test_a_checkpoint_without_its_whole_trunk_makes_no_store(tmp_path):
    model = make_checkpoint("olmoe", tmp_path / "model", layers=1)
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "q_proj" not in k}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"weights are missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        prepare_store(model, tmp_path / "s")
    assert left(tmp_path) == ["model"]


def test_a_manifest_that_skips_a_part_is_refused(store, tmp_path):
    copy = shutil.copytree(store("olmoe").path, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"trunk": manifest["trunk"][:-1]}))
    with pytest.raises(InvalidStore, match="does not list embedding, layers 0 … 3 and head once"):
        Store.open(copy)


def test_layout_equals_the_manifests(checkpoint, store):
    for family in ("olmoe", "gpt_oss"):
        assert layout_of(read_checkpoint(checkpoint(family)), "float32") == store(family).manifest.layout


def left(path):
    return sorted(child.name for child in path.iterdir())


def test_existing_store_is_not_overwritten(checkpoint, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").touch()
    with pytest.raises(InvalidInput, match="exists already"):
        prepare_store(checkpoint("olmoe"), tmp_path / "s")
    assert left(tmp_path / "s") == ["mine"]


def test_disk_too_small_is_told_before_writing(checkpoint, tmp_path, monkeypatch):
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: small)
    with pytest.raises(DiskFull, match="1000 B free") as caught:
        prepare_store(checkpoint("olmoe"), tmp_path / "s")
    assert caught.value.free == 1000
    assert left(tmp_path) == []


def test_disk_full_while_writing_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(DiskFull):
        prepare_store(checkpoint("olmoe"), tmp_path / "s")
    assert left(tmp_path) == []


def test_truncated_checkpoint_is_refused(tmp_path):
    model = make_checkpoint("olmoe", tmp_path / "model", layers=1)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        prepare_store(model, tmp_path / "s")
    assert left(tmp_path) == ["model"]


def test_a_config_of_another_model_is_refused(tmp_path):
    model = make_checkpoint("olmoe", tmp_path / "model", layers=1)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"hidden_size": 64', '"hidden_size": 32'))
    with pytest.raises(InvalidCheckpoint, match=r"gate_up_proj \[64, 64\], which contradicts hidden_size 32"):
        prepare_store(model, tmp_path / "s")
    assert left(tmp_path) == ["model"]


def test_unsupported_family_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidCheckpoint, match="'llama' is not supported"):
        prepare_store(tmp_path / "model", tmp_path / "s")
    assert left(tmp_path) == ["model"]


def test_damaged_stores_are_refused(store, tmp_path):
    with pytest.raises(InvalidStore, match="not a usable store"):
        Store.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(store("olmoe").path, copy)
    with (copy / RECORDS_NAME).open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(InvalidStore, match="truncated: 1000 bytes"):
        Store.open(copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"expert": 1,', '"expert": 2,', 1))
    with pytest.raises(InvalidStore, match="every one of 4 × 8 experts"):
        Store.open(copy)


def test_a_damaged_part_of_the_trunk_is_not_computed_with(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store("olmoe").path, copy)
    part = Store.open(copy).trunk["layer", 1]
    with (copy / RECORDS_NAME).open("r+b") as stream:
        stream.seek(part.offset + part.bytes - 1)
        last = stream.read(1)
        stream.seek(part.offset + part.bytes - 1)
        stream.write(bytes([last[0] ^ 1]))
    source = open_model(copy).trunk_source()
    assert source.tensors("layer", 0)
    with pytest.raises(InvalidStore, match=r"copy/records\.bin: layer 1 of the trunk is damaged"):
        source.tensors("layer", 1)


def test_precisions_lie_side_by_side(packed_store, store):
    plain, low = store("gpt_oss"), packed_store("gpt_oss")  # with biases
    assert [packed.layout.precision for packed in low.manifest.packed] == ["int8", "int4"]
    assert [record.sha256 for record in low.manifest.records] == [record.sha256 for record in plain.manifest.records]
    for packed in low.manifest.packed:
        assert packed.layout == packed_layout(low.manifest.layout, packed.layout.precision)
        assert [record.key for record in packed.records] == [record.key for record in plain.manifest.records]
        for record in packed.records[::11]:
            assert record.offset % 4096 == 0
            data = low.read(record.sha256)
            assert data == pack_record(plain.read(plain.by_key[record.key].sha256), packed.layout)
            assert hashlib.sha256(data).hexdigest() == record.sha256
    places = sorted((r.offset, r.bytes) for r in low.by_sha256.values())
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))


def test_a_store_without_precisions_opens_as_before(store, tmp_path):
    path = shutil.copytree(store("gpt_oss").path, tmp_path / "old")
    document = json.loads((path / "manifest.json").read_text())
    assert document.pop("packed") == []
    (path / "manifest.json").write_text(json.dumps(document))
    assert Store.open(path).manifest == store("gpt_oss").manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: packed.append(packed[0]), r"packed\[2\].layout.precision: is int8 once more"),
        (lambda packed: packed[1]["records"].pop(), r"packed\[1\].records: do not list every one"),
        (lambda packed: packed[0]["records"][3].update(bytes=17), r"packed\[0\].records\[3\].bytes: is 17"),
        (
            lambda packed: packed[0]["layout"]["parts"][0].update(name="down_proj"),
            r"packed\[0\].layout: is of other weights",
        ),
    ],
)
def test_precisions_that_contradict_the_store_are_refused(packed_store, tmp_path, change, message):
    document = json.loads((packed_store("gpt_oss").path / "manifest.json").read_text())
    change(document["packed"])
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(InvalidStore, match=message):
        Store.open(tmp_path)


def test_a_model_that_int4_does_not_fit_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.precision.GROUP", 48)
    with pytest.raises(UnfitPrecision, match=r"int4 does not fit this model: .* groups of 48 do not divide; use int8"):
        prepare_store(checkpoint("mixtral"), tmp_path / "store", precisions=("int4",))
    assert not any(tmp_path.iterdir())
