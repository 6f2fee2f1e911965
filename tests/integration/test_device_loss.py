"""An agent whose device fails in the middle of an answer: the processor goes on with the same tokens, and that is told.

There is no device here: agents believe that theirs is one, and fail where it would, with what torch raises there.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schemas.files import write_atomic
from tests.cluster import PROMPTS, Cluster, make_plan, running, spread, wait_for

TOKENS = 400
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB"
LOST = "CUDA error: an illegal memory access was encountered"
FAILING = """
import os, sys, torch
from agent import cli, computing
from runtime.slots import Residency

made, take = computing.Computing.__init__, Residency.take

def made_on_a_device(self, *given):
    made(self, *given)
    self.device = "cuda:0"

def failing(self, *given):
    for name, kind in (("memory", torch.OutOfMemoryError), ("device", torch.AcceleratorError)):
        file = next(each for each in sys.argv if each.endswith(".yaml")) + "." + name
        if os.path.exists(file):
            with open(file) as stream:
                why = stream.read()
            os.unlink(file)
            raise kind(why)
    return take(self, *given)

computing.Computing.__init__, Residency.take = made_on_a_device, failing
cli.main()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Cluster]:
    path = tmp_path_factory.mktemp("devices")
    with running(path, 2, store=store, agent=("-c", FAILING)) as cluster:
        cluster.reach(make_plan(cluster, spread(cluster.nodes)))
        yield cluster


def fail(cluster: Cluster, node: str, what: str, why: str) -> None:
    """Let a node's device fail at its next expert."""
    write_atomic(cluster.path / f"{node}.yaml.{what}", why)  # the agent may look at any moment: never at half of it


@pytest.mark.parametrize(("node", "what", "why"), [("n0", "memory", OUT_OF_MEMORY), ("n1", "device", LOST)])
def test_an_answer_goes_on_when_a_device_fails(
    cluster: Cluster, one_node: Callable[[str, int], list[int]], node: str, what: str, why: str
) -> None:
    before = cluster.node_status(node)
    assert (before["device"], before["device_note"]) == ("cuda:0", "")
    began = cluster.begin("n0", PROMPTS[0], TOKENS)
    fail(cluster, node, what, why)
    assert began.tokens() == one_node(PROMPTS[0], TOKENS)
    after = cluster.node_status(node)
    assert (after["device"], after["state"], after["epoch"]) == ("cpu", "up", 1)
    assert after["device_note"] == f"cuda:0 failed: {why}"
    assert after["experts"] == before["experts"]
    assert f"cuda:0 failed: {why}; the processor computes instead" in cluster.log(node)
    shown = cluster.planner("status", "--coordinator", cluster.coordinator).stdout
    assert f"{node}: cuda:0 failed: {why}; the processor computes instead" in " ".join(shown.split())
    assert "Traceback" not in cluster.log(node)
    cluster.require_budgets()


def test_plans_go_on_after_that(cluster: Cluster, one_node: Callable[[str, int], list[int]]) -> None:
    wait_for(lambda: cluster.up() == {"n0", "n1"}, timeout_s=10, what="both nodes")
    current = cluster.active
    cluster.reach(make_plan(cluster, spread(cluster.nodes, shift=1), current=current))
    assert cluster.generate("n0", PROMPTS[1], "--max-tokens", "16")["tokens"] == one_node(PROMPTS[1], 16)
