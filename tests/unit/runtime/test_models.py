"""What a directory that `model:` names turns out to be."""

import json
import shutil

import pytest

from runtime.errors import InvalidStore
from runtime.models import open_model, open_store_of
from runtime.store import layout_of
from schemas.checkpoint import InvalidCheckpoint, read_checkpoint
from tests.families import make_checkpoint, make_store


def test_a_checkpoint_tells_its_model_at_any_dtype(checkpoint):
    read = read_checkpoint(checkpoint("mixtral"))
    for dtype in ("checkpoint", "bfloat16"):
        model = open_model(checkpoint("mixtral"), dtype)
        assert model.spec == read.model_spec.held_as(dtype)
        assert model.layout == layout_of(read, dtype)
        assert model.config_dir == checkpoint("mixtral")
        assert model.source is not None
        assert (model.store, model.manifest) == (None, None)


def test_a_store_and_its_card_tell_the_same(checkpoint, tmp_path):
    store = make_store(checkpoint("gpt_oss"), tmp_path / "store", "bfloat16")
    card = shutil.copytree(store.path, tmp_path / "card", ignore=shutil.ignore_patterns("records.bin"))
    there, here = open_model(store.path), open_model(card, "bfloat16")
    wanted = open_model(checkpoint("gpt_oss"), "bfloat16")
    assert there.spec == here.spec == wanted.spec
    assert there.layout == here.layout == wanted.layout
    assert there.manifest == here.manifest == store.manifest
    assert (here.config_dir, here.source, here.store) == (card, None, None)
    assert there.store is not None
    assert there.source is not None


def test_a_store_of_another_dtype_is_refused(store):
    with pytest.raises(InvalidStore, match=r"holds weights as float32, not float16; .* --dtype float16"):
        open_model(store("olmoe").path, "float16")


def test_a_store_beside_a_model_holds_the_same_weights(checkpoint, store, tmp_path):
    model, same = open_model(checkpoint("olmoe"), "float32"), store("olmoe").path
    assert open_store_of(model, same).manifest.model == model.spec
    assert open_store_of(open_model(same), same).path == same
    trained_on = make_store(make_checkpoint("olmoe", tmp_path / "olmoe", seed=1), tmp_path / "trained")
    for beside in (model, open_model(same)):
        with pytest.raises(InvalidStore, match="layer 0 expert 0 has other weights there than in"):
            open_store_of(beside, trained_on.path)
    with pytest.raises(InvalidStore, match=r"holds experts as float32, not bfloat16; .* --dtype bfloat16"):
        open_store_of(open_model(checkpoint("olmoe"), "bfloat16"), same)
    with pytest.raises(InvalidStore, match="of another shape than"):
        open_store_of(model, store("mixtral").path)


def test_a_store_without_its_trunk_is_refused(store, tmp_path):
    old = shutil.copytree(store("olmoe").path, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(manifest | {"trunk": []}))
    with pytest.raises(InvalidStore, match="holds no trunk"):
        open_model(old)


def test_anything_else_is_refused(tmp_path):
    with pytest.raises(InvalidCheckpoint, match=r"no config\.json there"):
        open_model(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InvalidStore, match="not a usable store"):
        open_model(tmp_path)
