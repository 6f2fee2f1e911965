"""The coordinator's machine, told as stories. Events: see `Story.act`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.control import machine as m
from planner.control.state import Accept, ClusterState, Refuse
from schemas import messages as msg
from schemas.outcome import ExitCode
from schemas.plan import Plan
from tests.scenario_files import check
from tests.small_plans import CATALOGUE, all_on, plan_through, replicas

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


class Story:
    """One coordinator; `crash` forgets all but its journal. Plans are named by one letter."""

    def __init__(self) -> None:
        self.journal = ClusterState(cluster="test")
        self.plans: dict[str, Plan] = {}
        self.start()

    def start(self) -> None:
        self.machine = m.ClusterMachine(self.journal)

    def act(self, words: list[str]) -> Iterator[str]:
        match words:
            case ["crash"]:
                self.start()
                return
            case ["plan", name, "from", before, "through", *stages]:
                base = self.plans.get(before)
                self.plans[name] = plan_through(
                    *(replicas(all_on(*nodes.split("+"))) for nodes in stages),
                    before=base.placement if base else (),
                    base_epoch=base.epoch if base else 0,
                )
                return
            case ["waiting"]:
                yield f"{self.machine.state.phase}: {', '.join(self.machine.waiting_for) or 'nobody'}"
                return
            case ["tick", count]:
                for _ in range(int(count)):
                    yield from self.tell(m.Ticked())
                return
        yield from self.tell(self.event(words))

    def event(self, words: list[str]) -> m.Event:
        match words:
            case ["propose", name]:
                return m.PlanProposed(self.plans[name])
            case ["hello" | "beat" as kind, node, *levels]:
                return m.NodeReported(node, self.standing(levels), has_store=node == "a", fresh=kind == "hello")
            case ["catalogue"]:
                return m.CatalogueReceived(CATALOGUE)
            case ["lost", node]:
                return m.NodeLost(node)
        raise ValueError(f"no such event: {words}")

    def standing(self, levels: list[str]) -> msg.Standing:
        """Read ``active=1 prepared=2/q oldest=1 retired=1 fault=2/q``; prepared and oldest follow active if left out."""
        given = dict(level.split("=") for level in levels)
        active = int(given.get("active", 0))
        prepared, _, plan = given.get("prepared", str(active)).partition("/")
        fault = None
        if "fault" in given:
            epoch, _, name = given["fault"].partition("/")
            fault = msg.PrepareFault(
                epoch=int(epoch), plan=self.plans[name].digest, code=ExitCode.INFEASIBLE, message="the disk is full"
            )
        return msg.Standing(
            active=active,
            prepared=int(prepared),
            prepared_plan=self.plans[plan].digest if plan else "",
            oldest=int(given.get("oldest", active)),
            retired=int(given.get("retired", 0)),
            fault=fault,
        )

    def tell(self, event: m.Event) -> Iterator[str]:
        for instruction in self.machine.handle(event):
            match instruction:
                case m.Persist(state):
                    self.journal = ClusterState.model_validate_json(state.model_dump_json())
                    yield f"persist epoch={state.epoch} {state.phase}{': ' + state.message if state.message else ''}"
                case m.Send(node, message):
                    yield f"{node} ← {self.shown(message)}"
                case Accept(nothing_to_do):
                    yield "accepted: nothing to do" if nothing_to_do else "accepted"
                case Refuse(code, text):
                    yield f"refused ({code.name}): {self.named(text)}"

    def shown(self, message: msg.Message) -> str:
        match message:
            case msg.Prepare(assignment=given):
                what = f"{len(given.replicas)} replicas{', ingress' if given.ingress else ''}"
                return f"prepare {given.epoch}/{self.letter(given.plan)}: {what}"
            case msg.Commit(epoch=epoch, plan=plan) | msg.Abort(epoch=epoch, plan=plan):
                return f"{message.type} {epoch}/{self.letter(plan)}"
            case msg.Retire(epoch=epoch):
                return f"retire {epoch}"
        raise AssertionError(message)

    def letter(self, digest: str) -> str:
        return next((name for name, plan in self.plans.items() if plan.digest == digest), "?")

    def named(self, text: str) -> str:
        for name, plan in self.plans.items():
            text = text.replace(plan.digest[:12], name)
        return text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_stories_of_a_cluster(file: Path, rewrite_scenarios: bool) -> None:
    check(file, Story().act, rewrite=rewrite_scenarios)
