"""A cluster of real processes on loopback for tests: a coordinator, agents, plans made by hand, and the reference.

`Cluster` starts and stops them and, at the end, makes sure that no process and no listening socket is left.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
import zmq

from agent.client import Answer, locate, stream
from agent.errors import AgentError
from agent.transport import Context
from planner.control.errors import CoordinatorAbsent
from planner.control.transport import ControlClient
from schemas.checkpoint import read_checkpoint
from schemas.messages import Endpoints, StatusRequest
from schemas.model import ModelSpec
from schemas.placement import Replica, Route, sorted_replicas, sorted_routes
from schemas.plan import Plan, Segment, Step, Summary, TrunkPath, load_plan, write_plan
from schemas.topology import TIERS
from schemas.units import parse_bytes
from tests.forked import ENVIRONMENT, Forked, run

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "examples" / "models" / "tinymoe-demo"
MIB = 1 << 20
PLANNER = ("-c", "from planner.cli import main; main()")
AGENT = ("-c", "from agent.cli import main; main()")
PROMPTS = ("class Stack:\n    def __init__", "The sum of 3 and 4 is", "Hello, how are you")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spec(dtype: str = "float32") -> ModelSpec:
    return read_checkpoint(MODEL).model_spec.held_as(dtype)  # type: ignore[arg-type]


def wait_for(condition: Callable[[], Any], *, timeout_s: float, what: Callable[[], str] | str) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what if isinstance(what, str) else what()}")


class Cluster:
    """Processes of one cluster below one directory.

    Nodes are alike and made up, or those of `topology`, with its own memories. Agents run as `agent` says.
    """

    def __init__(
        self,
        path: Path,
        nodes: int,
        *,
        store: Path,
        dtype: str = "float32",
        memory: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        topology: Path | None = None,
        verbose: bool = True,
        agent: tuple[str, ...] = AGENT,
    ) -> None:
        self.path = path
        self.port = free_port()
        self.dtype = dtype
        self._given = load_given(topology) if topology else None
        self.nodes = [n["id"] for n in self._given["nodes"]] if self._given else [f"n{i}" for i in range(nodes)]
        self._flags = ("-v",) if verbose else ()
        self._agent = agent
        self.processes: dict[str, Forked] = {}
        self.active: Plan | None = None  # the plan that was reached last
        self.memory = memory or {"device": "64 MiB", "host": "0 MiB", "disk": "64 MiB"}
        self._settings = settings or {}
        self._store = store
        path.mkdir(parents=True, exist_ok=True)
        self.topology = path / "topology.yaml"
        self.topology.write_text(yaml.safe_dump(self._topology_document()))
        for node in self.nodes:
            self.write_config(node)

    @property
    def coordinator(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _topology_document(self) -> dict[str, Any]:
        if self._given:
            return {**self._given, "coordinator": {"address": "127.0.0.1", "port": self.port}}
        first, *others = self.nodes
        nodes = [{"id": n, "memory": self.memory, "ingress": {"workload": "w", "tokens_per_s": 1}} for n in self.nodes]
        return {
            "cluster": "test",
            "model": str(MODEL),
            "dtype": self.dtype,
            "nodes": nodes,
            "links": [{"between": [first, o], "latency": "1 ms", "bandwidth": "1 Gbit/s"} for o in others],
            "workloads": {"w": "w.safetensors"},
            "coordinator": {"address": "127.0.0.1", "port": self.port},
        }

    def write_config(self, node: str, /, **changes: Any) -> Path:
        document = {
            "node": node,
            "coordinator": self.coordinator,
            "model": str(MODEL),
            "data": f"data-{node}",
            "memory": self.memory_of(node),
            "dtype": self.dtype,
            "peer_cache": False,  # else nodes soon have what a test means to be elsewhere
            "context": self._given["context"] if self._given else {"tokens": 1024, "sessions": 3},
            **({"store": str(self._store)} if node == self.nodes[0] else {}),
            **self._settings,
            **changes,
        }
        path = self.path / f"{node}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def memory_of(self, node: str) -> dict[str, str]:
        given = {n["id"]: n["memory"] for n in self._given["nodes"]} if self._given else {}
        return given.get(node, self.memory)

    def data(self, node: str) -> Path:
        return self.path / f"data-{node}"

    def start(self) -> "Cluster":
        self.start_coordinator()
        for node in self.nodes:
            self.start_agent(node)
        self.wait_up(self.nodes)
        return self

    def start_coordinator(self) -> None:
        self._start("coordinator", *PLANNER, "serve", str(self.topology), *self._flags)

    def start_agent(self, node: str, *options: str) -> None:
        self._start(node, *self._agent, "run", "--config", str(self.path / f"{node}.yaml"), *self._flags, *options)

    def _start(self, name: str, *command: str) -> None:
        log = self.path / f"{name}.log"
        self.processes[name] = Forked(command, output=log, errors=log, ends_with_us=True)

    def wait_up(self, nodes: Iterable[str]) -> None:
        wanted = set(nodes)
        wait_for(lambda: wanted <= self.up(), timeout_s=60, what=lambda: f"{wanted} up; {self.logs()}")

    def up(self) -> set[str]:
        try:
            return {node["id"] for node in self.status()["nodes"] if node["state"] == "up"}
        except CoordinatorAbsent:
            return set()

    def status(self) -> dict[str, Any]:
        """What `planner status --json` prints, without a process of its own."""
        with ControlClient(self.coordinator) as client:
            report = client.ask(StatusRequest())
        return json.loads(report.model_dump_json())  # type: ignore[no-any-return]

    def node_status(self, node: str) -> dict[str, Any]:
        return next(each for each in self.status()["nodes"] if each["id"] == node)

    def apply(self, plan: Path, *options: str) -> subprocess.CompletedProcess[str]:
        done = self.planner("apply", str(plan), *options)
        if done.returncode == 0 and "--dry-run" not in options:
            self.active = load_plan(plan)
        return done

    def reach(self, plan: Plan) -> None:
        """Apply a plan that must succeed."""
        done = self.apply(save(self, plan))
        assert done.returncode == 0, (done.stderr, self.logs())

    def locate(self, node: str) -> Endpoints:
        context: Context = zmq.Context()
        try:
            return locate(context, node, self.coordinator)
        finally:
            context.destroy(linger=0)

    def begin(self, node: str, prompt: str, tokens: int, where: Endpoints | None = None) -> "Stream":
        """Start a generation in a thread and wait until its tokens flow; `where` saves asking the coordinator."""
        began = Stream(node, self.coordinator, prompt, tokens, where)
        wait_for(lambda: began.answer.tokens or began.error, timeout_s=60, what="the first tokens")
        return began

    def require_budgets(self) -> None:
        """What agents report and what lies on their disks is within what their configs allow."""
        for node in self.status()["nodes"]:
            for tier in TIERS:
                assert node["memory_used"][tier] <= node["memory_allowed"][tier], (node["id"], tier)
            allowed = parse_bytes(self.memory_of(node["id"])["disk"])
            assert record_bytes(self.data(node["id"])) <= allowed, node["id"]

    def planner(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return call(*PLANNER, *arguments)

    def planner_command(self, *arguments: str) -> list[str]:
        return [sys.executable, *PLANNER, *arguments]

    def agent_command(self, *arguments: str) -> list[str]:
        return [sys.executable, *AGENT, *arguments]

    def try_generate(self, node: str, prompt: str, *options: str) -> subprocess.CompletedProcess[str]:
        return call(*self._generate(node, prompt, "--max-tokens", "8", *options), timeout_s=60)

    def generate_command(self, node: str, prompt: str, *options: str) -> list[str]:
        return [sys.executable, *self._generate(node, prompt, *options)]

    def _generate(self, node: str, prompt: str, *options: str) -> list[str]:
        where = ("--node", node, "--coordinator", self.coordinator)
        return [*AGENT, "generate", "--prompt", prompt, *where, "--json", *options]

    def generate(self, node: str, prompt: str, *options: str) -> dict[str, Any]:
        done = call(*self._generate(node, prompt, *options), timeout_s=120)
        assert done.returncode == 0, (done.stderr, self.logs())
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.path.glob("*.log")))

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def heal(self) -> None:
        """Start whatever should run and does not, as a test that failed may have left it."""
        gone = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in gone:
            del self.processes[name]
        missing = [name for name in ("coordinator", *self.nodes) if name not in self.processes]
        for name in missing:
            if name == "coordinator":
                self.start_coordinator()
            else:
                self.start_agent(name)
        if missing:
            self.wait_up(self.nodes)

    def interrupt(self, name: str) -> int:
        """Stop one process as Ctrl-C does; return its exit code, or fail after two seconds."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(2)
        finally:
            process.kill()
            process.wait()

    def log(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text()

    def stop(self) -> None:
        """Ask every process to end; fail if one must be killed or leaves something behind."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        codes = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes[name] = -9
        pids = {process.pid for process in self.processes.values()}
        self.processes.clear()
        assert set(codes.values()) <= {0}, (codes, self.logs())
        assert not pids & {int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()}
        with socket.socket() as probe:  # the coordinator's port can be bound again at once
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))


class Stream(threading.Thread):
    """What `agent generate` does, in a thread: quicker to start than a process."""

    def __init__(self, node: str, coordinator: str, prompt: str, tokens: int, where: Endpoints | None = None) -> None:
        super().__init__(daemon=True)
        self.answer = Answer()
        self.error: Exception | None = None
        self._enough = threading.Event()
        self._ask = functools.partial(stream, node, coordinator, self.answer, where=where, prompt=prompt)
        self._count = tokens
        self.start()

    def run(self) -> None:
        try:
            pieces = self._ask(max_tokens=self._count)
            for _ in pieces:
                if self._enough.is_set():
                    pieces.close()
        except AgentError as error:
            self.error = error

    def some_more(self, count: int = 40) -> list[int]:
        """Wait for some more tokens, cancel the rest, and return all that came."""
        wanted = len(self.answer.tokens) + count
        wait_for(lambda: len(self.answer.tokens) >= wanted or not self.is_alive(), timeout_s=60, what="more tokens")
        self._enough.set()
        return self.tokens()

    def tokens(self) -> list[int]:
        """Wait for the end and return all tokens, or raise what went wrong."""
        self.join(120)
        assert not self.is_alive(), "no end within 120 s"
        if self.error is not None:
            raise self.error
        return self.answer.tokens


@contextmanager
def running(path: Path, nodes: int, **options: Any) -> Iterator[Cluster]:
    with started(Cluster(path, nodes, **options)) as cluster:
        yield cluster


@contextmanager
def started(cluster: Cluster) -> Iterator[Cluster]:
    try:
        yield cluster.start()
    except BaseException:
        for process in cluster.processes.values():
            process.kill()
            process.wait()
        cluster.processes.clear()
        raise
    else:
        cluster.stop()


def record_bytes(data: Path) -> int:
    """Bytes of all files of an agent but its journal."""
    sizes = [0]
    for file in data.rglob("*"):
        try:
            sizes.append(file.stat().st_size if file.is_file() and "journal" not in file.name else 0)
        except FileNotFoundError:
            continue  # renamed or dropped meanwhile
    return sum(sizes)


def load_given(topology: Path) -> dict[str, Any]:
    """Read a topology file, its paths made absolute."""
    document = yaml.safe_load(topology.read_text())
    base = topology.parent
    traces = {name: str(base / trace) for name, trace in document["workloads"].items()}
    return {**document, "model": str(base / document["model"]), "workloads": traces}


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


def call(*command: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    return run(command, timeout_s=timeout_s)


def make_plan(
    cluster: Cluster,
    holders: Callable[[int, int], Iterable[str]],
    *,
    current: Plan | None = None,
    tier: str = "device",
    ingresses: Iterable[str] | None = None,
    paths: Iterable[TrunkPath] = (),
    **changes: Any,
) -> Plan:
    """Make a plan by hand in one stage: `holders(layer, expert)` names the nodes of each expert, as node or node/tier.

    Tokens that enter at `ingresses` stay there; the others take `paths`.
    """
    model = spec(cluster.dtype)
    keys = [(layer, expert) for layer in range(model.layers) for expert in range(model.experts)]
    placement = sorted_replicas(
        Replica(layer=layer, expert=expert, node=name.partition("/")[0], tier=name.partition("/")[2] or tier)  # type: ignore[arg-type]
        for layer, expert in keys
        for name in holders(layer, expert)
    )
    before = set(current.placement) if current else set()
    size = model.expert_bytes
    steps = [
        Step(stage=1, action="replicate", layer=r.layer, expert=r.expert, node=r.node, tier=r.tier, bytes=size)
        for r in placement
        if r not in before
    ]
    steps.append(Step(stage=1, action="switch"))
    steps += [
        Step(stage=1, action="drop", layer=r.layer, expert=r.expert, node=r.node, tier=r.tier, bytes=size)
        for r in sorted_replicas(before - set(placement))
    ]
    given = tuple(paths)
    entries = tuple((() if given else cluster.nodes[:1]) if ingresses is None else ingresses)
    trunk = (*(_stay(node, model) for node in entries), *given)
    by_key: dict[tuple[int, int], list[str]] = {}
    for replica in placement:
        by_key.setdefault(replica.key, []).append(replica.node)
    runs = {
        (s.node, layer) for path in trunk for s in path.segments for layer in range(s.first_layer, s.last_layer + 1)
    }
    routes = [
        Route(ingress=node, layer=key[0], expert=key[1], holder=nodes[0])
        for node in sorted({node for node, _ in runs})
        for key, nodes in by_key.items()
        if (node, model.moe_layer_indices[key[0]]) in runs and node not in nodes
    ]
    base = current.epoch if current else 0
    document = {
        "cluster": "test",
        "coordinator": cluster.coordinator,
        "base_epoch": base,
        "epoch": base + 1,
        "model": model,
        "dtype": cluster.dtype,
        "placement": placement,
        "routes": sorted_routes(routes),
        "trunk": tuple(sorted(trunk, key=lambda path: path.ingress)),
        "steps": tuple(steps),
        "summary": Summary(status="feasible", solver="hand", objective_name="none", objective=0.0, seconds=0.0),
        **changes,
    }
    return Plan(**document).sealed()


def _stay(node: str, model: ModelSpec) -> TrunkPath:
    segment = Segment(node=node, first_layer=0, last_layer=model.num_decoder_layers - 1)
    return TrunkPath(ingress=node, segments=(segment,))


def ring(ingress: str, *parts: str) -> TrunkPath:
    """A path of ``node:first-last``."""
    segments = []
    for part in parts:
        node, _, layers = part.partition(":")
        first, _, last = layers.partition("-")
        segments.append(Segment(node=node, first_layer=int(first), last_layer=int(last)))
    return TrunkPath(ingress=ingress, segments=tuple(segments))


def spread(nodes: list[str], shift: int = 0) -> Callable[[int, int], Iterable[str]]:
    """Deal experts out to nodes in turn."""
    return lambda layer, expert: [nodes[(layer + expert + shift) % len(nodes)]]


def save(cluster: Cluster, plan: Plan, name: str = "plan.json") -> Path:
    path = cluster.path / name
    write_plan(path, plan)
    return path
