"""The coordinator's decisions: how a plan becomes the cluster's placement, one epoch after the other.

Event in, instructions out; no clock (ticks), no I/O. Decides phases, refusals, what each agent is told next and when
to give up. Whoever performs the instructions persists before sending, in the order given.

    idle ─► PROPOSED ─► PREPARING ─► PREPARED ─► COMMITTED ─► RETIRING ─► DONE (─► PREPARING of the next stage)
                 └──────────┴─► ABORTED

Everything is driven by levels: an agent reports how far it is (`Standing`), and what it is told follows from that and
from the durable state alone. So lost, late and repeated messages, and restarts on either side, need no rule of their
own: whatever is still missing is said again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, assert_never

from planner.control.stages import assign, paths_of, plan_nodes
from planner.control.state import Accept, ClusterState, Refuse, is_busy, judge, placements_ahead
from schemas.messages import Abort, Assignment, Catalogue, Commit, Message, Prepare, Retire, Standing
from schemas.outcome import ExitCode
from schemas.paths import path_nodes
from schemas.plan import Plan

RESEND_TICKS: Final = 10
PATIENCE_TICKS: Final = 120  # without any progress, before a plan is given up
HELLO_TICKS: Final = 60  # for the plan's nodes to appear


@dataclass(frozen=True)
class PlanProposed:
    """Someone asks for a plan."""

    plan: Plan


@dataclass(frozen=True)
class NodeReported:
    """An agent said how far it is; `fresh` with the first report of a connection.

    `moved` counts pulled bytes; while `is_loading` a trunk they stand still, and that is no lack of progress.
    """

    node: str
    standing: Standing
    moved: int = 0
    has_store: bool = False
    is_loading: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class NodeLost:
    """An agent's heartbeats stopped, or it said goodbye."""

    node: str


@dataclass(frozen=True)
class CatalogueReceived:
    """A node with a store told what is in it."""

    catalogue: Catalogue


@dataclass(frozen=True)
class Ticked:
    """Time passes, in ticks of the loop."""


class InvalidTransition(RuntimeError):
    """A state that this machine never makes; the message tells it."""


Event = PlanProposed | NodeReported | NodeLost | CatalogueReceived | Ticked


@dataclass(frozen=True)
class Persist:
    """Make this state durable before going on."""

    state: ClusterState


@dataclass(frozen=True)
class Send:
    """Tell an agent."""

    node: str
    message: Message


Instruction = Persist | Send | Refuse | Accept


@dataclass
class _Node:
    standing: Standing
    has_store: bool
    moved: int = 0
    told: object = None
    told_at: int = 0


@dataclass
class ClusterMachine:
    """The state machine of one cluster. `handle` modifies it; everything else only reads."""

    state: ClusterState
    catalogue: Catalogue | None = None
    tick: int = 0
    _nodes: dict[str, _Node] = field(default_factory=dict)
    _progress_at: int = 0
    _assigned: dict[int, tuple[object, Mapping[str, Assignment]]] = field(default_factory=dict)

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event in; return what to do, in order."""
        out: list[Instruction] = []
        match event:
            case PlanProposed(plan):
                self._propose(plan, out)
            case NodeReported():
                self._report(event)
            case NodeLost(node):
                self._nodes.pop(node, None)
            case CatalogueReceived(catalogue):
                self.catalogue = catalogue
                self._assigned.clear()
                self._progress_at = self.tick
            case Ticked():
                self.tick += 1
            case _:
                assert_never(event)
        while self._advance(out):
            pass
        self._direct(out)
        return out

    @property
    def present(self) -> frozenset[str]:
        """Nodes whose agents are heard."""
        return frozenset(self._nodes)

    @property
    def missing(self) -> tuple[str, ...]:
        """Nodes that the plan under way needs and that are not heard."""
        return tuple(sorted(self._needed() - self._nodes.keys()))

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Nodes that the phase under way waits for."""
        match self.state.phase:
            case "proposed":
                return self.missing
            case "preparing":
                return tuple(sorted(n for n in self._needed() if not self._is_prepared(n)))
            case "committed":
                return tuple(sorted(n for n in self._concerned() if not self._has_switched(n)))
            case "retiring":
                return tuple(sorted(n for n in self._concerned() if not self._has_retired(n)))
            case _:
                return ()

    def _report(self, event: NodeReported) -> None:
        known = self._nodes.get(event.node)
        if known is None or event.fresh:
            self._nodes[event.node] = _Node(event.standing, event.has_store, event.moved)
            self._progress_at = self.tick
            return
        if event.is_loading or (known.standing, known.moved) != (event.standing, event.moved):
            self._progress_at = self.tick
        known.standing, known.moved = event.standing, event.moved

    def _propose(self, plan: Plan, out: list[Instruction]) -> None:
        decision = judge(self.state, plan)
        out.append(decision)
        if isinstance(decision, Refuse) or decision.nothing_to_do or self._is_under_way(plan):
            return
        self._progress_at = self.tick
        self._become(out, plan=plan, phase="proposed", message="", code=ExitCode.DONE)

    def _is_under_way(self, plan: Plan) -> bool:
        return self.state.plan is not None and self.state.plan.digest == plan.digest and is_busy(self.state)

    def _become(self, out: list[Instruction], **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        out.append(Persist(self.state))

    def _advance(self, out: list[Instruction]) -> bool:
        """Go to the next phase where its condition holds."""
        match self.state.phase:
            case "proposed":
                return self._leave_proposed(out)
            case "preparing":
                return self._leave_preparing(out)
            case "prepared":
                self._commit(out)
                return True
            case "committed" if not self.waiting_for:
                self._become(out, phase="retiring")
                return True
            case "retiring" if not self.waiting_for:
                self._become(out, phase="done" if self._is_reached() else "preparing")
                return True
            case _:
                return False

    def _leave_proposed(self, out: list[Instruction]) -> bool:
        if not self.missing and self.catalogue is not None and self._fault() is None:
            self._progress_at = self.tick
            self._become(out, phase="preparing")
            return True
        if self.tick - self._progress_at >= HELLO_TICKS:
            self._become(out, phase="aborted", message=self._why_not_begun(), code=ExitCode.FAILED)
            return True
        return False

    def _why_not_begun(self) -> str:
        if self.missing:
            return f"no agent runs for {', '.join(self.missing)}; start it with agent run and apply again"
        if self.catalogue is None:
            return "no agent has a store to take the weights from; run agent prepare and name the store in its config"
        fault = self._fault()
        return f"an earlier attempt is not forgotten yet ({fault[1] if fault else 'no reason given'}); apply again"

    def _leave_preparing(self, out: list[Instruction]) -> bool:
        if fault := self._fault():
            self._become(out, phase="aborted", message=fault[1], code=fault[0])
            return True
        if not self.waiting_for:
            self._become(out, phase="prepared")
            return True
        if self.tick - self._progress_at >= PATIENCE_TICKS:
            names = ", ".join(self.waiting_for)
            self._become(
                out,
                phase="aborted",
                message=f"{names} made no progress in preparing epoch {self.state.epoch + 1}; see planner status",
                code=ExitCode.FAILED,
            )
            return True
        return False

    def _commit(self, out: list[Instruction]) -> None:
        state, plan = self.state, self._plan()
        placement = placements_ahead(plan, state.placement, state.epoch)[0]
        self._become(
            out,
            phase="committed",
            epoch=state.epoch + 1,
            before=state.placement,
            placement=placement,
            committed_plan=plan,
            trunk=paths_of(plan, state.epoch + 1, state.paths),
        )

    def _plan(self) -> Plan:
        if self.state.plan is None:
            raise InvalidTransition(f"phase {self.state.phase} without a plan")
        return self.state.plan

    def _is_reached(self) -> bool:
        return self.state.plan is not None and self.state.epoch == self.state.plan.epoch

    def _needed(self) -> frozenset[str]:
        return plan_nodes(self.state.plan) if self.state.plan else frozenset()

    def _has_part(self, name: str, standing: Standing) -> bool:
        """Whether an agent must come to the committed epoch: it has a part in it, or it had one in an older epoch."""
        plan = self.state.committed_plan
        if plan is None:
            return False
        on_path = name in plan_nodes(plan) | path_nodes(self.state.paths)
        holds = any(replica.node == name for replica in self.state.placement)
        return on_path or holds or _had_part(standing)

    def _concerned(self) -> frozenset[str]:
        """Nodes of the plan, and those that are here and may still use an older epoch."""
        return self._needed() | {name for name, node in self._nodes.items() if node.standing.active > 0}

    def _standing(self, node: str) -> Standing | None:
        known = self._nodes.get(node)
        return known.standing if known else None

    def _is_prepared(self, node: str) -> bool:
        standing = self._standing(node)
        want = (self.state.epoch + 1, self._plan().digest)
        return standing is not None and (standing.prepared, standing.prepared_plan) == want

    def _has_switched(self, node: str) -> bool:
        standing = self._standing(node)
        return standing is not None and standing.active == self.state.epoch <= standing.oldest

    def _has_retired(self, node: str) -> bool:
        standing = self._standing(node)
        return standing is not None and self._has_switched(node) and standing.retired == self.state.epoch

    def _fault(self) -> tuple[ExitCode, str] | None:
        for node in sorted(self._nodes):
            fault = self._nodes[node].standing.fault
            if fault and (fault.epoch, fault.plan) == (self.state.epoch + 1, self._plan().digest):
                return fault.code, f"{node}: {fault.message}"
        return None

    def _direct(self, out: list[Instruction]) -> None:
        """Tell every agent what it lacks; once, and again after a while."""
        for name in sorted(self._nodes):
            node = self._nodes[name]
            message = self._due(name, node.standing)
            if message is None:
                node.told = None
            elif (token := _token(message)) != node.told or self.tick - node.told_at >= RESEND_TICKS:
                node.told, node.told_at = token, self.tick
                out.append(Send(name, message))

    def _due(self, name: str, standing: Standing) -> Message | None:
        """Return what an agent must do next, or None: it waits for others, or is done."""
        epoch, phase = self.state.epoch, self.state.phase
        if standing.active > epoch:
            return None  # it knows more than this journal; the coordinator refuses such a hello
        if abort := self._abort(standing):
            return abort
        if self._has_part(name, standing):
            if standing.active < epoch:
                return self._catch_up(name, standing)
            if standing.retired < epoch <= standing.oldest and phase != "committed":
                return Retire(epoch=epoch)
        is_wanted = phase in {"preparing", "prepared"} and standing.prepared != epoch + 1
        return self._prepare(name, epoch + 1) if is_wanted and standing.fault is None else None

    def _abort(self, standing: Standing) -> Message | None:
        """Tell an agent to forget what it prepared, or failed to, if that is not the stage under way."""
        under_way = (0, "")
        if self.state.phase in {"preparing", "prepared"}:
            under_way = (self.state.epoch + 1, self._plan().digest)
        fault = standing.fault
        tried = [(standing.prepared, standing.prepared_plan)] + ([(fault.epoch, fault.plan)] if fault else [])
        for epoch, plan in tried:
            if epoch > self.state.epoch and (epoch, plan) != under_way:
                return Abort(epoch=epoch, plan=plan)
        return None

    def _catch_up(self, name: str, standing: Standing) -> Message | None:
        """Bring an agent that is behind to the committed epoch."""
        plan = self.state.committed_plan
        if plan and (standing.prepared, standing.prepared_plan) == (self.state.epoch, plan.digest):
            return Commit(epoch=self.state.epoch, plan=plan.digest)
        return self._prepare(name, self.state.epoch)

    def _prepare(self, name: str, epoch: int) -> Message | None:
        assignment = self._assignments(epoch).get(name)
        return Prepare(assignment=assignment) if assignment else None

    def _assignments(self, epoch: int) -> Mapping[str, Assignment]:
        """Return all assignments of the committed epoch, or of the one under way; both are kept as long as they hold.

        Nodes that had a part before and have none any more are among them.
        """
        if self.catalogue is None:
            return {}  # until a node with a store is back
        state = self.state
        plan = (state.committed_plan if epoch == state.epoch else None) or self._plan()
        stores = frozenset(name for name, node in self._nodes.items() if node.has_store)
        others = frozenset(name for name, node in self._nodes.items() if _had_part(node.standing))
        token = (plan.digest, state.epoch, stores, others)
        if epoch not in self._assigned or self._assigned[epoch][0] != token:
            if epoch == state.epoch:
                after = state.placement
                before = (*after, *state.before)  # all of them may be asked
            else:
                before, after = state.placement, placements_ahead(plan, state.placement, state.epoch)[0]
            made = assign(
                plan,
                epoch=epoch,
                before=before,
                after=after,
                catalogue=self.catalogue,
                stores=stores,
                others=others,
                paths_before=state.paths,
            )
            kept = {number: each for number, each in self._assigned.items() if number >= state.epoch}
            self._assigned = kept | {epoch: (token, made)}
        return self._assigned[epoch][1]


def _had_part(standing: Standing) -> bool:
    """Whether an agent uses an epoch, or failed to come back to one."""
    return standing.active > 0 or standing.fault is not None


def _token(message: Message) -> object:
    """Return what makes two messages to an agent the same."""
    if isinstance(message, Prepare):
        return message.type, message.assignment.epoch, message.assignment.plan
    return message
