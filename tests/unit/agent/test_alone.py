"""One machine alone: a model larger than its memory gives the tokens it gives with all of it, and tells what it did."""

import json

import pytest
from click.testing import CliRunner

from agent.cli import cli
from runtime.errors import BudgetTooSmall, InvalidInput, InvalidStore
from runtime.store import prepare_store
from tests.cluster import MODEL

PROMPT = "class Stack:"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "store"
    prepare_store(MODEL, path, dtype="float32", precisions=("int4",))
    return path


def ask(*options):
    result = CliRunner().invoke(
        cli,
        ["generate", "--prompt", PROMPT, "--max-tokens", "12", "--json", *map(str, options)],
        catch_exceptions=False,
    )
    return json.loads(result.stdout)


def test_a_budget_changes_what_is_loaded_and_no_token(store, tmp_path):
    trace = tmp_path / "trace.json"
    whole = ask("--local", store)
    small = ask("--local", store, "--device-budget", "8MiB", "--trace-file", trace)
    from_checkpoint = ask("--local", MODEL, "--device-budget", "8MiB")
    assert small["tokens"] == whole["tokens"]
    assert len(from_checkpoint["tokens"]) == len(whole["tokens"])
    assert small["loads"] > whole["loads"] > 0
    assert small["loaded_bytes"] == small["loads"] * 144 * 1024
    assert small["expert_budget"] < 3 << 20
    events = json.loads(trace.read_text())["traceEvents"]
    names = (event["args"]["name"] for event in events if event["ph"] == "M")
    tracks = {name.rstrip(" 0123456789") for name in names}  # loads that overlap have tracks of their own
    assert tracks == {"steps", "experts here", "loads"}
    spans = [event for event in events if event["ph"] == "X"]
    assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in spans)
    assert sum("bytes" in span["args"] for span in spans) == small["loads"]


def test_a_precision_gives_its_own_tokens_however_it_is_held(store):
    """As weights or packed, whichever pays, or made from a store that lacks it."""
    whole = ask("--local", store, "--precision", "int4")
    small = ask("--local", store, "--precision", "int4", "--device-budget", "7MiB")
    assert (whole["precision"], whole["is_packed"]) == ("int4", False)  # there is room
    assert small["tokens"] == whole["tokens"]
    packed_bytes = 144 * 1024 // 32 * 5  # five bits of thirty-two
    assert small["loaded_bytes"] == small["loads"] * packed_bytes
    assert small["expert_bytes"] == 64 * (packed_bytes if small["is_packed"] else 144 * 1024)
    remade = ask("--local", store, "--precision", "int8", "--device-budget", "8MiB")
    assert remade["loaded_bytes"] == remade["loads"] * 144 * 1024
    assert ask("--local", store)["precision"] == "checkpoint"


def test_a_budget_that_is_too_small_says_how_much_is_needed(store):
    with pytest.raises(
        BudgetTooSmall, match=r"at least 6\.\d+ MiB .* are needed: .* trunk and KV cache, and 2 experts"
    ):
        ask("--local", store, "--device-budget", "1MiB")


def test_more_room_than_experts_is_told_as_all_of_them(store):
    options = ["--prompt", PROMPT, "--max-tokens", "1", "--local", str(store), "--device-budget", "64MiB"]
    told = CliRunner().invoke(cli, ["generate", *options], catch_exceptions=False).stderr
    assert told.startswith("experts: 9 MiB of 9 MiB in memory, ")


def test_nothing_is_made_for_a_trace_that_cannot_be_written(store, tmp_path):
    options = ["--prompt", PROMPT, "--local", str(store), "--trace-file", str(tmp_path / "no" / "trace.json")]
    result = CliRunner().invoke(cli, ["generate", *options])
    assert isinstance(result.exception, InvalidInput)
    assert "no such directory" in str(result.exception)
    assert not result.stdout


def test_a_card_has_no_experts_and_options_that_contradict(store, tmp_path):
    card = tmp_path / "card"
    card.mkdir()
    for file in store.iterdir():
        if file.name != "records.bin":
            (card / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidStore, match="holds no records"):
        ask("--local", card)
    for options, told in (
        ([], "give --node NODE of a running cluster, or --local MODEL"),
        (["--node", "a", "--local", store], "--node and --local exclude each other"),
        (["--node", "a", "--device-budget", "1MiB"], "--device-budget goes with --local"),
        (["--node", "a", "--precision", "int8", "--reads", "direct"], "--precision, --reads go with --local"),
    ):
        result = CliRunner().invoke(cli, ["generate", "--prompt", "x", *map(str, options)])
        assert result.exit_code == 2
        assert told in result.stderr
