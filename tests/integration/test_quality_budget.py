"""Agents that may give something up: they wait for nobody, say what it cost, and stay exact where that is asked."""

import json
import math
from pathlib import Path

import pytest
import torch

from agent.client import Answer, stream
from runtime.loading import load_tokenizer, load_whole
from schemas.calibration import Calibration, Setting, Situation
from schemas.precision import Precision
from tests.cluster import MODEL, PROMPTS, make_plan, running, spec, spread, wait_for
from tests.integration.conftest import NUM_TOKENS


def everything(path: Path, precision: Precision = "checkpoint") -> Path:
    """Write a calibration that gives up whatever is not at hand, made with experts in a precision."""
    model = spec()
    setting = Setting(
        budget=0.5, shares=(1e9,) * model.layers, nll=(math.log(1.5) / model.layers,) * model.layers,
        nll_per_mass=(1e-6,) * model.layers, rise=0.5, low=0.4, high=0.6, divergence=100.0, waits_share=0.0,
    )  # fmt: skip
    found = Calibration(
        model=model.id, layers=model.layers, experts=model.experts, top_k=model.top_k, tokens=1, pieces=8, warmup=0,
        situation=Situation(node="n0", is_whole=True, precision=precision), settings=(setting,),
    )  # fmt: skip
    path.write_text(found.model_dump_json())
    return path


def ids_of(text: str) -> list[int]:
    return load_tokenizer(MODEL)(text)["input_ids"]  # type: ignore[no-any-return]


def likelihood(text: str, *, window: int) -> list[float]:
    """Negative log-likelihood of every token but the first, in pieces that overlap by one."""
    model, ids, found = load_whole(MODEL, dtype="float32"), ids_of(text), []
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[start : start + window + 1]])
        with torch.inference_mode():
            predicted = model(piece[:, :-1]).logits.log_softmax(-1)[0]
        found += (-predicted.gather(1, piece[0, 1:, None])[:, 0]).tolist()
    return found


def test_a_budget_is_spent_and_told(tmp_path: Path, store: Path, reference: dict[str, list[int]]) -> None:
    scores = {}
    quality = {"calibration": str(everything(tmp_path / "c.json"))}
    with running(tmp_path, 2, store=store, settings={"quality": quality}) as cluster:
        cluster.reach(make_plan(cluster, spread(cluster.nodes), quality_budget=0.5))
        options = ("--max-tokens", str(NUM_TOKENS))
        assert cluster.generate("n0", PROMPTS[0], *options, "--combine", "ordered")["tokens"] == reference[PROMPTS[0]]
        exact = wait_for(
            lambda: (q := cluster.node_status("n0")["quality"]) and q["events"] and q, timeout_s=5, what="a heartbeat"
        )
        assert exact["spared_events"] == 0
        text = PROMPTS[0] + "(self):\n        self.items = []\n"
        asked = {"prompt": text, "max_tokens": 8, "score": True}
        for combine in ("ordered", "partial"):
            answer = Answer()
            list(stream("n0", cluster.coordinator, answer, combine=combine, **asked))
            assert answer.tokens == ids_of(text)[1:]
            scores[combine] = answer.nll
        assert scores["ordered"] == pytest.approx(likelihood(text, window=8), rel=1e-4)
        assert scores["partial"] != pytest.approx(scores["ordered"], rel=1e-4), "what is given up changes predictions"
        got = cluster.generate("n0", PROMPTS[0], *options)["tokens"]
        assert len(got) == NUM_TOKENS
        used = wait_for(
            lambda: (q := cluster.node_status("n0")["quality"])["spared_events"] and q, timeout_s=5, what="a heartbeat"
        )
        assert used["standing"] == "open"
        assert used["budget"] == 0.5
        assert 0 < used["lost_mass"] < 1
        assert 0 < used["rise"] < 0.5
        assert cluster.node_status("n0")["substitution_share"] > 0
        status = ("status", "--coordinator", cluster.coordinator, "--json", "--layers", "n0")
        said = json.loads(cluster.planner(*status).stdout)
        assert all(layer["replaced_rows"] > 0 for layer in said["layers"][0]["layers"])
        assert {node["id"]: node["quality"] and node["quality"]["budget"] for node in said["nodes"]} == {
            "n0": 0.5,
            "n1": None,
        }


def test_a_budget_pays_for_experts_that_are_held_in_low_precision(tmp_path: Path, store: Path) -> None:
    """What a calibration was made with, or measured, is spent; where nobody knows what is left, nothing is."""
    quality = {"calibration": str(everything(tmp_path / "c.json", "int8"))}
    with running(tmp_path, 2, store=store, settings={"quality": quality, "precision": "int8"}) as cluster:
        cluster.reach(make_plan(cluster, spread(cluster.nodes), quality_budget=0.5))
        cluster.generate("n0", PROMPTS[0], "--max-tokens", "4")
        used = wait_for(
            lambda: (q := cluster.node_status("n0")["quality"])["spared_events"] and q, timeout_s=5, what="a heartbeat"
        )
        assert used["standing"] == "open"
        everything(tmp_path / "c.json", "int4")
        cluster.reach(make_plan(cluster, spread(cluster.nodes), current=cluster.active, quality_budget=0.6))
        told = wait_for(
            lambda: (q := cluster.node_status("n0")["quality"])["standing"] == "uncalibrated" and q,
            timeout_s=5,
            what="a heartbeat",
        )
        assert "was measured with experts in int4, this node holds them in int8" in told["note"]
