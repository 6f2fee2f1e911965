"""A cluster inside a lab: a scene's topology, links and agents, each agent in a network namespace of its own.

Decides only what must differ from the scene: addresses, ports, paths. Node i of the topology is namespace i + 1 of the
lab; the coordinator lives with the first.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from schemas.topology import Topology, load_topology
from tests.bench.lab import Line, Pair, address
from tests.cluster import AGENT, PLANNER, REPOSITORY, call, environment, wait_for


class Grounds(Protocol):
    """Where the nodes of a site run: a lab, or plain loopback."""

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """Return a command as it is run at a node."""
        ...


@dataclass(frozen=True)
class Scene:
    """A directory with ``topology.yaml``, traces and ``NODE.yaml`` of every agent, and the checkpoint that it runs."""

    path: Path
    model: Path

    def topology(self) -> Topology:
        return load_topology(self.path / "topology.yaml")

    def lines(self) -> dict[Pair, Line]:
        """The links as lines of a lab; schemas count bandwidth in bytes per second, as labs do."""
        topology = self.topology()
        number = {node.id: index for index, node in enumerate(topology.nodes, start=1)}
        return {
            (number[link.between[0]], number[link.between[1]]): Line(link.latency, link.bandwidth)
            for link in topology.links
        }


@dataclass
class Site:
    """A cluster of a scene under one plan, in a directory of its own."""

    lab: Grounds
    scene: Scene
    path: Path
    store: Path
    port: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _askers: dict[str, "subprocess.Popen[str]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {node.id: number for number, node in enumerate(self.scene.topology().nodes, start=1)}
        self.coordinator = f"{address(1)}:{self.port}"
        self.path.mkdir()
        self.plan = self.path / "plan.json"
        self.topology = self.write_topology("topology.yaml")

    def write_topology(self, name: str, **changes: Any) -> Path:
        """Write the scene's topology with this site's addresses.

        Parameters
        ----------
        changes
            `compute` in place of every node's; `only`, the one ingress where tokens enter; `prompts`, what an ingress
            says of them.
        """
        document = yaml.safe_load((self.scene.path / "topology.yaml").read_text())
        document["model"] = str(self.scene.model)
        document["workloads"] = {name: str(self.scene.path / trace) for name, trace in document["workloads"].items()}
        document["coordinator"] = {"address": address(1), "port": self.port}
        for node in document["nodes"]:
            node["address"] = address(self.nodes[node["id"]])
            node["compute"] = changes.get("compute", node["compute"])
            if "ingress" in node:
                node["ingress"] |= changes.get("prompts", {})
            if changes.get("only", node["id"]) != node["id"] and "ingress" in node:
                node["ingress"]["tokens_per_s"] = 0
        path = self.path / name
        path.write_text(yaml.safe_dump(document))
        return path

    def write_config(self, node: str) -> Path:
        document = yaml.safe_load((self.scene.path / f"{node}.yaml").read_text())
        document |= {
            "coordinator": self.coordinator,
            "address": address(self.nodes[node]),
            "model": str(self.scene.model),
            "data": f"data-{node}",
        }
        if "store" in document:
            document["store"] = str(self.store)
        path = self.path / f"{node}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def solve(self, *options: str) -> None:
        run_here(*PLANNER, "solve", str(self.topology), "-o", str(self.plan), *options)

    def start(self) -> None:
        """Start coordinator and agents and bring the plan into force."""
        self._start(1, "coordinator", *PLANNER, "serve", str(self.topology), "-v")
        for node, number in self.nodes.items():
            self._start(number, node, *AGENT, "run", "--config", str(self.write_config(node)), "-v")
        wait_for(self._are_up, timeout_s=90, what=self.logs)
        self._run_in(1, *PLANNER, "apply", str(self.plan))

    def _start(self, number: int, name: str, *command: str) -> None:
        with (self.path / f"{name}.log").open("a") as log:
            self.processes.append(
                subprocess.Popen(
                    self.lab.command(number, [sys.executable, *command]),
                    stdout=log, stderr=log, env=environment(), text=True,
                )
            )  # fmt: skip

    def _are_up(self) -> bool:
        status = self.lab.command(1, [sys.executable, *PLANNER, "status", "--json", "--coordinator", self.coordinator])
        done = subprocess.run(status, capture_output=True, text=True, env=environment(), check=False)
        return not done.returncode and all(node["state"] == "up" for node in json.loads(done.stdout)["nodes"])

    def _run_in(self, number: int, *command: str) -> str:
        inside = self.lab.command(number, [sys.executable, *command])
        done = subprocess.run(inside, capture_output=True, text=True, env=environment(), timeout=180, check=False)
        if done.returncode:
            raise SystemExit(f"{command[2:]} failed: {done.stderr}\n{self.logs()}")
        return done.stdout

    def generate(self, node: str, prompt: str, tokens: int) -> dict[str, Any]:
        """Decode greedily at a node, asked from its own namespace."""
        if node not in self._askers:
            command = [sys.executable, "-m", "tests.bench.asker", node, self.coordinator]
            self._askers[node] = subprocess.Popen(
                self.lab.command(self.nodes[node], command),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY,
            )  # fmt: skip
        asker = self._askers[node]
        assert asker.stdin is not None
        assert asker.stdout is not None
        asker.stdin.write(json.dumps({"prompt": prompt, "max_tokens": tokens}) + "\n")
        asker.stdin.flush()
        line = asker.stdout.readline()
        if not line:
            raise SystemExit(f"{node} gave no answer\n{self.logs()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def simulate(
        self,
        node: str,
        compute: dict[str, Any],
        trace: tuple[str, Path] | None,
        prompts: dict[str, int] | None = None,
        *,
        tokens: int = 20_000,
    ) -> dict[str, Any]:
        """Run `planner simulate` with one session at `node` and nothing else; return that ingress's figures.

        Parameters
        ----------
        prompts
            `prompt_tokens` and `answer_tokens`; then the figures have a `first_token`.
        """
        asked = {"prompts": prompts} if prompts else {}
        topology = self.write_topology(f"simulated-{node}.yaml", compute=compute, only=node, **asked)
        replaced = ("--trace", f"{trace[0]}={trace[1]}") if trace else ()
        replaced += ("--request-tokens", str(prompts["answer_tokens"])) if prompts else ()
        found = json.loads(
            run_here(
                *PLANNER, "simulate", str(self.plan), "--topology", str(topology), *replaced,
                "--arrivals", "closed", "--sessions", "1", "--tokens", str(tokens), "--json",
            )
        )  # fmt: skip
        figures: dict[str, Any] = next(each for each in found["ingresses"] if each["id"] == node)
        first = [each for each in found["first_tokens"] if each["id"] == node]
        return {**figures, **({"first_token": first[0]} if first else {})}

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.path.glob("*.log")))

    def stop(self) -> None:
        for process in self._askers.values():
            process.kill()
            process.wait()
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_here(*command: str) -> str:
    """Run a command that needs no lab and return what it printed."""
    done = call(*command, timeout_s=300)
    if done.returncode:
        raise SystemExit(f"{command[2:]} failed: {done.stderr}")
    return done.stdout


@contextmanager
def running_site(site: Site, *options: str) -> Iterator[Site]:
    """Solve, start, apply; stop at the end."""
    site.solve(*options)
    try:
        site.start()
        yield site
    finally:
        site.stop()
