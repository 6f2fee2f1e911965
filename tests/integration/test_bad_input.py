"""Bad input to the running cluster: one clear message, the right exit code, nothing half-done, no hang."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
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
    started,
    wait_for,
)


@pytest.fixture(scope="module")
def cluster(pair: Cluster) -> Cluster:
    return pair


def fails(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def generate(cluster: Cluster, node: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = cluster.generate_command(node, PROMPTS[0], "--max-tokens", "8", *options)
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)


@pytest.fixture(scope="module")
def lonely(cluster: Cluster) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """An agent that looks for a coordinator that is not there, begun early since it looks for ten seconds."""
    nobody = f"127.0.0.1:{free_port()}"
    command = cluster.agent_command("run", "--config", str(cluster.write_config("lonely", coordinator=nobody)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as it:
        yield nobody, it
        it.kill()


def test_before_any_plan(cluster: Cluster, lonely: object) -> None:
    fails(generate(cluster, "n0"), 1, "no plan is active")
    fails(generate(cluster, "elsewhere"), 2, "there is no node 'elsewhere'", "n0, n1")


def test_plans_that_are_refused(cluster: Cluster) -> None:
    plan = make_plan(cluster, spread(cluster.nodes))
    foreign = save(cluster, plan.model_copy(update={"cluster": "other"}), "foreign.json")
    fails(cluster.apply(foreign), 2, "'other'", "'test'")
    stale = save(cluster, plan.model_copy(update={"base_epoch": 4, "epoch": 5}), "stale.json")
    refused = cluster.apply(stale)
    fails(refused, 4, "stale", "epoch 4", "epoch 0")
    assert refused.stderr.startswith("error: ")
    lossy = save(cluster, plan.model_copy(update={"steps": plan.steps[1:]}), "lossy.json")
    fails(cluster.apply(lossy), 2, "no node holds layer 0 expert 0")
    edited = save(cluster, plan, "edited.json")
    edited.write_text(edited.read_text().replace('"n1"', '"n0"', 1))
    fails(cluster.apply(edited), 2, "altered")
    dry = cluster.apply(save(cluster, plan), "--dry-run")
    assert (dry.returncode, cluster.status()["epoch"]) == (0, 0)
    assert "may be applied" in dry.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[tuple[Cluster, Path | None]]:
    """Two nodes with little memory, and where mounting is allowed with 3 MiB of disk for n1."""
    path = tmp_path_factory.mktemp("small")
    memory = {"device": "20 MiB", "host": "0 MiB", "disk": "64 MiB"}
    cluster = Cluster(path, 2, store=store, memory=memory)
    disk = path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    if mounted:
        cluster.write_config("n1", data=str(disk))
    try:
        with started(cluster):
            yield cluster, disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_given_up_with_nothing_left_behind(small: tuple[Cluster, Path | None]) -> None:
    cluster, disk = small
    if disk is None:
        pytest.skip("mounting a small file system is not allowed here")
    plan = make_plan(cluster, spread(cluster.nodes), tier="disk")
    fails(cluster.apply(save(cluster, plan)), 3, "n1", str(disk), "free")
    wait_for(lambda: not list((disk / "records").iterdir()), timeout_s=5, what="no records left")
    assert cluster.status()["epoch"] == 0


def test_more_than_the_memory_allows_is_given_up(small: tuple[Cluster, Path | None]) -> None:
    cluster, _ = small
    everything = make_plan(cluster, lambda *_: cluster.nodes)
    fails(cluster.apply(save(cluster, everything)), 3, "device memory", "more than the", "raise memory.device")
    assert cluster.status()["epoch"] == 0
    nothing = [0] * len(cluster.nodes)  # what one agent had fetched is let go once it hears of the other
    wait_for(
        lambda: [node["experts"]["device"] for node in cluster.status()["nodes"]] == nothing,
        timeout_s=5,
        what="no experts held",
    )
    fits = make_plan(cluster, lambda layer, _: ["n0"] if layer == 0 else ["n1"])
    assert cluster.apply(save(cluster, fits)).returncode == 0


def test_ports_and_addresses(cluster: Cluster) -> None:
    fails(call(*PLANNER, "serve", str(cluster.topology)), 2, str(cluster.port))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = cluster.write_config("spare", data="data-spare", ports={"expert": port})
        fails(call(*AGENT, "run", "--config", str(config)), 2, f"127.0.0.1:{port}", "ports")
    config = cluster.write_config("spare", address="0.0.0.0")  # noqa: S104 - it is refused
    fails(call(*AGENT, "run", "--config", str(config)), 2, "address", "not a loopback address")
    topology = cluster.path / "open.yaml"
    topology.write_text(cluster.topology.read_text().replace("address: 127.0.0.1", "address: 0.0.0.0"))
    fails(call(*PLANNER, "serve", str(topology)), 2, "not a loopback address")


def test_configs_with_faults(cluster: Cluster) -> None:
    config = cluster.write_config("spare", memory={"device": "5 parsecs"}, tokens=3)
    fails(call(*AGENT, "run", "--config", str(config)), 2, "memory.device", "unknown unit", "tokens: unknown key")
    config = cluster.write_config("spare", node="n0", store=str(cluster.path), data="data-spare")
    fails(call(*AGENT, "run", "--config", str(config)), 2, "not a usable store")
    config = cluster.write_config("elsewhere")
    fails(call(*AGENT, "run", "--config", str(config)), 2, "no node 'elsewhere'")


def test_no_coordinator(cluster: Cluster, lonely: tuple[str, "subprocess.Popen[str]"]) -> None:
    nobody, agent = lonely
    commands = (
        cluster.planner_command("status", "--coordinator", nobody),
        cluster.planner_command("apply", str(cluster.path / "plan.json"), "--coordinator", nobody),
        cluster.agent_command("generate", "--node", "n0", "--prompt", "x", "--coordinator", nobody),
    )
    began = time.monotonic()
    asking = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for c in commands
    ]
    for process in (*asking, agent):
        output, errors = process.communicate(timeout=60)
        done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        fails(done, 2, f"no coordinator answers at {nobody}")
    assert time.monotonic() - began < 20


def test_holder_dies_in_mid_answer(cluster: Cluster) -> None:
    assert cluster.apply(save(cluster, make_plan(cluster, spread(cluster.nodes)))).returncode == 0
    command = cluster.generate_command("n0", PROMPTS[0], "--max-tokens", "1000")
    stream = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: cluster.node_status("n0")["tokens"] > 20, timeout_s=30, what="tokens flow")
    cluster.kill("n1")
    _, errors = stream.communicate(timeout=30)
    assert stream.returncode == 1
    assert "no answer from n1" in errors
    assert "layer" in errors
    assert "expert" in errors
    cluster.start_agent("n1")
    cluster.wait_up(cluster.nodes)
    wait_for(lambda: cluster.node_status("n1")["epoch"] == 1, timeout_s=30, what="n1 serves again")
    # the other node may need a moment more than its patience to find it again on a busy machine
    wait_for(lambda: generate(cluster, "n0").returncode == 0, timeout_s=30, what="tokens flow again")
    too_long = generate(cluster, "n0", "--max-tokens", "5000")
    fails(too_long, 2, "context.tokens of 1024")


def test_interrupted_client_frees_its_session(cluster: Cluster) -> None:
    command = [part for part in cluster.generate_command("n0", PROMPTS[0], "--max-tokens", "1000") if part != "--json"]
    for _ in range(4):  # more than sessions
        stream = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment())
        assert stream.stdout is not None
        stream.stdout.read(1)
        stream.kill() if _ % 2 else stream.send_signal(2)
        stream.wait(10)
        stream.stdout.close()
    assert generate(cluster, "n0").returncode == 0
