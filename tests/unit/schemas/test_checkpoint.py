import json
import shutil
import struct
from pathlib import Path

import pytest

from schemas.checkpoint import InvalidCheckpoint, read_checkpoint, read_safetensors_header

DEMO = Path(__file__).parents[3] / "examples" / "models" / "tinymoe-demo"


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path / "model"


def edit_config(model, **updates):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **updates}))


def test_the_demo_model_is_measured_from_its_headers():
    spec = read_checkpoint(DEMO).model_spec
    assert (spec.layers, spec.experts, spec.top_k, spec.hidden_size, spec.itemsize) == (4, 16, 2, 192, 2)
    assert spec.expert_bytes == 3 * 64 * 192 * 2
    assert spec.kv_bytes_per_token_layer == 2 * 1 * 64 * 2
    tensors = read_checkpoint(DEMO).tensors.values()
    assert spec.trunk_bytes + spec.total_expert_bytes == sum(entry.num_bytes for entry in tensors)


def test_held_as_float32_doubles_bfloat16():
    spec = read_checkpoint(DEMO).model_spec
    wide = spec.held_as("float32")
    assert wide.expert_bytes == 2 * spec.expert_bytes
    assert wide.itemsize == 4
    assert spec.held_as("checkpoint") is spec
    assert spec.held_as("float16") is spec


def test_truncated_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    "content", [b"", b"12", struct.pack("<Q", 1 << 60), struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"]
)
def test_bytes_that_are_no_safetensors(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match="not a safetensors file"):
        read_safetensors_header(file)


def test_a_missing_shard(copy):
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match="model-00001-of-00002"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ({"model_type": "llama"}, "'llama' is not supported"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"model_type": 3}, "model_type"),
    ],
)
def test_configs_that_cannot_be_placed(copy, updates, words):
    edit_config(copy, **updates)
    with pytest.raises(InvalidCheckpoint, match=words):
        _ = read_checkpoint(copy).model_spec


def test_a_store_is_named_as_what_it_is(copy):
    (copy / "model.safetensors").unlink()
    (copy / "manifest.json").touch()
    with pytest.raises(InvalidCheckpoint, match="is a store of agent prepare; name the checkpoint"):
        read_checkpoint(copy)


def test_directories_that_are_no_checkpoint(tmp_path, copy):
    with pytest.raises(InvalidCheckpoint, match=r"no config\.json"):
        read_checkpoint(tmp_path)
    (copy / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"no \*\.safetensors"):
        read_checkpoint(copy)
