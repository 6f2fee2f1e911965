import json

import numpy as np
import pytest
from click.testing import CliRunner

from agent.cli import cli
from runtime.policy.eviction import EVICTIONS, Lru
from runtime.policy.routing import MassBudget
from runtime.recorder import Trace
from runtime.replay import belady, read_recording, replay

HEADER = "# route_trace v1\n# model=/x/tiny.gguf n_layer=2 n_expert=8 n_expert_used=2\n"
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"


def trace_file(tmp_path, tokens=60, candidates=4):
    rng = np.random.default_rng(1)
    ids = np.array([[rng.permutation(8)[:candidates] for _ in range(3)] for _ in range(tokens)], dtype=np.int16)
    scores = np.sort(rng.random(ids.shape).astype(np.float16), axis=2)[:, :, ::-1]
    path = tmp_path / "t.safetensors"
    Trace("tiny", 8, 2, "w", ids, scores, np.zeros(tokens, dtype=np.int32)).write(path)
    return path


def csv_file(tmp_path, rows):
    path = tmp_path / "t.route.csv"
    sizes = "# layer=0 expert_bytes=100 dense_bytes=1\n# layer=1 expert_bytes=200 dense_bytes=1\n"
    path.write_text(HEADER + sizes + COLUMNS + "".join(f"0,{row},0.5,0,0\n" for row in rows))
    return path


def test_a_csv_is_taken_as_its_layers_ran(tmp_path):
    rows = ["0,0,0,0,1", "0,0,0,1,2", "0,1,0,0,3", "0,1,0,1,4", "0,0,1,0,1", "0,0,1,1,2"]
    rows += ["1,2,0,0,1", "1,2,0,1,5", "1,2,1,0,1", "1,2,1,1,6"]
    recording = read_recording(csv_file(tmp_path, rows))
    assert [(b.layer, b.ids.shape[0], b.is_decode) for b in recording.batches] == [
        (0, 2, False), (1, 1, False), (0, 1, True), (1, 1, True),
    ]  # fmt: skip
    found = replay(recording, 8, Lru(2, 8))
    assert (found.tokens, found.requests, found.hits, found.loads) == (1, 4, 2, 2)  # 1 was prefilled in both layers
    assert found.bytes_per_token == 300
    assert found.waits == 1.0


def test_substitution_loads_less_and_says_what_it_gave_up(tmp_path):
    recording = read_recording(trace_file(tmp_path))
    exact = replay(recording, 10, Lru(3, 8))
    cheap = replay(recording, 10, Lru(3, 8), MassBudget((0.3,)))
    assert exact.lost_mass == 0 < cheap.lost_mass < 0.3
    assert cheap.loads < exact.loads
    assert belady(recording, 10).hits >= exact.hits


@pytest.mark.parametrize("name", EVICTIONS)
def test_every_policy_replays(tmp_path, name):
    recording = read_recording(trace_file(tmp_path, tokens=20))
    found = replay(recording, 6, EVICTIONS[name](3, 8))
    assert found.requests == 20 * 3 * 2 == found.hits + found.loads


def test_the_command_prints_json_and_draws(tmp_path):
    plot = tmp_path / "p.svg"
    arguments = ["replay", str(trace_file(tmp_path)), "--capacity", "25 %", "--capacity", "12", "--eviction", "rates"]
    done = CliRunner().invoke(cli, [*arguments, "--routing", "mass=0.1", "--plot", str(plot), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["policies"]
    assert [(row["slots"], row["eviction"]) for row in rows] == [
        (6, "rates"), (6, "belady"), (12, "rates"), (12, "belady"),
    ]  # fmt: skip
    assert plot.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--capacity", "1"], "1 experts fit, but a token needs 2"),
        (["--capacity", "lots"], "write a count (256), a share (12.5 %) or bytes"),
        (["--capacity", "1 MiB"], "needs --expert-bytes"),
        (["--routing", "magic"], "no routing policy 'magic'"),
        (["--routing", "mass"], "mass needs a number"),
        (["--plot", "p.png"], "ends in .svg"),
    ],
)
def test_bad_input_gets_one_message(tmp_path, options, said):
    done = CliRunner().invoke(cli, ["replay", str(trace_file(tmp_path)), *options])
    assert done.exit_code == 2
    assert said in done.output


def test_nothing_to_substitute_by_is_said(tmp_path):
    path = trace_file(tmp_path, candidates=2)
    done = CliRunner().invoke(cli, ["replay", str(path), "--routing", "mass=0.1"])
    assert done.exit_code == 2
    assert "record a trace with --candidates 4 or more" in done.output
