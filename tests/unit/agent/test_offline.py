"""`agent prepare` and `agent trace` as a user calls them."""

import json
from pathlib import Path

from click.testing import CliRunner

from agent.offline import prepare, trace
from runtime.errors import InvalidInput
from runtime.store import Store
from schemas.activation import read_trace_header

DEMO = Path(__file__).parents[3] / "examples" / "models" / "tinymoe-demo"


def test_prepare_writes_a_store(tmp_path):
    result = CliRunner().invoke(prepare, [str(DEMO), "-o", str(tmp_path / "s"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["records"] == 64
    assert Store.open(tmp_path / "s").manifest.dtype == "bfloat16"
    again = CliRunner().invoke(prepare, [str(DEMO), "-o", str(tmp_path / "s")])
    assert isinstance(again.exception, InvalidInput)
    assert again.exception.exit_code == 2


def test_trace_records_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one and two"}\n{"text": "three"}\n')
    options = ["--text", str(tmp_path / "a.jsonl"), "--workload", "w", "-o", str(tmp_path / "t.safetensors")]
    result = CliRunner().invoke(trace, [str(DEMO), *options, "--tokens", "5", "--candidates", "3"])
    assert result.exit_code == 0, result.output
    assert "5 tokens of tinymoe-demo, workload w: 4 layers × 16 experts, top-2, 3 candidates" in result.stdout
    assert read_trace_header(tmp_path / "t.safetensors").tokens == 5


def test_trace_needs_a_model_or_an_import(tmp_path):
    for arguments in ([], [str(DEMO)], [str(DEMO), "--import", "x.csv"]):
        result = CliRunner().invoke(trace, [*arguments, "-o", str(tmp_path / "t")])
        assert result.exit_code == 2
        assert "Error:" in result.stderr
    missing = CliRunner().invoke(trace, ["--import", "x.csv", "-o", str(tmp_path / "no" / "t")])
    assert "no such directory" in str(missing.exception)
    assert list(tmp_path.iterdir()) == []
