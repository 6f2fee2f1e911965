import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from agent.cli import cli
from runtime.errors import InvalidInput
from runtime.policy.cache import CacheTooSmall
from runtime.policy.eviction import EVICTIONS, Lru
from runtime.policy.routing import MassBudget
from runtime.recorder import Trace
from runtime.replay import LookAhead, Situation, belady, read_recording, replay
from tests.recordings import planted, recording_of, skewed_recording

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
        (["--expert-bytes", "0 B"], "an expert of 0 bytes"),
        (["--expert-bytes", "1 MiB", "--capacity", "1 MiB"], "a token needs 2 experts of a layer at once, 2 MiB"),
        (["--prefetch", "oracle"], "no prefetch policy 'oracle'; there are none, gate, previous"),
        (["--prefetch", "learned=0"], "a count of loads in 1 … 4096"),
        (["--prefetch", "gate"], "record a trace with agent trace --guesses"),
        (["--prefetch", "file"], "--prefetch file and --predictor FILE go together"),
        (["--reload", "50%=1ms"], "the shares add up to 50 %, not to 100 %"),
        (["--reload", "50%"], "write a share of the experts and a time"),
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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            ("1,0,0,0,1", "1,0,0,1,9"),
            "row 2, counted without the header, says turn 0, phase 1, step 0, layer 0, slot 1, expert 9",
        ),
        (("1,0,0,0,1", "1,0,0,1,1"), "chose an expert twice"),
        (("1,0,0,0,1", "1,0,0,1,1.5"), "expert 1.5"),
        (("1,0,0,0,nan", "1,0,0,1,1"), "expert nan"),
        (("1,0,0,0,1", "1,0,0,1,2", "1,0,1,0,3"), "3 rows are no multiple of 2; is it cut short?"),
        (("1,0,0,0,1", "1,0,1,1,2"), "see rows 1 to 2"),
        (("0,0,0,0,1", "0,0,0,1,2"), "holds no decoded token"),
    ],
)
def test_rows_that_cannot_be_are_named(tmp_path, rows, said):
    with pytest.raises(InvalidInput, match=re.escape(said)):
        read_recording(csv_file(tmp_path, rows))


@pytest.mark.parametrize(
    "shape",
    [
        "n_layer=0 n_expert=8 n_expert_used=2",
        "n_layer=2 n_expert=8 n_expert_used=0",
        "n_layer=2 n_expert=99999999 n_expert_used=2",
    ],
)
def test_a_shape_that_cannot_be_is_refused(tmp_path, shape):
    path = csv_file(tmp_path, ["1,0,0,0,1", "1,0,0,1,2"])
    path.write_text(path.read_text().replace("n_layer=2 n_expert=8 n_expert_used=2", shape))
    with pytest.raises(InvalidInput, match="its header comments say n_layer="):
        read_recording(path)


def test_tokens_without_all_layers_teach_nothing(tmp_path):
    rows = ["0,0,0,0,1", "0,0,0,1,2", "0,1,0,0,3", "0,1,0,1,4", "0,1,1,0,5", "0,1,1,1,6"]
    rows += ["1,2,0,0,1", "1,2,0,1,5", "1,2,1,0,1", "1,2,1,1,6"]
    lesson = read_recording(csv_file(tmp_path, rows)).lesson()
    assert lesson.chosen.tolist() == [[[3, 4], [5, 6]], [[1, 5], [1, 6]]]
    assert read_recording(csv_file(tmp_path, rows)).lesson(0).chosen.shape == (1, 2, 2)


def test_a_capacity_in_bytes_is_kept_to_the_byte():
    recording = skewed_recording(tokens=60)
    small, large = (replay(recording, Situation(size, in_bytes=True), Lru(3, 8)) for size in (800, 1600))
    assert (small.slots, large.slots) == (4, 8)
    assert large.hit_rate > small.hit_rate
    with pytest.raises(CacheTooSmall, match="layer 1 needs 400 B at once, the cache has 350 B; give it at least 400 B"):
        replay(recording, Situation(350, in_bytes=True), Lru(3, 8))


def perfect(recording):
    after = {id(one): other for one, other in zip(recording.batches, recording.batches[1:], strict=False)}
    return lambda batch: (
        after[id(batch)].ids[0, : recording.top_k] if id(batch) in after else np.empty(0, dtype=np.int64)
    )


def test_what_is_loaded_ahead_is_counted_apart():
    recording = recording_of(planted(100).chosen, expert_bytes=np.full(3, 10.0))
    plain = replay(recording, 6, Lru(3, 8))
    look = LookAhead(perfect(recording), room=2)
    found = replay(recording, Situation(6, first=40), Lru(3, 8), ahead=look)
    assert found.tokens == 60
    assert (look.counts.recall, look.counts.precision, look.counts.wasted_bytes) == (1.0, 1.0, 0.0)
    assert look.counts.used == look.counts.loads > 0
    assert found.hit_rate > plain.hit_rate
    assert found.requests == 60 * 3 * 2 == found.hits + found.loads
    assert found.bytes_per_token == pytest.approx(10 * found.loads_per_token)


def test_guesses_that_are_wrong_are_wasted():
    recording = recording_of(planted(50).chosen, expert_bytes=np.full(3, 10.0))
    look = LookAhead(lambda batch: np.setdiff1d(np.arange(8), perfect(recording)(batch))[:2], room=1)
    found = replay(recording, 9, Lru(3, 8), ahead=look)
    assert (look.counts.recall, look.counts.used) == (0.0, 0)
    assert look.counts.wasted_bytes == 10 * look.counts.loads > 0
    assert found.bytes_per_token > 10 * found.loads / found.tokens


def test_the_command_judges_what_was_learnt_on_the_rest(tmp_path):
    path, kinds = tmp_path / "t.safetensors", ("none", "previous", "coactivation=1", "learned=2")
    chosen = planted(80).chosen
    guesses = chosen.astype(np.int16)
    Trace("tiny", 8, 2, "w", guesses, np.ones(chosen.shape, np.float16), np.zeros(80, np.int32), guesses).write(path)
    options = [each for kind in (*kinds, "gate") for each in ("--prefetch", kind)]
    arguments = ["replay", str(path), "--capacity", "6", "--eviction", "lru", *options, "--reload", "100%=2ms"]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert found["first"] == 56
    rows = {row["prefetch"]: row for row in found["policies"] if row["eviction"] == "lru"}
    assert rows.keys() == {*kinds, "gate"}
    assert {row["tokens"] for row in rows.values()} == {24}
    assert rows["learned=2"]["hit_rate"] > rows["previous"]["hit_rate"] >= rows["none"]["hit_rate"] - 0.05
    assert rows["gate"]["guessed"]["right"] == rows["gate"]["guessed"]["wanted"]
    assert rows["none"]["reload_s"] == pytest.approx(2e-3 * rows["none"]["loads"] / 24)
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert "of which the last 24 count" in shown
    assert "wasted/token" in shown


def test_a_predictor_is_learnt_judged_and_used(tmp_path):
    path, file = tmp_path / "t.safetensors", tmp_path / "p.safetensors"
    chosen = planted(100).chosen
    Trace("tiny", 8, 2, "w", chosen.astype(np.int16), np.ones(chosen.shape, np.float16), np.zeros(100, np.int32)).write(
        path
    )
    for kind in ("learned", "coactivation"):
        told = CliRunner().invoke(
            cli, ["learn", str(path), "-o", str(file), "--kind", kind, "--json"], catch_exceptions=False
        )
        document = json.loads(told.stdout)
        assert (document["tokens"], document["judged_tokens"]) == (70, 30)
        assert document["recall"] > 0.6 > document["recall_of_token_before"]
        options = ["--capacity", "6", "--eviction", "lru", "--prefetch", "file", "--predictor", str(file), "--json"]
        rows = json.loads(CliRunner().invoke(cli, ["replay", str(path), *options], catch_exceptions=False).stdout)
        assert rows["first"] == 0
        assert rows["policies"][0]["guessed"]["right"] > 0.6 * rows["policies"][0]["guessed"]["wanted"]


def test_uses_are_learnt_and_judged_by_what_is_loaded(tmp_path):
    path, file = tmp_path / "t.safetensors", tmp_path / "u.safetensors"
    chosen = planted(1000, noise=0.0).chosen
    chosen[1::2] = chosen[::2]  # every token's choice comes twice
    Trace(
        "tiny", 8, 2, "w", chosen.astype(np.int16), np.ones(chosen.shape, np.float16), np.zeros(1000, np.int32)
    ).write(path)
    arguments = ["learn", str(path), "-o", str(file), "--kind", "uses"]
    document = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert document["kind"] == "uses"
    assert 0 < document["loads"] <= document["loads_of_steady"]
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert "would be loaded with room for a quarter of each layer's experts" in shown


def test_traces_of_two_models_are_not_learnt_from_together(tmp_path):
    rows = ["1,0,0,0,1", "1,0,0,1,2", "1,0,1,0,1", "1,0,1,1,2"]
    done = CliRunner().invoke(
        cli, ["learn", str(trace_file(tmp_path)), str(csv_file(tmp_path, rows)), "-o", str(tmp_path / "p")]
    )
    assert "is of another model than" in str(done.exception)
