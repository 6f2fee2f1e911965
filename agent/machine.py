"""One agent's decisions: what it must hold, which epoch it uses and which calls it may still answer.

Event in, instructions out; no clock, no I/O, no threads. Decides whether an assignment fits, what to obtain, when to
switch and what to drop. Whoever performs the instructions persists before anything else, in the order given.
Must not know tensors, sockets or files.

    Prepare ─► Obtain ─► Obtained (prepared) ─► Commit ─► Activate ─► … steps of older epochs end … ─► Retire ─► Keep

Every event may come twice, late, or after a restart: what is already true is answered by the same standing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import assert_never

from agent.budget import MemoryBudget, over_budget, short_context, unlike_precision
from schemas.base import FrozenModel
from schemas.messages import Assignment, PrepareFault, Standing
from schemas.outcome import ExitCode
from schemas.precision import Precision


class AgentState(FrozenModel):
    """What an agent must not forget.

    Attributes
    ----------
    active
        The assignment that new steps use.
    pending, is_ready
        The assignment under preparation, and whether all of it is here and verified.
    kept
        Older assignments that others may still call, until `Retire`.
    retired
        Calls of epochs below this are refused.
    """

    cluster: str = ""
    active: Assignment | None = None
    pending: Assignment | None = None
    is_ready: bool = False
    kept: tuple[Assignment, ...] = ()
    retired: int = 0


@dataclass(frozen=True)
class Started:
    """The process started, with what its journal remembers."""


@dataclass(frozen=True)
class PrepareReceived:
    """The coordinator wants an epoch prepared."""

    assignment: Assignment


@dataclass(frozen=True)
class Obtained:
    """Everything of an epoch is here and verified."""

    epoch: int
    plan: str


@dataclass(frozen=True)
class NotObtained:
    """An epoch cannot be prepared."""

    epoch: int
    plan: str
    code: ExitCode
    message: str


@dataclass(frozen=True)
class CommitReceived:
    """All nodes are ready: use the epoch."""

    epoch: int
    plan: str


@dataclass(frozen=True)
class RetireReceived:
    """No step older than `epoch` is in flight anywhere."""

    epoch: int


@dataclass(frozen=True)
class AbortReceived:
    """A prepared epoch was given up."""

    epoch: int
    plan: str


@dataclass(frozen=True)
class WeightsLost:
    """What was in memory is gone with the device that it lay on; whatever is on disk is still there."""


Event = (
    Started | PrepareReceived | Obtained | NotObtained | CommitReceived | RetireReceived | AbortReceived | WeightsLost
)


@dataclass(frozen=True)
class Persist:
    """Make this state durable before going on."""

    state: AgentState


@dataclass(frozen=True)
class HoldIn:
    """Hold experts in this precision from now on; there are none yet."""

    precision: Precision


@dataclass(frozen=True)
class Obtain:
    """Get and verify all that these assignments give, whatever is here already, and load their layer ranges.

    Replaces an earlier Obtain under way. Answered by `Obtained` or `NotObtained` of (epoch, plan).
    """

    epoch: int
    plan: str
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True)
class StopObtaining:
    """Give up an Obtain under way."""


@dataclass(frozen=True)
class Activate:
    """Let new steps use this assignment."""

    assignment: Assignment


@dataclass(frozen=True)
class Keep:
    """Drop every replica and every layer range that none of these assignments gives."""

    assignments: tuple[Assignment, ...]


Instruction = Persist | HoldIn | Obtain | StopObtaining | Activate | Keep


@dataclass
class AgentMachine:
    """The state machine of one agent. `handle` modifies it; everything else only reads."""

    state: AgentState
    budget: MemoryBudget
    fault: PrepareFault | None = None
    is_restored: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_restored = self.state.active is None

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event in; return what to do, in order."""
        return list(self._react(event))

    def _react(self, event: Event) -> Iterator[Instruction]:
        match event:
            case Started():
                yield from self._start()
            case PrepareReceived(assignment):
                yield from self._prepare(assignment)
            case Obtained(epoch, plan):
                yield from self._obtained(epoch, plan)
            case NotObtained():
                yield from self._not_obtained(event)
            case CommitReceived(epoch, plan):
                yield from self._commit(epoch, plan)
            case RetireReceived(epoch):
                yield from self._retire(epoch)
            case AbortReceived(epoch, plan):
                yield from self._abort(epoch, plan)
            case WeightsLost():
                yield from self._lose()
            case _:
                assert_never(event)

    @property
    def active_epoch(self) -> int:
        """The epoch that new steps use; 0 before the first, and while a restarted agent fetches its replicas."""
        return self.state.active.epoch if self.state.active and self.is_restored else 0

    @property
    def served_epochs(self) -> frozenset[int]:
        """Epochs whose calls are answered: everything here that is not retired."""
        state = self.state
        if not self.is_restored:
            return frozenset()
        ready = (state.pending,) if state.pending and state.is_ready else ()
        return frozenset(a.epoch for a in (*state.kept, *ready, *((state.active,) if state.active else ())))

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """All whose replicas may be here, in use or under preparation, the newest last."""
        state = self.state
        newer = (each for each in (state.active, state.pending) if each is not None)
        return (*state.kept, *newer)

    def take_back(self, state: AgentState, assignment: Assignment, reason: str) -> None:
        """Go back to `state`, the last that could be made durable, and refuse what was to be prepared."""
        self.state = state
        self.fault = _fault(assignment, ExitCode.INFEASIBLE, reason)

    def standing(self, oldest: int | None) -> Standing:
        """Return how far this agent is; `oldest` is the oldest epoch of a step in flight here, if there is one."""
        active, state = self.active_epoch, self.state
        ready = state.pending if state.pending and state.is_ready and self.is_restored else None
        current = ready or (state.active if self.is_restored else None)
        return Standing(
            active=active,
            prepared=current.epoch if current else 0,
            prepared_plan=current.plan if current else "",
            oldest=active if oldest is None else min(oldest, active),
            retired=state.retired,
            fault=self.fault,
        )

    def _start(self) -> Iterator[Instruction]:
        """Bring back what the journal says was here; a preparation under way is asked for again by the coordinator."""
        if self.state.pending is not None:
            yield self._become(pending=None, is_ready=False)
        yield Keep(self.assignments)
        if self.state.active is not None:
            yield self._obtain(self.state.active)

    def _lose(self) -> Iterator[Instruction]:
        """Get back what the active epoch gives, as after a restart."""
        yield StopObtaining()
        self.is_restored, self.fault = self.state.active is None, None
        yield from self._start()

    def _prepare(self, assignment: Assignment) -> Iterator[Instruction]:
        state = self.state
        if state.active is not None and _name(state.active) == _name(assignment):
            if not self.is_restored and self.fault is not None:
                self.fault = None
                yield self._obtain(assignment)
            return
        if not self.is_restored and self.fault is not None and state.active and assignment.epoch > state.active.epoch:
            # what was here cannot be had back, and the cluster has gone on without it
            self.is_restored = True
            yield self._become(active=None, kept=())
        if assignment.epoch <= max(self.active_epoch, state.retired) or not self.is_restored:
            return  # an old message, or too early: the coordinator says it again
        if state.pending is not None and _name(state.pending) == _name(assignment) and self.fault is None:
            return  # under way, or done
        self.fault = None
        if refusal := self._refusal(assignment):
            if state.pending is not None:
                yield from self._forget_pending()
            self.fault = _fault(assignment, *refusal)
            return
        budget = self._budget_for(assignment)
        if budget.precision != self.budget.precision:
            if state.pending is not None:
                yield from self._forget_pending()
            self.budget = budget
            yield HoldIn(budget.precision)
        yield self._become(pending=assignment, is_ready=False, cluster=assignment.cluster)
        yield Keep(self.assignments)
        yield self._obtain(assignment)

    def _refusal(self, assignment: Assignment) -> tuple[ExitCode, str] | None:
        if self.state.cluster not in {"", assignment.cluster}:
            return ExitCode.REFUSED, f"belongs to cluster {self.state.cluster!r}, not to {assignment.cluster!r}"
        held = (*self.state.kept, *((self.state.active,) if self.state.active else ()))
        if shortage := short_context(assignment, self.budget):
            return ExitCode.REFUSED, shortage
        if unlike := unlike_precision(assignment, held, self.budget):
            return ExitCode.REFUSED, unlike
        if excess := over_budget((*held, assignment), self._budget_for(assignment)):
            return ExitCode.INFEASIBLE, excess
        return None

    def _budget_for(self, assignment: Assignment) -> MemoryBudget:
        """Return the budget with experts in the precision that an assignment asks for.

        Where it asks for none, what is held stays as it is; a node that holds nothing is as it began, whatever a plan
        wanted of it that never came into force.
        """
        budget, state = self.budget, self.state
        holding = (*state.kept, *((state.active,) if state.active else ()))
        unsaid = budget.precision if any(map(budget.holds_for, holding)) else budget.offers[0]
        return replace(budget, precision=assignment.precision or unsaid)

    def _obtained(self, epoch: int, plan: str) -> Iterator[Instruction]:
        state, done = self.state, (epoch, plan)
        if not self.is_restored and state.active is not None and _name(state.active) == done:
            self.is_restored = True
            yield Activate(state.active)
        elif state.pending is not None and _name(state.pending) == done and not state.is_ready:
            yield self._become(is_ready=True)

    def _not_obtained(self, event: NotObtained) -> Iterator[Instruction]:
        wanted = [a for a in (self.state.active, self.state.pending) if a is not None]
        if (event.epoch, event.plan) not in map(_name, wanted):
            return
        self.fault = PrepareFault(epoch=event.epoch, plan=event.plan, code=event.code, message=event.message)
        if self.state.pending is not None and self.state.pending.epoch == event.epoch:
            yield from self._forget_pending()

    def _commit(self, epoch: int, plan: str) -> Iterator[Instruction]:
        state = self.state
        pending = state.pending
        if pending is None or not state.is_ready or _name(pending) != (epoch, plan):
            return  # committed already, or something the coordinator prepares first
        kept = (*state.kept, state.active) if state.active is not None else state.kept
        yield self._become(active=pending, pending=None, is_ready=False, kept=kept)
        yield Activate(pending)

    def _retire(self, epoch: int) -> Iterator[Instruction]:
        state = self.state
        if epoch != self.active_epoch or state.retired >= epoch:
            return
        yield self._become(retired=epoch, kept=())
        yield Keep(self.assignments)

    def _abort(self, epoch: int, plan: str) -> Iterator[Instruction]:
        if self.fault is not None and (self.fault.epoch, self.fault.plan) == (epoch, plan):
            self.fault = None
        pending = self.state.pending
        if pending is not None and _name(pending) == (epoch, plan):
            yield from self._forget_pending()

    def _forget_pending(self) -> Iterator[Instruction]:
        yield StopObtaining()
        yield self._become(pending=None, is_ready=False)
        yield Keep(self.assignments)

    def _become(self, **changes: object) -> Persist:
        self.state = self.state.model_copy(update=changes)
        return Persist(self.state)

    def _obtain(self, assignment: Assignment) -> Obtain:
        return Obtain(assignment.epoch, assignment.plan, self.assignments)


def _name(assignment: Assignment) -> tuple[int, str]:
    """Return what makes an assignment the same to this node: epoch and plan."""
    return assignment.epoch, assignment.plan


def _fault(assignment: Assignment, code: ExitCode, message: str) -> PrepareFault:
    return PrepareFault(epoch=assignment.epoch, plan=assignment.plan, code=code, message=message)
