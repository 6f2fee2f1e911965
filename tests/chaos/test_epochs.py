"""Both machines together on virtual time: messages are lost, repeated, late; agents and coordinator crash.

Agents are real `AgentMachine`s, the coordinator a real `ClusterMachine`; the network, the journals and the work of
obtaining records are simulated. After every event: who calls an epoch finds it served, budgets hold, journals can be
read back. Once faults stop, every plan is reached or given up.
"""

import random
from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent import machine as am
from agent.budget import Held, MemoryBudget, wanted_replicas
from planner.control import machine as cm
from planner.control.state import Accept, ClusterState, Refuse, is_busy, judge
from schemas import messages as msg
from schemas.outcome import ExitCode
from schemas.placement import Replica, sorted_replicas
from schemas.plan import Plan, Segment, TrunkPath
from schemas.topology import Context
from tests.small_plans import CATALOGUE, KEYS, MODEL, plan_through

NODES = ("a", "b", "c")
SPEC = MODEL.model_copy(update={"trunk_layer_bytes": 8})


def budget_of(node: str, slots: int = 32) -> MemoryBudget:
    return MemoryBudget(node, msg.TierBytes(device=16 * slots, disk=0), "device", SPEC, Context())


def make_plan(state: ClusterState, seed: int) -> Plan:
    """A plan of one to three stages from the placement that is to random ones that cover every expert."""
    draw = random.Random(seed)
    stages = [_some_placement(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
    ingresses = draw.choice((["a"], ["a", "b"]))
    plan = plan_through(*stages, before=state.placement, base_epoch=state.epoch, ingresses=ingresses)
    changes = {
        "trunk": tuple(_some_path(draw, node) for node in ingresses),
        "trunk_stage": draw.randint(1, len(stages)),
    }
    return plan.model_copy(update=changes).sealed()


def _some_path(draw: random.Random, ingress: str) -> TrunkPath:
    first, second = draw.choice(NODES), draw.choice(NODES)
    if first == second:
        return TrunkPath(ingress=ingress, segments=(Segment(node=first, first_layer=0, last_layer=1),))
    segments = (Segment(node=node, first_layer=layer, last_layer=layer) for layer, node in enumerate((first, second)))
    return TrunkPath(ingress=ingress, segments=tuple(segments))


def _some_placement(draw: random.Random) -> tuple[Replica, ...]:
    nodes = draw.sample(NODES, draw.randint(1, len(NODES)))  # some have no part
    held = {(key, draw.choice(nodes)) for key in KEYS} | {(draw.choice(KEYS), draw.choice(nodes)) for _ in range(2)}
    return sorted_replicas(Replica(layer=key[0], expert=key[1], node=node) for key, node in held)


class SimulatedAgent:
    """An agent's machine with a journal that survives crashes and replicas that do not."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.journal = am.AgentState()
        self.start()

    def start(self) -> None:
        self.machine = am.AgentMachine(self.journal, budget_of(self.node))
        self.held: set[Held] = set()
        self.ranges: set[tuple[int, int]] = set()
        self.order: am.Obtain | None = None
        self.steps: list[int] = []
        self.fresh = True
        self.handle(am.Started())

    def handle(self, event: am.Event) -> None:
        for instruction in self.machine.handle(event):
            match instruction:
                case am.Persist(state):
                    self.journal = am.AgentState.model_validate_json(state.model_dump_json())
                case am.Obtain():
                    self.order = instruction
                case am.StopObtaining():
                    self.order = None
                case am.Keep(assignments):
                    self.held &= wanted_replicas(assignments).keys()
                    self.ranges &= self.machine.budget.ranges(assignments).keys()
                case am.Activate(assignment):
                    assert wanted_replicas([assignment]).keys() <= self.held, "active without its replicas"
                    assert self.machine.budget.ranges([assignment]).keys() <= self.ranges, "active without its layers"

    def obtain(self, fails: bool) -> None:
        order, self.order = self.order, None
        if order is None:
            return
        if fails:
            self.handle(am.NotObtained(order.epoch, order.plan, ExitCode.INFEASIBLE, "the disk is full"))
            return
        self.held |= wanted_replicas(order.assignments).keys()
        self.ranges |= self.machine.budget.ranges(order.assignments).keys()
        self.handle(am.Obtained(order.epoch, order.plan))

    def take(self, message: msg.Message) -> None:
        match message:
            case msg.Prepare(assignment=assignment):
                self.handle(am.PrepareReceived(assignment))
            case msg.Commit(epoch=epoch, plan=plan):
                self.handle(am.CommitReceived(epoch, plan))
            case msg.Retire(epoch=epoch):
                self.handle(am.RetireReceived(epoch))
            case msg.Abort(epoch=epoch, plan=plan):
                self.handle(am.AbortReceived(epoch, plan))

    @property
    def standing(self) -> msg.Standing:
        return self.machine.standing(min(self.steps, default=None))


class Epochs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.agents = {node: SimulatedAgent(node) for node in NODES}
        self.journal = ClusterState(cluster="test")
        self.mail: dict[str, list[msg.Message]] = defaultdict(list)
        self.start_coordinator()

    def start_coordinator(self) -> None:
        self.coordinator = cm.ClusterMachine(self.journal)
        for agent in self.agents.values():
            agent.fresh = True

    def tell(self, event: cm.Event) -> list[cm.Instruction]:
        out = self.coordinator.handle(event)
        for instruction in out:
            match instruction:
                case cm.Persist(state):
                    self.journal = ClusterState.model_validate_json(state.model_dump_json())
                case cm.Send(node, message):
                    assert self.coordinator.state == self.journal or isinstance(message, msg.Abort | msg.Prepare)
                    self.mail[node].append(message)
        return out

    def report(self, node: str) -> None:
        agent = self.agents[node]
        self.tell(cm.NodeReported(node, agent.standing, has_store=node == "a", fresh=agent.fresh))
        agent.fresh = False
        if node == "a" and self.coordinator.catalogue is None:
            self.tell(cm.CatalogueReceived(CATALOGUE))

    @rule(seed=st.integers(0, 10_000))
    def propose(self, seed: int) -> None:
        self.tell(cm.PlanProposed(make_plan(self.coordinator.state, seed)))

    @rule(node=st.sampled_from(NODES))
    def heartbeat(self, node: str) -> None:
        self.report(node)

    @rule(node=st.sampled_from(NODES), pick=st.integers(0, 9), lost=st.booleans(), repeated=st.booleans())
    def deliver(self, node: str, pick: int, lost: bool, repeated: bool) -> None:
        """Deliver any message under way: order is not kept, some are lost, some come twice."""
        if self.mail[node]:
            message = self.mail[node].pop(pick % len(self.mail[node]))
            for _ in range(0 if lost else 2 if repeated else 1):
                self.agents[node].take(message)

    @rule(node=st.sampled_from(NODES), fails=st.sampled_from([False, False, False, True]))
    def obtain(self, node: str, fails: bool) -> None:
        self.agents[node].obtain(fails)

    @rule(node=st.sampled_from(NODES))
    def begin_step(self, node: str) -> None:
        """Also at an ingress that the plan leaves out: it has answers to finish."""
        machine = self.agents[node].machine
        if machine.active_epoch and (node == "a" or machine.state.active.ingress):
            self.agents[node].steps.append(machine.active_epoch)

    @rule(node=st.sampled_from(NODES))
    def end_step(self, node: str) -> None:
        del self.agents[node].steps[:1]

    @rule(node=st.sampled_from(NODES))
    def crash_agent(self, node: str) -> None:
        self.agents[node].start()

    @rule()
    def crash_coordinator(self) -> None:
        self.start_coordinator()

    @rule(node=st.sampled_from(NODES))
    def lose(self, node: str) -> None:
        self.tell(cm.NodeLost(node))
        self.agents[node].fresh = True

    @rule(ticks=st.integers(1, 50))
    def wait(self, ticks: int) -> None:
        for _ in range(ticks):
            self.tell(cm.Ticked())

    @invariant()
    def steps_in_flight_find_their_replicas(self) -> None:
        """For every step in flight, each expert of its epoch is held by a node that answers calls of that epoch."""
        for epoch in set(self.agents["a"].steps):
            for agent in self.agents.values():
                assert agent.journal.retired <= epoch, "a step in flight was fenced off"
            assignments = [
                a
                for agent in self.agents.values()
                for a in (
                    *agent.journal.kept,
                    *((agent.journal.active,) if agent.journal.active else ()),
                    *((agent.journal.pending,) if agent.journal.pending else ()),
                )
                if a.epoch == epoch
            ]
            assert {key[:2] for key in wanted_replicas(assignments)} == set(KEYS)

    @invariant()
    def steps_in_flight_keep_their_own_replicas(self) -> None:
        for agent in self.agents.values():
            state = agent.journal
            for epoch in set(agent.steps):
                used = [a for a in (*state.kept, *((state.active,) if state.active else ())) if a.epoch == epoch]
                assert used, f"{agent.node} dropped epoch {epoch} under a step"
                assert wanted_replicas(used).keys() <= agent.held

    @invariant()
    def no_more_than_given(self) -> None:
        for agent in self.agents.values():
            state = agent.machine.state
            given = [*state.kept, *(a for a in (state.active, state.pending) if a)]
            assert agent.held <= wanted_replicas(given).keys()
            assert 16 * len(agent.held) <= 16 * 32

    @invariant()
    def epochs_agree(self) -> None:
        state = self.coordinator.state
        for agent in self.agents.values():
            assert agent.machine.active_epoch <= state.epoch
            assert agent.journal.retired <= state.epoch
            active = agent.machine.state.active
            if active is not None and active.epoch == state.epoch and state.committed_plan is not None:
                assert active.plan == state.committed_plan.digest

    def teardown(self) -> None:
        """Faults stop: whatever was under way is reached or given up, and a last plan is reached by all."""
        for agent in self.agents.values():
            agent.steps.clear()
        self.settle()
        assert self.coordinator.state.phase in {"idle", "done", "aborted"}
        (answer, *_) = self.tell(cm.PlanProposed(make_plan(self.coordinator.state, 1)))
        assert answer == Accept(nothing_to_do=False)
        self.settle()
        state = self.coordinator.state
        assert state.phase == "done", state.message
        for node, agent in self.agents.items():
            wanted = {(r.layer, r.expert, r.tier) for r in state.placement if r.node == node}
            if wanted or node == "a" or agent.machine.active_epoch:  # whoever had a part knows that it is over
                assert agent.machine.active_epoch == agent.journal.retired == state.epoch
            assert agent.held == wanted
            runs = {
                (s.first_layer, s.last_layer)
                for path in self.coordinator.state.paths
                for s in path.segments
                if s.node == node
            }
            assert agent.ranges == runs

    def settle(self) -> None:
        for _ in range(300):
            for node, agent in self.agents.items():
                self.report(node)
                for message in self.mail.pop(node, []):
                    agent.take(message)
                agent.obtain(fails=False)
            self.tell(cm.Ticked())
            if not is_busy(self.coordinator.state) and not any(self.mail.values()) and self.is_quiet():
                return

    def is_quiet(self) -> bool:
        state = self.coordinator.state
        had = {node for node, agent in self.agents.items() if agent.machine.active_epoch}
        concerned = {r.node for r in state.placement} | ({"a"} if state.epoch else set()) | had
        levels = [(agent.standing, agent.order) for node, agent in self.agents.items() if node in concerned]
        return all(
            (s.active, s.prepared, s.retired, s.fault, order) == (state.epoch, state.epoch, state.epoch, None, None)
            for s, order in levels
        )


TestEpochs = Epochs.TestCase
TestEpochs.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_plan_beyond_budget_is_given_up_with_the_reason() -> None:
    world = Epochs()
    everything = [Replica(layer=k[0], expert=k[1], node=n) for k in KEYS for n in NODES]
    plan = plan_through(sorted_replicas(everything))
    for node in NODES:
        agent = world.agents[node]
        agent.machine.budget = budget_of(node, 6)
    world.tell(cm.PlanProposed(plan))
    world.settle()
    assert world.coordinator.state.phase == "aborted"
    assert world.coordinator.state.code == ExitCode.INFEASIBLE
    assert "a: device memory: experts need 96 B, 16 B more than the 80 B left" in world.coordinator.state.message
    assert not any(agent.held for agent in world.agents.values())
    world.tell(cm.PlanProposed(make_plan(world.coordinator.state, 3)))  # the same epoch, another plan
    world.settle()
    assert world.coordinator.state.phase == "done"


@pytest.mark.parametrize("change", [{"cluster": "other"}, {"dtype": "float16"}])
def test_foreign_and_altered_plans_are_refused(change: dict[str, str]) -> None:
    plan = make_plan(ClusterState(cluster="test"), 0).model_copy(update=change)
    refusal = judge(ClusterState(cluster="test"), plan)
    assert isinstance(refusal, Refuse)
    assert refusal.code == ExitCode.INVALID
