import numpy as np
import pytest

from planner.demand import activation_share, counted_share, read_trace
from schemas.activation import NodeCounts
from schemas.files import InvalidFile
from tests.planning import model_spec, write_trace

MODEL = model_spec()


def test_a_trace_is_read_and_split_in_time(tmp_path):
    write_trace(tmp_path / "t.safetensors", MODEL, tokens=10)
    trace = read_trace(tmp_path / "t.safetensors", MODEL)
    early, late = trace.split(0.7)
    assert (early.header.tokens, late.header.tokens) == (7, 3)
    assert np.array_equal(np.concatenate([early.chosen, late.chosen]), trace.chosen)


def test_shares_sum_to_top_k(tmp_path):
    write_trace(tmp_path / "t.safetensors", MODEL)
    share = activation_share(read_trace(tmp_path / "t.safetensors", MODEL).chosen, MODEL.experts)
    assert share.shape == (2, 4)
    assert share.sum(axis=1) == pytest.approx([2, 2])
    assert ((share >= 0) & (share <= 1)).all()


def test_counters_give_shares_of_tokens():
    counts = NodeCounts(node="a", tokens=4, counts=((4, 2), (0, 4)))
    assert counted_share(counts).tolist() == [[1.0, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize(("value", "message"), [(-1, "outside 0 … 3"), (4, "outside 0 … 3"), (None, "twice")])
def test_impossible_choices_are_refused(tmp_path, monkeypatch, value, message):
    def spoil(rng, model, tokens):
        chosen = np.tile(np.array([0, 1], np.int16), (tokens, model.layers, 1))
        chosen[3, 1] = [0, 0] if value is None else [0, value]
        return chosen

    monkeypatch.setattr("tests.planning.random_events", spoil)
    write_trace(tmp_path / "t.safetensors", MODEL)
    with pytest.raises(InvalidFile, match=message):
        read_trace(tmp_path / "t.safetensors", MODEL)
