"""The planner's own plans on real agents: several stages in mid-answer, every tier, nodes that are nearly full."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from schemas.plan import load_plan
from schemas.topology import TIERS
from tests.cluster import PROMPTS, REPOSITORY, Cluster, Stream, environment, running

QUICKSTART = REPOSITORY / "examples" / "quickstart" / "topology.yaml"
OneNode = Callable[[str, int], list[int]]


def solve(cluster: Cluster, topology: Path, name: str, *options: str) -> Path:
    path = cluster.path / name
    done = cluster.planner("solve", str(topology), "-o", str(path), *options)
    assert done.returncode == 0, done.stderr
    return path


def test_many_stages_in_mid_answer_on_nodes_that_are_nearly_full(
    tmp_path: Path, store: Path, one_node: OneNode
) -> None:
    """The quickstart's second plan shuffles experts through nodes without room to spare, in all three tiers."""
    with running(tmp_path, 0, store=store, topology=QUICKSTART) as cluster:
        first = solve(cluster, cluster.topology, "first.json")
        assert cluster.apply(first).returncode == 0, cluster.logs()
        assert {replica.tier for replica in load_plan(first).placement} == set(TIERS)
        cluster.require_budgets()
        second = solve(cluster, turned(cluster), "second.json", "--current", str(first), "--horizon", "100 h")
        assert load_plan(second).epoch >= 3
        apply = subprocess.Popen(
            cluster.planner_command("apply", str(second)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment(),
        )  # fmt: skip
        streams: dict[tuple[str, str, int], tuple[int, Stream]] = {}
        crossed = 0
        while apply.poll() is None:
            for asked in (("gateway", PROMPTS[0], 400), ("oven", PROMPTS[1], 300)):
                if asked not in streams:
                    streams[asked] = cluster.status()["epoch"], cluster.begin(*asked)
                elif not streams[asked][1].is_alive():
                    epoch, stream = streams.pop(asked)
                    assert stream.tokens() == one_node(*asked[1:])
                    crossed += cluster.status()["epoch"] > epoch
            cluster.require_budgets()
        assert apply.returncode == 0, cluster.logs()
        for (_, prompt, count), (epoch, stream) in streams.items():
            assert stream.tokens() == one_node(prompt, count)
            crossed += cluster.status()["epoch"] > epoch
        assert crossed, "no answer began in one epoch and ended in another"
        final = load_plan(second)
        for node in cluster.status()["nodes"]:
            assert node["epoch"] == final.epoch
            for tier in TIERS:
                given = sum((r.node, r.tier) == (node["id"], tier) for r in final.placement)
                assert node["experts"][tier] == given
        for node in cluster.nodes:
            answer = cluster.generate(node, PROMPTS[2], "--max-tokens", "32")
            assert answer["tokens"] == one_node(PROMPTS[2], 64)[:32]


def turned(cluster: Cluster) -> Path:
    """The same cluster, with every node's workload at the next one."""
    document: dict[str, Any] = yaml.safe_load(cluster.topology.read_text())
    ingresses = [node["ingress"] for node in document["nodes"]]
    for node, ingress in zip(document["nodes"], ingresses[1:] + ingresses[:1], strict=True):
        node["ingress"] = ingress
    path = cluster.path / "turned.yaml"
    path.write_text(yaml.safe_dump(document))
    return path
