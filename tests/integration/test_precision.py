"""An agent that executes every expert in a low precision: one machine's tokens in that precision, and status says so."""

from pathlib import Path

from runtime.alone import open_alone
from runtime.engine import generate
from runtime.loading import load_tokenizer
from tests.cluster import MODEL, PROMPTS, make_plan, running, save, spread
from tests.integration.conftest import NUM_TOKENS


def test_tokens_are_those_of_one_machine_in_the_same_precision(tmp_path: Path, store: Path) -> None:
    alone = open_alone(store, max_tokens=256, precision="int4")
    ids = load_tokenizer(MODEL)(PROMPTS[0])["input_ids"]
    want = list(generate(alone, ids, max_tokens=NUM_TOKENS))
    settings = {"precision": "int4", "context": {"tokens": 256, "sessions": 1}}
    with running(tmp_path, 2, store=store, settings=settings) as cluster:
        assert cluster.apply(save(cluster, make_plan(cluster, spread(cluster.nodes)))).returncode == 0
        assert cluster.generate("n0", PROMPTS[0], "--max-tokens", str(NUM_TOKENS))["tokens"] == want
        assert [node["precision"] for node in cluster.status()["nodes"]] == ["int4", "int4"]
        shown = cluster.planner("status", "--coordinator", cluster.coordinator).stdout
        assert "n1: executes every expert in int4" in shown
