"""Recording traces: the chosen experts first, then the next best; windows, limits, files and imports."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from runtime.errors import InvalidInput
from runtime.recorder import import_route_csv, read_texts, record_trace
from runtime.routers import routers_of
from schemas.activation import read_trace_header
from tests.families import FAMILIES, reference

DEMO = Path(__file__).parents[3] / "examples" / "models" / "tinymoe-demo"


class Letters:
    """A tokenizer whose tokens are the text's code points."""

    def __call__(self, text, **_):
        return {"input_ids": [2 + ord(letter) % 250 for letter in text]}


@pytest.fixture
def letters(monkeypatch):
    import runtime.loading

    monkeypatch.setattr(runtime.loading, "load_tokenizer", lambda _: Letters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_come_first_then_the_next_best(checkpoint, letters, family):
    text = "a trace of a few tokens"
    trace = record_trace(checkpoint(family), [text], workload="w", candidates=8)
    model = reference(checkpoint(family))
    chosen = []
    for router in routers_of(model):
        router.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    model(torch.tensor([Letters()(text)["input_ids"]]))
    want = torch.stack(chosen, dim=1).numpy()  # [T, L, K]
    assert trace.expert_ids.shape == (len(text), len(chosen), 8)
    np.testing.assert_array_equal(np.sort(trace.expert_ids[..., :2]), np.sort(want))
    np.testing.assert_array_equal(np.sort(trace.expert_ids), np.broadcast_to(np.arange(8), trace.expert_ids.shape))
    assert ((trace.scores >= 0) & (trace.scores <= 1)).all()
    if family not in ("deepseek_v3", "deepseek_v2"):  # those rank with a correction, or choose within groups
        assert (np.diff(trace.scores.astype(np.float32)) <= 0).all()
        np.testing.assert_allclose(trace.scores.sum(-1), 1, atol=0.01)


def test_texts_are_cut_into_windows_up_to_the_limit(checkpoint, letters):
    seen = []
    trace = record_trace(
        checkpoint("olmoe"),
        ["x" * 25, "y" * 5, "z" * 100],
        workload="w",
        window=10,
        max_tokens=34,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert np.bincount(trace.sequence).tolist() == [10, 10, 5, 5, 4]
    assert trace.expert_ids.shape == (34, 4, 4)  # C = 2 K by default
    assert seen[-1] == (34, 34)


def test_trace_file_has_the_format_of_the_schema(checkpoint, letters, tmp_path):
    trace = record_trace(checkpoint("deepseek_v3"), ["abc"], workload="law")
    trace.write(tmp_path / "t.safetensors", created="2026-01-01")
    header = read_trace_header(tmp_path / "t.safetensors")
    assert (header.model, header.workload, header.created) == ("deepseek_v3", "law", "2026-01-01")
    assert (header.tokens, header.layers, header.experts, header.top_k, header.candidates) == (3, 3, 8, 2, 4)
    arrays = load_file(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(arrays["expert_ids"], trace.expert_ids)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize(("texts", "options", "message"), [
    ([""], {}, "no token to record"),
    (["abc"], {"candidates": 1}, "outside top-k … experts = 2 … 8"),
    (["abc"], {"candidates": 9}, "9 candidates"),
])  # fmt: skip
def test_what_cannot_be_recorded_is_refused(checkpoint, letters, texts, options, message):
    with pytest.raises(InvalidInput, match=message):
        record_trace(checkpoint("olmoe"), texts, workload="w", **options)


def test_texts_come_from_jsonl_and_plain_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    (tmp_path / "b.txt").write_text("three\nfour\n")
    assert list(read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"])) == ["one", "two", "three\nfour\n"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(InvalidInput, match=r"a\.jsonl: line 2: expected"):
        list(read_texts([tmp_path / "a.jsonl"]))
    with pytest.raises(InvalidInput, match="cannot be read"):
        list(read_texts([tmp_path / "none.txt"]))


HEADER = (
    "# route_trace v1\n# model=/x/tiny.gguf arch=x n_layer=2 n_expert=8 n_expert_used=2\n# layer=0 expert_bytes=5\n"
)
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"


def rows(*tokens):
    """Rows of tokens (turn, phase, step, layers)."""
    return "".join(
        f"{turn},{phase},{step},{layer},{slot},{(step + layer + 3 * slot) % 8},{0.7 - 0.4 * slot},0,5\n"
        for layer in range(2)
        for turn, phase, step, layers in tokens
        for slot in range(2)
        if layer < layers
    )


def test_route_csv_is_imported_without_tokens_that_miss_a_layer(tmp_path):
    file = tmp_path / "q.route.csv"
    file.write_text(HEADER + COLUMNS + rows((0, 0, 0, 1), (0, 0, 1, 2), (0, 1, 2, 2), (1, 0, 0, 2)))
    trace, dropped = import_route_csv(file)
    assert (trace.model, trace.workload, trace.experts, trace.top_k, dropped) == ("tiny", "q", 8, 2, 1)
    assert trace.expert_ids.tolist() == [[[1, 4], [2, 5]], [[2, 5], [3, 6]], [[0, 3], [1, 4]]]
    assert trace.sequence.tolist() == [0, 0, 1]
    np.testing.assert_allclose(trace.scores[0, 0], [0.7, 0.3], atol=1e-3)
    trace.write(tmp_path / "t.safetensors")
    assert read_trace_header(tmp_path / "t.safetensors").candidates == 2


@pytest.mark.parametrize(("text", "message"), [
    ("", "columns turn"),
    (HEADER + COLUMNS, "holds no rows"),
    (COLUMNS + "0,0,0,0,0,1,0.5,0,5\n", "must give n_layer"),
    (HEADER + COLUMNS + "0,0,0,0,0,x,0.5,0,5\n", "line 5: not a number"),
    (HEADER + COLUMNS + "0,0,0,0,0,8,0.5,0,5\n", "leaves 2 layers × 8 experts"),
    (HEADER + COLUMNS + "0,0,0,0,0,1,0.5,0,5\n", "no token has rows for all"),
    (HEADER + COLUMNS + "0,0,0,0,0,1,0.5,0,5\n" * 4, "lists a slot twice"),
])  # fmt: skip
def test_csv_that_is_no_route_trace_is_refused(tmp_path, text, message):
    (tmp_path / "x.route.csv").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        import_route_csv(tmp_path / "x.route.csv")


def test_the_bundled_model_is_recorded_with_its_own_tokenizer():
    text = "def main():\n    return 0\n"
    trace = record_trace(DEMO, [text], workload="code")
    assert len(trace.sequence) == len(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"])
    assert trace.expert_ids.shape[1:] == (4, 4)
