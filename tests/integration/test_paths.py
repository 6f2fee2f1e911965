"""Tokens that move: real agents whose hidden states go from node to node, one of them without a checkpoint."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from schemas.store import RECORDS_NAME
from tests.cluster import PROMPTS, Cluster, make_plan, ring, save, spread, started, wait_for
from tests.integration.conftest import NUM_TOKENS

Reference = dict[str, list[int]]
OneNode = Callable[[str, int], list[int]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Cluster]:
    """Three nodes; all that n2 has of the model at first is its store's card: no weights at all."""
    path = tmp_path_factory.mktemp("paths")
    shutil.copytree(store, path / "card", ignore=shutil.ignore_patterns(RECORDS_NAME))
    settings = {"context": {"tokens": 1024, "sessions": 4}, "absence_timeout_s": 60}
    made = Cluster(path, 3, store=store, settings=settings)
    made.write_config("n2", model=str(path / "card"))
    with started(made):
        made.reach(whole_layers(made))
        yield made


def whole_layers(cluster: Cluster, **options: object):
    """Each node runs the layers whose experts it has; tokens enter at n0 and at n1."""
    return make_plan(
        cluster,
        lambda layer, _: [("n0", "n1", "n1", "n2")[layer]],
        paths=[ring("n0", "n0:0-0", "n1:1-2", "n2:3-3"), ring("n1", "n0:0-0", "n1:1-2", "n2:3-3")],
        **options,
    )


def ask(cluster: Cluster, prompt: str, *options: str, node: str = "n0") -> list[int]:
    return cluster.generate(node, prompt, "--max-tokens", str(NUM_TOKENS), *options)["tokens"]


def test_whole_layers_on_three_nodes_give_one_node_tokens(cluster: Cluster, reference: Reference) -> None:
    assert ask(cluster, PROMPTS[0], "--combine", "ordered") == reference[PROMPTS[0]]
    assert ask(cluster, PROMPTS[1], node="n1") == reference[PROMPTS[1]]
    beats = wait_for(
        lambda: (n := cluster.status()["nodes"]) and all(each["hops_per_token"] for each in n) and n,
        timeout_s=5, what="hops in the status",
    )  # fmt: skip
    for node in beats:
        assert node["hops_per_token"] == pytest.approx(1.0, abs=0.5)
        assert node["calls_per_token"] == 0
    cluster.require_budgets()


def test_a_trace_file_shows_every_node_of_the_path_on_one_clock(
    cluster: Cluster, reference: Reference, tmp_path: Path
) -> None:
    """Clocks of processes of one machine are the same, so that what is found out about them can be judged."""
    file = tmp_path / "trace.json"
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, cluster, PROMPTS[1])
        answer = cluster.generate("n0", PROMPTS[0], "--max-tokens", str(NUM_TOKENS), "--trace-file", str(file))
        assert other.result() == reference[PROMPTS[1]]
    assert answer["tokens"] == reference[PROMPTS[0]]
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [name.partition(" ")[0] for name in names.values()] == ["n0", "n1", "n2"]
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 for e in spans)
    tokens = [e for e in spans if "token" in e["name"] and e["name"].startswith("from n2")]
    assert len(tokens) == NUM_TOKENS
    for pid in names:
        steps = [e for e in spans if e["pid"] == pid and "trunk_ms" in e["args"]]
        assert len(steps) == NUM_TOKENS  # the prompt's, and one for each token but the last
        hops = [e for e in spans if e["pid"] == pid and e["name"].startswith("from ")]
        assert len(hops) >= NUM_TOKENS
    rows = {pid: next(e["ts"] for e in spans if e["pid"] == pid and "trunk_ms" in e["args"]) for pid in names}
    assert rows[1] < rows[2] < rows[3]
    error_ms = [float(name.split()[3]) for name in names.values() if "±" in name]
    assert len(error_ms) == 2
    assert max(error_ms) < 50


def test_four_answers_at_a_time(cluster: Cluster, reference: Reference) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: ask(cluster, PROMPTS[n % 3], node=f"n{n % 2}"), range(4)))
    assert answers == [reference[PROMPTS[n % 3]] for n in range(4)]


def test_a_segment_that_is_killed_in_mid_answer_comes_back(cluster: Cluster, one_node: OneNode) -> None:
    stream = cluster.begin("n0", PROMPTS[0], 900)
    cluster.kill("n2")
    assert stream.is_alive(), "the answer ended before n2 was killed"
    cluster.start_agent("n2")
    tokens = stream.some_more()
    assert tokens == one_node(PROMPTS[0], 900)[: len(tokens)]
    cluster.wait_up(cluster.nodes)


def test_paths_that_change_in_mid_answer(cluster: Cluster, reference: Reference, one_node: OneNode) -> None:
    """First to layers whose experts are elsewhere in part, then back to where tokens enter; n1 takes none in then."""
    mixed = make_plan(
        cluster, spread(cluster.nodes), current=cluster.active, paths=[ring("n0", "n2:0-1", "n0:2-2", "n1:3-3")]
    )
    stream = cluster.begin("n0", PROMPTS[0], 900)
    cluster.reach(mixed)
    assert stream.is_alive(), "the answer ended before the new paths were active"
    tokens = stream.some_more()
    assert tokens == one_node(PROMPTS[0], 900)[: len(tokens)]
    assert ask(cluster, PROMPTS[1]) == reference[PROMPTS[1]]
    assert ask(cluster, PROMPTS[2], "--combine", "ordered") == reference[PROMPTS[2]]
    assert "takes no tokens in" in cluster.try_generate("n1", PROMPTS[0]).stderr
    stream = cluster.begin("n0", PROMPTS[1], 400)
    cluster.reach(make_plan(cluster, spread(cluster.nodes), current=mixed))
    tokens = stream.some_more()
    assert tokens == one_node(PROMPTS[1], 400)[: len(tokens)]
    wait_for(
        lambda: cluster.node_status("n2")["memory_used"]["device"] < (1 << 20) * 3,
        timeout_s=5,
        what="n2 without layers",
    )
    cluster.require_budgets()


def test_a_node_whose_layers_do_not_fit_is_told_how_much_is_missing(cluster: Cluster) -> None:
    """The context is planned for in the agents' configs; the plan asks for the KV cache of eight ingresses at n1."""
    cluster.write_config("n1", context={"tokens": 1 << 20, "sessions": 4})
    cluster.interrupt("n1")
    cluster.start_agent("n1")
    cluster.wait_up(cluster.nodes)
    plan = whole_layers(cluster, current=cluster.active)
    done = cluster.apply(save(cluster, plan, "large.json"))
    assert done.returncode == 3, (done.stderr, cluster.logs())
    for part in (
        "n1: trunk (",
        "for a context of 1048576 tokens in 4 sessions",
        "more than its 64",
        "plan for less context",
    ):
        assert part in done.stderr
