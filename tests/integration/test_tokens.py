"""Real agents on loopback: their tokens are the one-node tokens, whatever happens around them."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schemas.placement import sorted_routes
from schemas.topology import TIERS
from tests.cluster import PROMPTS, Cluster, environment, make_plan, running, save, spread, started, wait_for
from tests.integration.conftest import NUM_TOKENS
from tests.small_plans import route
from tests.tcp_proxy import Proxy

Reference = dict[str, list[int]]
OneNode = Callable[[str, int], list[int]]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[tuple[Cluster, Proxy]]:
    """Three nodes, the first of which has its coordinator behind a proxy."""
    cluster = Cluster(tmp_path_factory.mktemp("three"), 3, store=store)
    with Proxy(cluster.port) as proxy:
        cluster.write_config("n0", coordinator=f"127.0.0.1:{proxy.port}")
        with started(cluster):
            cluster.reach(make_plan(cluster, spread(cluster.nodes)))
            yield cluster, proxy


@pytest.fixture
def cluster(line: tuple[Cluster, Proxy]) -> Cluster:
    return line[0]


def ask(cluster: Cluster, prompt: str, *options: str, node: str = "n0") -> list[int]:
    return cluster.generate(node, prompt, "--max-tokens", str(NUM_TOKENS), *options)["tokens"]  # type: ignore[no-any-return]


def same(tokens: list[int], reference: list[int]) -> bool:
    """Whether an answer that was cut short is how the reference begins."""
    return tokens == reference[: len(tokens)]


def test_three_nodes_give_one_node_tokens(cluster: Cluster, reference: Reference) -> None:
    for prompt in PROMPTS:
        assert ask(cluster, prompt) == reference[prompt]
    assert ask(cluster, PROMPTS[0], "--combine", "ordered") == reference[PROMPTS[0]]


def test_five_nodes_give_one_node_tokens(tmp_path: Path, store: Path, reference: Reference) -> None:
    with running(tmp_path, 5, store=store) as cluster:
        cluster.reach(make_plan(cluster, spread(cluster.nodes)))
        for prompt in PROMPTS:
            assert ask(cluster, prompt) == reference[prompt]


def test_status_tells_what_was_served(cluster: Cluster) -> None:
    ask(cluster, PROMPTS[0])
    node = wait_for(
        lambda: (n := cluster.node_status("n0"))["tokens"] and n, timeout_s=5, what="a heartbeat with tokens"
    )
    assert node["epoch"] == 1
    assert sum(node["experts"].values()) == 22
    assert 0.4 < node["remote_share"] < 0.9
    assert node["hit_rate"] + node["remote_share"] == pytest.approx(1.0)
    assert 0 < node["memory_used"]["device"] <= node["memory_allowed"]["device"]
    assert "n0" in cluster.planner("status", "--coordinator", cluster.coordinator).stdout


def test_status_tells_what_each_layer_met(cluster: Cluster) -> None:
    ask(cluster, PROMPTS[0])
    options = ("--coordinator", cluster.coordinator)
    said = json.loads(cluster.planner("status", *options, "--layers", "--json").stdout)
    by_node = {each["node"]: each for each in said["layers"]}
    assert set(by_node) == set(cluster.nodes)
    here = by_node["n0"]
    assert here["trunk_s"] > 0
    assert [each["tokens"] for each in here["layers"]] == [here["tokens"]] * 4
    for each in here["layers"]:
        assert each["device_rows"] + each["host_rows"] + each["disk_rows"] + each["remote_rows"] == 2 * here["tokens"]
        assert each["calls"] > 0
        assert each["local_s"] > 0
    node = cluster.node_status("n0")
    rows = sum(each["remote_rows"] for each in here["layers"])
    assert rows / (8 * here["tokens"]) == pytest.approx(node["remote_share"], abs=0.02)  # the heartbeat is older
    shown = cluster.planner("status", *options, "--layers", "n0").stdout
    assert "layers at n0" in shown
    assert "layers at n1" not in shown
    assert "other nodes" in shown.splitlines()[-1]
    nowhere = cluster.planner("status", *options, "--layers", "elsewhere")
    assert nowhere.returncode == 2
    assert "n0, n1" in nowhere.stderr


def test_sampling_is_repeatable(cluster: Cluster, reference: Reference) -> None:
    options = ("--temperature", "0.9", "--top-p", "0.9", "--seed")
    first, again, other = (ask(cluster, PROMPTS[2], *options, seed) for seed in ("7", "7", "8"))
    assert first == again
    assert len({tuple(first), tuple(other), tuple(reference[PROMPTS[2]])}) == 3


def test_several_requests_at_a_time(cluster: Cluster, reference: Reference) -> None:
    asked = [PROMPTS[n % 3] for n in range(5)]  # more than sessions: some wait in line
    commands = [cluster.generate_command("n0", p, "--max-tokens", str(NUM_TOKENS)) for p in asked]
    running_now = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for c in commands
    ]
    for prompt, process in zip(asked, running_now, strict=True):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert json.loads(output)["tokens"] == reference[prompt]


def test_counters_become_activation_statistics(cluster: Cluster, tmp_path: Path) -> None:
    ask(cluster, PROMPTS[1])
    file = tmp_path / "counters.json"
    done = cluster.planner("counters", "-o", str(file), "--coordinator", cluster.coordinator)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    (counted,) = document["nodes"]
    assert counted["node"] == "n0"
    assert [sum(layer) for layer in counted["counts"]] == [counted["tokens"] * document["top_k"]] * document["layers"]


def test_new_plan_in_the_middle_of_a_generation(cluster: Cluster, reference: Reference, one_node: OneNode) -> None:
    current = make_plan(cluster, spread(cluster.nodes))
    after = make_plan(cluster, spread(cluster.nodes, shift=1), current=current)
    stream = cluster.begin("n0", PROMPTS[0], 900)
    done = cluster.apply(save(cluster, after, "second.json"))
    assert done.returncode == 0, (done.stderr, cluster.logs())
    assert stream.is_alive(), "the generation ended before the plan was active"
    assert same(stream.some_more(), one_node(PROMPTS[0], 900))
    assert {node["epoch"] for node in cluster.status()["nodes"]} == {2}
    given = [sum(replica.node == node for replica in after.placement) for node in cluster.nodes]
    assert [sum(node["experts"].values()) for node in cluster.status()["nodes"]] == given
    for prompt in PROMPTS:
        assert ask(cluster, prompt) == reference[prompt]
    assert cluster.apply(cluster.path / "second.json").stdout.startswith("nothing to do")
    stale = cluster.apply(save(cluster, make_plan(cluster, spread(cluster.nodes, shift=2)), "stale.json"))
    assert (stale.returncode, "stale" in stale.stderr) == (4, True)


def test_agents_killed_while_idle_come_back(cluster: Cluster, reference: Reference) -> None:
    epoch = cluster.status()["epoch"]
    for name in ("n1", "n0"):
        cluster.kill(name)
        cluster.start_agent(name)
    cluster.kill("coordinator")
    cluster.start_coordinator()
    cluster.wait_up(cluster.nodes)
    wait_for(
        lambda: {n["epoch"] for n in cluster.status()["nodes"]} == {epoch}, timeout_s=60, what="the same epoch again"
    )
    assert cluster.status()["epoch"] == epoch
    for prompt in PROMPTS:
        assert ask(cluster, prompt) == reference[prompt]


def test_next_replica_takes_over_in_mid_answer(cluster: Cluster, one_node: OneNode) -> None:
    """Every expert that n0 lacks is on n1 and n2; whichever of them dies, the answer goes on and is the same."""
    plan = make_plan(
        cluster,
        lambda _, expert: ["n0"] if expert % 3 == 0 else ["n1", "n2"],
        current=cluster.active,
        ingresses=["n0"],
    )
    cluster.reach(plan)
    stream = cluster.begin("n0", PROMPTS[0], 900)
    cluster.kill("n1")
    assert stream.is_alive(), "the generation ended before the holder died"
    assert same(stream.some_more(), one_node(PROMPTS[0], 900))
    cluster.start_agent("n1")
    cluster.wait_up(cluster.nodes)


def test_a_call_under_a_stale_epoch_follows_the_newer_one(line: tuple[Cluster, Proxy], one_node: OneNode) -> None:
    """n0 is cut off from the coordinator alone, misses an epoch that leaves it out, and is told in mid-answer."""
    cluster, proxy = line
    before = make_plan(cluster, spread(cluster.nodes), current=cluster.active, ingresses=["n0", "n1"])
    cluster.reach(before)
    where = cluster.locate("n0")
    proxy.cut()
    wait_for(lambda: cluster.node_status("n0")["state"] == "away", timeout_s=20, what="n0 away")
    stream = cluster.begin("n0", PROMPTS[0], 900, where)
    without = make_plan(cluster, spread(["n2", "n1"]), current=before, ingresses=["n1"])
    cluster.reach(without)
    proxy.mend()
    wait_for(lambda: "is retired" in cluster.log("n0"), timeout_s=20, what="a stale call: did the answer end before?")
    assert same(stream.some_more(), one_node(PROMPTS[0], 900))
    wait_for(lambda: cluster.node_status("n0")["epoch"] == without.epoch, timeout_s=20, what="n0 in the new epoch")
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
    plan = make_plan(cluster, lambda *_: ["n0/disk", "n1"], current=cluster.active, ingresses=["n0"])
    keys = sorted({replica.key for replica in plan.placement})
    cluster.reach(plan.model_copy(update={"routes": sorted_routes(route("n0", key, "n1") for key in keys)}).sealed())
    stream = cluster.begin("n0", PROMPTS[1], 400)
    cluster.kill("n1")
    assert stream.is_alive(), "the answer ended before the holder died"
    # calls fail over, unless n0 has found its own disk to be quicker than calls by then
    wait_for(
        lambda: "the connection is lost" in cluster.log("n0") or not stream.is_alive(),
        timeout_s=20,
        what="a call that failed over, or an answer",
    )
    assert same(stream.some_more(), one_node(PROMPTS[1], 400))
    cluster.require_budgets()
