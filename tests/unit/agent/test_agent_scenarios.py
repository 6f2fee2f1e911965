"""The agent's machine, told as stories. Events: see `Story.act`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import machine as m
from agent.budget import MemoryBudget, wanted_replicas
from schemas import messages as msg
from schemas.outcome import ExitCode
from schemas.plan import Segment, TrunkPath
from schemas.topology import Context
from tests.scenario_files import check
from tests.small_plans import BYTES, CATALOGUE, LAYOUT, MODEL

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
SPEC = MODEL.model_copy(update={"trunk_layer_bytes": 8, "kv_bytes_per_token_layer": 1})
RECORDS = dict(enumerate(CATALOGUE.records))  # e0 to e5


class Story:
    """One agent that may hold three experts; `crash` forgets all but its journal."""

    def __init__(self) -> None:
        self.journal = m.AgentState()
        self.start()

    def start(self) -> None:
        budget = MemoryBudget("a", msg.TierBytes(device=3 * BYTES), "device", SPEC, Context(tokens=2))
        self.machine = m.AgentMachine(self.journal, budget)

    def act(self, words: list[str]) -> Iterator[str]:
        match words:
            case ["crash"]:
                self.start()
                return
            case ["standing", *oldest]:
                standing = self.machine.standing(int(oldest[0]) if oldest else None)
                fault = f" fault={standing.fault.message}" if standing.fault else ""
                yield (
                    f"active={standing.active} prepared={standing.prepared} oldest={standing.oldest} "
                    f"retired={standing.retired} serves={sorted(self.machine.served_epochs)}{fault}"
                )
                return
        for instruction in self.machine.handle(event(words)):
            yield self.perform(instruction)

    def perform(self, instruction: m.Instruction) -> str:
        match instruction:
            case m.Persist(state):
                self.journal = m.AgentState.model_validate_json(state.model_dump_json())
                return f"persist {name_state(state)}"
            case m.Obtain():
                return f"obtain {instruction.epoch} {instruction.plan[:2]}: {held(instruction.assignments)}"
            case m.StopObtaining():
                return "stop obtaining"
            case m.Activate(assignment):
                return f"activate {assignment.epoch}"
            case m.Keep(assignments):
                return f"keep {held(assignments)}"


def event(words: list[str]) -> m.Event:
    match words:
        case ["start"]:
            return m.Started()
        case ["prepare", epoch, plan, *experts]:
            return m.PrepareReceived(assignment(int(epoch), plan, experts))
        case ["obtained", epoch, plan]:
            return m.Obtained(int(epoch), digest(plan))
        case ["not-obtained", epoch, plan, *why]:
            return m.NotObtained(int(epoch), digest(plan), ExitCode.INFEASIBLE, " ".join(why))
        case ["commit", epoch, plan]:
            return m.CommitReceived(int(epoch), digest(plan))
        case ["retire", epoch]:
            return m.RetireReceived(int(epoch))
        case ["abort", epoch, plan]:
            return m.AbortReceived(int(epoch), digest(plan))
        case ["weights-lost"]:
            return m.WeightsLost()
    raise ValueError(f"no such event: {words}")


def assignment(epoch: int, plan: str, given: list[str]) -> msg.Assignment:
    """Experts by number, and `a` or `b` followed by the layers that this node runs for that ingress: ``b:1-1``."""
    paths = tuple(path(each) for each in given if ":" in each)
    replicas = tuple(msg.AssignedReplica(record=RECORDS[int(e)], tier="device") for e in given if ":" not in e)
    return msg.Assignment(
        cluster="test", plan=digest(plan), epoch=epoch, ingress=any(p.ingress == "a" for p in paths), layout=LAYOUT,
        replicas=replicas, paths=paths,
    )  # fmt: skip


def path(text: str) -> TrunkPath:
    ingress, _, layers = text.partition(":")
    first, last = map(int, layers.split("-"))
    segments = [
        Segment(node="a" if first <= layer <= last else "z", first_layer=layer, last_layer=layer) for layer in (0, 1)
    ]
    if (first, last) == (0, 1):
        segments = [Segment(node="a", first_layer=0, last_layer=1)]
    return TrunkPath(ingress=ingress, segments=tuple(segments))


def digest(plan: str) -> str:
    """Plans are named by two hexadecimal digits."""
    return plan * 32


def held(assignments: tuple[msg.Assignment, ...]) -> str:
    names = [f"e{3 * layer + expert}" for layer, expert, _ in sorted(wanted_replicas(assignments))]
    budget = MemoryBudget("a", msg.TierBytes(), "device", SPEC, Context(tokens=2))
    names += (f"{first}-{last}/{kv}" for (first, last), kv in sorted(budget.ranges(assignments).items()))
    return " ".join(names) or "nothing"


def name_state(state: m.AgentState) -> str:
    parts = [f"active={state.active.epoch}"] if state.active else []
    if state.pending:
        parts.append(f"pending={state.pending.epoch}/{state.pending.plan[:2]}{' ready' if state.is_ready else ''}")
    parts += [f"kept={a.epoch}" for a in state.kept]
    return " ".join([*parts, f"retired={state.retired}"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_stories_of_an_agent(file: Path, rewrite_scenarios: bool) -> None:
    check(file, Story().act, rewrite=rewrite_scenarios)
