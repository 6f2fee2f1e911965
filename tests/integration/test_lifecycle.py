"""Starting twice, stopping in any order, and a coordinator that goes away."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import (
    AGENT,
    PLANNER,
    PROMPTS,
    Cluster,
    call,
    environment,
    free_port,
    make_plan,
    save,
    spread,
    wait_for,
)
from tests.integration.conftest import NUM_TOKENS

OneNode = Callable[[str, int], list[int]]


@pytest.fixture(autouse=True)
def healed(cluster: Cluster) -> Iterator[None]:
    """What a test that failed has stopped runs again for the next one."""
    yield
    cluster.heal()


@pytest.fixture(scope="module")
def cluster(pair: Cluster) -> Cluster:
    pair.heal()
    if pair.status()["epoch"] == 0:
        pair.reach(make_plan(pair, spread(pair.nodes)))
    return pair


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in done.stderr


def test_two_nodes_give_one_node_tokens(cluster: Cluster, one_node: OneNode) -> None:
    for prompt in PROMPTS:
        answer = cluster.generate("n0", prompt, "--max-tokens", str(NUM_TOKENS))
        assert answer["tokens"] == one_node(prompt, NUM_TOKENS)


def test_an_agent_started_twice_is_refused(cluster: Cluster, one_node: OneNode) -> None:
    same = call(*AGENT, "run", "--config", str(cluster.path / "n1.yaml"))
    refused(same, "data-n1", "another agent runs on this data directory")
    said = cluster.log("coordinator")
    other = cluster.write_config("spare", node="n1", data="data-copy")
    refused(call(*AGENT, "run", "--config", str(other)), "another agent runs as node 'n1' already")
    assert cluster.up() == {"n0", "n1"}
    assert "not heard" not in cluster.log("coordinator").removeprefix(said)
    assert cluster.generate("n0", PROMPTS[0], "--max-tokens", "16")["tokens"] == one_node(PROMPTS[0], 64)[:16]


def test_an_agent_that_is_merely_late_keeps_its_place(cluster: Cluster, one_node: OneNode) -> None:
    """Found on two overloaded cores: heartbeats came too late, and the second agent took the place."""
    other = cluster.write_config("spare", node="n1", data="data-copy")
    cluster.signal("n1", signal.SIGSTOP)
    try:
        wait_for(lambda: cluster.node_status("n1")["last_heartbeat_s"] > 2, timeout_s=10, what="n1 to be late")
        refused(call(*AGENT, "run", "--config", str(other), timeout_s=20), "another agent runs as node 'n1' already")
    finally:
        cluster.signal("n1", signal.SIGCONT)
    cluster.wait_up(cluster.nodes)
    assert cluster.generate("n0", PROMPTS[0], "--max-tokens", "16")["tokens"] == one_node(PROMPTS[0], 64)[:16]


def test_a_coordinator_started_twice_is_refused(cluster: Cluster) -> None:
    refused(call(*PLANNER, "serve", str(cluster.topology)), str(cluster.port), "another planner serve")
    elsewhere = cluster.path / "elsewhere.yaml"
    elsewhere.write_text(cluster.topology.read_text().replace(f"port: {cluster.port}", f"port: {free_port()}"))
    journal = str(cluster.topology.with_suffix(".journal"))
    refused(
        call(*PLANNER, "serve", str(elsewhere), "--journal", journal), journal, "another planner serve runs with it"
    )


def test_answers_go_on_without_a_coordinator_and_questions_to_it_end_soon(cluster: Cluster, one_node: OneNode) -> None:
    with subprocess.Popen(
        cluster.planner_command("status", "--watch", "--coordinator", cluster.coordinator),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    ) as watch:  # fmt: skip
        command = cluster.generate_command("n0", PROMPTS[0], "--max-tokens", "600")
        before = cluster.node_status("n0")["tokens"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as stream:
            wait_for(lambda: cluster.node_status("n0")["tokens"] > before, timeout_s=60, what="the first tokens")
            cluster.kill("coordinator")
            assert stream.poll() is None, "the answer ended before the coordinator"
            output, _ = stream.communicate(timeout=60)
        assert json.loads(output)["tokens"] == one_node(PROMPTS[0], 600)
        _, said = watch.communicate(timeout=20)
        assert watch.returncode == 2
        assert f"no coordinator answers at {cluster.coordinator}" in said
    refused(cluster.try_generate("n0", PROMPTS[0]), "no coordinator answers")
    refused(cluster.planner("status", "--coordinator", cluster.coordinator), "no coordinator answers")
    cluster.start_coordinator()
    cluster.wait_up(cluster.nodes)


def test_apply_sits_out_a_restart_of_the_coordinator(cluster: Cluster) -> None:
    """n1 is stopped, so that the plan waits while the coordinator is killed and comes back."""
    epoch = cluster.status()["epoch"]
    current = make_plan(cluster, spread(cluster.nodes)).model_copy(update={"epoch": epoch})
    plan = save(cluster, make_plan(cluster, spread(cluster.nodes, shift=1), current=current), "next.json")
    assert cluster.interrupt("n1") == 0
    with subprocess.Popen(
        cluster.planner_command("apply", str(plan)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    ) as apply:  # fmt: skip
        wait_for(lambda: cluster.status()["plan"]["phase"] == "proposed", timeout_s=20, what="the plan")
        cluster.kill("coordinator")
        cluster.start_coordinator()
        cluster.start_agent("n1")
        output, errors = apply.communicate(timeout=60)
        assert apply.returncode == 0, (errors, cluster.logs())
        assert f"epoch {epoch + 1} is active" in output


def test_a_stop_is_told_apart_from_a_loss(cluster: Cluster) -> None:
    said = cluster.log("coordinator")
    assert cluster.interrupt("n1") == 0
    assert cluster.node_status("n1")["state"] == "stopped"
    assert "stopped" in cluster.planner("status", "--coordinator", cluster.coordinator).stdout
    time.sleep(4)  # longer than a node may be silent
    assert "not heard" not in cluster.log("coordinator").removeprefix(said)
    cluster.start_agent("n1")
    cluster.wait_up(cluster.nodes)


def test_an_agent_that_is_stopped_tells_its_clients(cluster: Cluster) -> None:
    wait_for(lambda: cluster.node_status("n0")["epoch"] == cluster.status()["epoch"], timeout_s=30, what="n0 serves")
    before = cluster.node_status("n0")["tokens"]
    with subprocess.Popen(
        cluster.generate_command("n0", PROMPTS[0], "--max-tokens", "1000"), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=environment(),
    ) as stream:  # fmt: skip
        wait_for(lambda: cluster.node_status("n0")["tokens"] > before, timeout_s=60, what="the first tokens")
        assert cluster.interrupt("n0") == 0
        _, said = stream.communicate(timeout=20)
        assert stream.returncode == 1
        assert "the agent was stopped" in said
    cluster.start_agent("n0")
    cluster.wait_up(cluster.nodes)


def test_an_agent_is_stopped_while_it_starts(cluster: Cluster) -> None:
    config = cluster.write_config("spare", data="data-spare")
    process = subprocess.Popen(
        cluster.agent_command("run", "--config", str(config)), stderr=subprocess.PIPE, text=True, env=environment()
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), timeout_s=30, what="the agent importing what takes long")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert "Traceback" not in said


@pytest.mark.parametrize("order", [["coordinator", "n0", "n1"], ["n1", "n0", "coordinator"]])
def test_everything_stops_in_any_order_with_one_line_each(cluster: Cluster, order: list[str]) -> None:
    wait_for(lambda: cluster.node_status("n1")["epoch"] == cluster.status()["epoch"], timeout_s=30, what="n1 serves")
    said = {name: cluster.log(name) for name in order}
    for name in order:
        assert cluster.interrupt(name) == 0
    last = {name: cluster.log(name).removeprefix(said[name]).splitlines() for name in order}
    assert last == {
        "coordinator": ["coordinator of test stopped"],
        "n0": ["agent of n0 stopped"],
        "n1": ["agent of n1 stopped"],
    }
    if order[0] == "coordinator":
        cluster.start_coordinator()
        for node in cluster.nodes:
            cluster.start_agent(node)
        cluster.wait_up(cluster.nodes)
