"""Plans in force on real agents: several stages in mid-answer, every tier, explicit routes, a stale epoch."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.placement import sorted_routes
from schemas.plan import load_plan
from schemas.topology import TIERS
from schemas.units import parse_bytes
from tests.cluster import PROMPTS, REPOSITORY, Cluster, environment, make_plan, running, save, spread, wait_for
from tests.small_plans import route
from tests.tcp_proxy import Proxy

QUICKSTART = REPOSITORY / "examples" / "quickstart" / "topology.yaml"
OneNode = Callable[[str, int], list[int]]


def begin(cluster: Cluster, node: str, prompt: str, tokens: int) -> "subprocess.Popen[str]":
    """Start a generation and wait until its tokens flow."""
    before = cluster.node_status(node)["tokens"]
    command = cluster.generate_command(node, prompt, "--max-tokens", str(tokens))
    stream = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: cluster.node_status(node)["tokens"] > before, timeout_s=60, what="the first tokens")
    return stream


def tokens_of(stream: "subprocess.Popen[str]", cluster: Cluster) -> list[int]:
    output, errors = stream.communicate(timeout=120)
    assert stream.returncode == 0, (errors, cluster.logs())
    return json.loads(output)["tokens"]  # type: ignore[no-any-return]


def require_budgets(cluster: Cluster) -> None:
    """What agents report and what lies on their disks is within what their configs allow."""
    for node in cluster.status()["nodes"]:
        for tier in TIERS:
            assert node["memory_used"][tier] <= node["memory_allowed"][tier], (node["id"], tier)
        allowed = parse_bytes(cluster.memory_of(node["id"])["disk"])
        assert record_bytes(cluster.data(node["id"])) <= allowed, node["id"]


def record_bytes(data: Path) -> int:
    """Bytes of all files of an agent but its journal."""
    sizes = []
    for file in data.rglob("*"):
        try:
            sizes.append(file.stat().st_size if file.is_file() and "journal" not in file.name else 0)
        except FileNotFoundError:
            continue  # renamed or dropped meanwhile
    return sum(sizes)


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
        require_budgets(cluster)
        second = solve(cluster, turned(cluster), "second.json", "--current", str(first), "--horizon", "100 h")
        assert load_plan(second).epoch >= 3
        streams = [begin(cluster, "gateway", PROMPTS[0], 400), begin(cluster, "oven", PROMPTS[1], 300)]
        apply = subprocess.Popen(
            cluster.planner_command("apply", str(second)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment(),
        )  # fmt: skip
        epochs = set()
        while apply.poll() is None:
            require_budgets(cluster)
            if all(stream.poll() is None for stream in streams):
                epochs.add(cluster.status()["epoch"])
        assert apply.returncode == 0, cluster.logs()
        assert len(epochs) >= 2, "the answers ended before a second stage began"
        assert tokens_of(streams[0], cluster) == one_node(PROMPTS[0], 400)
        assert tokens_of(streams[1], cluster) == one_node(PROMPTS[1], 300)
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


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[tuple[Cluster, Proxy]]:
    """Three nodes, the first of which has its coordinator behind a proxy."""
    path = tmp_path_factory.mktemp("line")
    cluster = Cluster(path, 3, store=store)
    proxy = Proxy(cluster.port)
    cluster.write_config("n0", coordinator=f"127.0.0.1:{proxy.port}")
    try:
        with running(path, 3, cluster=cluster):
            yield cluster, proxy
    finally:
        proxy.close()


def test_a_call_under_a_stale_epoch_follows_the_newer_one(line: tuple[Cluster, Proxy], one_node: OneNode) -> None:
    """n0 is cut off from the coordinator alone, misses an epoch that leaves it out, and is told in mid-answer."""
    cluster, proxy = line
    before = make_plan(cluster, spread(cluster.nodes), ingresses=["n0", "n1"])
    assert cluster.apply(save(cluster, before)).returncode == 0, cluster.logs()
    stream = begin(cluster, "n0", PROMPTS[0], 900)
    proxy.cut()
    wait_for(lambda: cluster.node_status("n0")["state"] == "away", timeout_s=20, what="n0 away")
    without = make_plan(cluster, spread(["n2", "n1"]), current=before, ingresses=["n1"])
    done = cluster.apply(save(cluster, without, "without.json"))
    assert done.returncode == 0, (done.stderr, cluster.logs())
    proxy.mend()
    tokens = tokens_of(stream, cluster)
    assert tokens == one_node(PROMPTS[0], 900)[: len(tokens)]
    assert len(tokens) == 900
    assert "is retired" in cluster.log("n0"), "no call was stale: the answer ended before the epoch"
    wait_for(lambda: cluster.node_status("n0")["epoch"] == 2, timeout_s=20, what="n0 in the new epoch")
    wait_for(
        lambda: (
            (n := cluster.node_status("n0"))["experts"] == dict.fromkeys(TIERS, 0) and not n["memory_used"]["device"]
        ),
        timeout_s=20,
        what="n0 without experts and trunk",
    )
    assert "takes no tokens in" in cluster.try_generate("n0", PROMPTS[0]).stderr


def test_an_explicit_route_is_taken_and_the_own_disk_takes_over(line: tuple[Cluster, Proxy], one_node: OneNode) -> None:
    cluster, _ = line
    epoch = cluster.status()["epoch"]
    current = make_plan(cluster, spread(["n2", "n1"]), ingresses=["n1"]).model_copy(update={"epoch": epoch})
    plan = make_plan(cluster, lambda *_: ["n0/disk", "n1"], current=current, ingresses=["n0"])
    keys = sorted({replica.key for replica in plan.placement})
    routes = sorted_routes(route("n0", key, "n1") for key in keys)
    plan = plan.model_copy(update={"routes": routes}).sealed()
    done = cluster.apply(save(cluster, plan, "routes.json"))
    assert done.returncode == 0, (done.stderr, cluster.logs())
    stream = begin(cluster, "n0", PROMPTS[1], 600)
    cluster.kill("n1")
    assert stream.poll() is None, "the answer ended before the holder died"
    tokens = tokens_of(stream, cluster)
    assert tokens == one_node(PROMPTS[1], 600)[: len(tokens)]
    require_budgets(cluster)
    assert "the connection is lost" in cluster.log("n0")
