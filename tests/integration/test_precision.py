"""Agents that execute experts in a low precision: one machine's tokens in that precision, and status says so."""

from functools import partial
from pathlib import Path

import pytest
import torch

from runtime.alone import open_alone
from runtime.generation import generate
from runtime.loading import load_tokenizer, load_whole
from runtime.rounding import degraded
from runtime.store import prepare_store
from schemas.plan import NodePrecision
from schemas.precision import LowPrecision, Precision
from tests.cluster import MODEL, PROMPTS, Cluster, make_plan, running, save, spread
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


INT8 = 38144  # bytes of an expert of the model


def rounded(precision: LowPrecision, prompt: str, layers: list[int] | None) -> list[int]:
    """Greedy tokens of one machine whose experts of some layers (all if None) are what a precision makes of them."""
    tokenizer, model = load_tokenizer(MODEL), load_whole(MODEL, dtype="float32")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode(), degraded(model, precision, layers):
        out = model.generate(ids, do_sample=False, max_new_tokens=NUM_TOKENS, attention_mask=torch.ones_like(ids))
    return out[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def half(nodes: list[str], layer: int, _: int) -> list[str]:
    """The holder of an expert: of the first two layers the first node, else the second."""
    return [nodes[layer // 2]]


def refused(cluster: Cluster, **changes: object) -> str:
    """What is said to a plan that must be refused."""
    holders = partial(half, cluster.nodes)
    assert cluster.active is not None
    plan = make_plan(cluster, holders, current=cluster.active, routes=(), **changes)
    done = cluster.apply(save(cluster, plan, "refused.json"))
    assert done.returncode == 4, done.stdout
    return done.stderr


def held(node: str, precision: Precision) -> tuple[NodePrecision, ...]:
    return (NodePrecision(node=node, precision=precision, expert_bytes=INT8),)


@pytest.mark.parametrize("has_packed", [True, False])
def test_every_node_holds_experts_in_the_precision_of_the_plan(
    tmp_path: Path, store: Path, *, has_packed: bool
) -> None:
    """Records come to it packed where the store has them so, else it packs what comes."""
    if has_packed:
        prepare_store(MODEL, store := tmp_path / "store", dtype="float32", precisions=("int8",))
    with running(tmp_path, 2, store=store, settings={"precision": "plan"}) as cluster:
        n0, n1 = cluster.nodes
        precisions = (NodePrecision(node=n0, precision="checkpoint", expert_bytes=147456), *held(n1, "int8"))
        holders = partial(half, cluster.nodes)
        cluster.reach(make_plan(cluster, holders, precisions=precisions))
        want = rounded("int8", PROMPTS[0], [2, 3])
        assert cluster.generate(n0, PROMPTS[0], "--max-tokens", str(NUM_TOKENS))["tokens"] == want
        there = {node["id"]: node for node in cluster.status()["nodes"]}
        assert {name: node["precision"] for name, node in there.items()} == {n0: "checkpoint", n1: "int8"}
        assert there[n1]["experts"]["device"] == 32
        assert there[n1]["memory_used"]["device"] == 32 * INT8
        brought = {file.stat().st_size for file in (cluster.data(n1) / "backing").iterdir()}
        assert brought == {INT8 if has_packed else 147456}
        if not has_packed:
            return
        said = refused(cluster, precisions=held(n1, "int4"))
        assert "n1: holds experts in int8 for epoch 1, the plan wants them in int4; apply a plan first" in said
        assert cluster.interrupt(n1) == 0
        cluster.start_agent(n1, "--precision", "int8")
        cluster.wait_up([n1])
        said = refused(cluster, precisions=held(n1, "checkpoint"))
        assert "n1 can hold experts in int8, the plan wants them in checkpoint there; set precision in the" in said
        assert cluster.generate(n0, PROMPTS[0], "--max-tokens", str(NUM_TOKENS))["tokens"] == want
        said = refused(cluster, precisions=held(n0, "int8"))
        assert "n0: holds experts in checkpoint for epoch 1, the plan wants them in int8; start it again with" in said
        assert cluster.interrupt(n0) == 0
        cluster.start_agent(n0, "--precision", "int8")
        cluster.wait_up([n0])
        everywhere = (*held(n0, "int8"), *held(n1, "int8"))
        cluster.reach(make_plan(cluster, holders, current=cluster.active, precisions=everywhere))
        tokens = cluster.generate(n0, PROMPTS[0], "--max-tokens", str(NUM_TOKENS))["tokens"]
        assert tokens == rounded("int8", PROMPTS[0], None)
