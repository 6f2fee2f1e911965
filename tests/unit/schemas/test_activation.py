import numpy as np
import pytest
from safetensors.numpy import save_file

from schemas.activation import read_trace_header
from schemas.files import InvalidFile

METADATA = {
    "format": "expertmesh-trace-1",
    "model": "tiny",
    "layers": "3",
    "experts": "8",
    "top_k": "2",
    "workload": "code",
    "created": "2026-11-22",
}


def write(path, *, metadata=METADATA, **arrays):
    tokens = {
        "expert_ids": np.zeros((5, 3, 4), np.int16),
        "scores": np.zeros((5, 3, 4), np.float16),
        "sequence": np.zeros(5, np.int32),
    }
    save_file({k: v for k, v in {**tokens, **arrays}.items() if v is not None}, path, metadata)
    return path


def test_a_header_tells_the_shape(tmp_path):
    header = read_trace_header(write(tmp_path / "t.safetensors"))
    assert (header.tokens, header.layers, header.candidates, header.top_k) == (5, 3, 4, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, "scores: is missing"),
        ({"expert_ids": np.zeros((5, 3, 4), np.int32)}, "expected I16"),
        ({"sequence": np.zeros(4, np.int32)}, "another number of tokens"),
        ({"metadata": {**METADATA, "format": "other"}}, "format"),
        ({"metadata": {k: v for k, v in METADATA.items() if k != "top_k"}}, "top_k"),
        ({"metadata": {**METADATA, "layers": "4"}}, "contradicts"),
        ({"metadata": {**METADATA, "top_k": "5"}}, "contradicts"),
    ],
)
def test_traces_that_contradict_themselves(tmp_path, changes, words):
    with pytest.raises(InvalidFile, match=words):
        read_trace_header(write(tmp_path / "t.safetensors", **changes))


def test_a_truncated_trace(tmp_path):
    path = write(tmp_path / "t.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InvalidFile, match="truncated"):
        read_trace_header(path)
