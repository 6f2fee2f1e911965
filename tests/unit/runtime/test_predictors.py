"""Predictor files: what is written is read, and what is damaged, or of another model, is refused by name."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runtime.errors import InvalidInput
from runtime.predictors import (
    joined,
    learn,
    learn_uses,
    predictor_for,
    read_predictor,
    read_uses,
    recall,
    write_predictor,
)
from schemas.checkpoint import read_checkpoint
from schemas.files import InvalidFile
from schemas.predictor import GUESS_KINDS, read_predictor_header
from tests.demo import DEMO
from tests.recordings import E, K, L, planted

SPEC = read_checkpoint(DEMO).model_spec


@pytest.fixture(scope="module", params=GUESS_KINDS)
def written(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictors") / f"{request.param}.safetensors"
    write_predictor(path, learn(request.param, planted(200)), model="tiny", top_k=K, tokens=200)
    return path


def rewritten(written, tmp_path, change, **metadata):
    header, arrays = read_predictor_header(written), load_file(written)
    change(arrays)
    path = tmp_path / "changed.safetensors"
    told = {name: str(value) for name, value in {**header.model_dump(), **metadata}.items() if value is not None}
    save_file(arrays, path, told)
    return path


def test_what_is_read_guesses_as_what_was_written(written):
    header, predictor = read_predictor(written)
    assert (header.layers, header.experts, header.top_k, header.tokens) == (L, E, K, 200)
    fresh = learn(header.kind, planted(200))
    assert abs(recall(predictor, planted(50, seed=5)) - recall(fresh, planted(50, seed=5))) < 0.02


def test_it_must_be_of_the_model(written):
    assert predictor_for(written, layers=L, experts=E, top_k=K)
    with pytest.raises(InvalidInput, match="learnt from tiny, 3 layers × 8 experts, top-2, not for 4 layers"):
        predictor_for(written, layers=4, experts=E, top_k=K)


def test_what_is_no_predictor_is_told_apart(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidFile, match="not a safetensors file"):
        read_predictor(path)
    save_file({"used": np.zeros((1, 1), dtype=np.float16)}, path, {"format": "expertmesh-trace-1"})
    with pytest.raises(InvalidFile, match="is no predictor: says expertmesh-trace-1; make one with agent learn"):
        read_predictor(path)


def test_arrays_must_be_what_the_header_says(written, tmp_path):
    def cut(arrays):
        name = sorted(arrays)[0]
        arrays[name] = arrays[name][:1]

    with pytest.raises(InvalidFile, match="contradicts the header or another array"):
        read_predictor(rewritten(written, tmp_path, cut))
    with pytest.raises(InvalidFile, match="is missing"):
        read_predictor(rewritten(written, tmp_path, lambda arrays: arrays.pop(sorted(arrays)[0])))
    with pytest.raises(InvalidFile, match="expected F16"):
        read_predictor(
            rewritten(
                written, tmp_path, lambda arrays: arrays.update({n: a.astype(np.float32) for n, a in arrays.items()})
            )
        )
    with pytest.raises(InvalidFile, match="in the header"):
        read_predictor(rewritten(written, tmp_path, lambda _: None, layers="three"))


def test_uses_are_read_as_they_were_written_and_refused_where_they_are_not_meant(written, tmp_path):
    path, made = tmp_path / "u.safetensors", learn_uses(planted(200))
    write_predictor(path, made, model="tiny", top_k=K, tokens=200)
    header, read = read_predictor(path)
    assert (header.kind, header.layers, header.experts, header.top_k) == ("uses", L, E, K)
    for wrote, found in zip(made, read, strict=True):
        np.testing.assert_allclose(found, wrote, atol=2e-3)
    with pytest.raises(InvalidInput, match="says what to keep, not what to load ahead"):
        predictor_for(path, layers=L, experts=E, top_k=K)
    spec = SPEC.model_copy(update={"layers": L, "experts": E, "top_k": K})
    assert read_uses(None, spec) is None
    assert read_uses(path, spec) is not None
    with pytest.raises(InvalidInput, match="learnt from tiny, 3 layers × 8 experts, top-2, not for 3 layers × 9"):
        read_uses(path, spec.model_copy(update={"experts": E + 1}))
    with pytest.raises(InvalidInput, match="make one with agent learn --kind uses"):
        read_uses(written, spec)
    other = rewritten(path, tmp_path, lambda arrays: arrays.update(rates=arrays["rates"][:, 1:].copy()))
    with pytest.raises(InvalidFile, match="of other decays than this version's"):
        read_predictor(other)


def test_uses_that_were_learnt_without_a_network_are_read_and_half_a_network_is_none(tmp_path):
    path, made = tmp_path / "u.safetensors", learn_uses(planted(200))
    assert not made.effect.size, "noise is not learnt"
    write_predictor(path, made, model="tiny", top_k=K, tokens=200)
    assert load_file(path).keys() == {"rates", "given", "out", "bias"}
    read = read_predictor(path)[1]
    assert (read.seen.shape[-1], read.hidden_bias.shape, read.effect.shape) == (0, (L, 0), (L, 0, E))
    bent = made._replace(
        seen=np.ones((*made.given.shape[:3], 5)), hidden_bias=np.ones((L, 5)), effect=np.ones((L, 5, E))
    )
    write_predictor(path, bent, model="tiny", top_k=K, tokens=200)
    np.testing.assert_allclose(read_predictor(path)[1].effect, bent.effect)
    with pytest.raises(InvalidFile, match="effect: is missing"):
        read_predictor(rewritten(path, tmp_path, lambda arrays: arrays.pop("effect")))


def test_numbers_must_be_numbers(written, tmp_path):
    def spoil(arrays):
        next(iter(arrays.values())).flat[0] = np.nan

    with pytest.raises(InvalidFile, match="holds numbers that cannot be"):
        read_predictor(rewritten(written, tmp_path, spoil))


def test_recordings_of_one_model_are_learnt_from_together():
    both = joined([planted(20), planted(30, seed=1)])
    assert both.chosen.shape == (50, L, K)
    assert np.flatnonzero(both.is_start).tolist() == [0, 20]
    assert both.part(10, 30).is_start.nonzero()[0].tolist() == [0, 10]
