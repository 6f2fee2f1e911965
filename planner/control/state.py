"""What a coordinator remembers, and whether a plan may start from there.

Decides refusals; changes nothing. Must not know which agents are alive, nor what happens to an accepted plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from planner.control.stages import InconsistentPlan, Paths, Placement, require_whole_paths, stage_placements
from schemas.base import FrozenModel
from schemas.messages import Phase
from schemas.outcome import ExitCode
from schemas.placement import Replica
from schemas.plan import Plan, TrunkPath


class ClusterState(FrozenModel):
    """What the coordinator must not forget.

    Attributes
    ----------
    epoch, placement
        The epoch last committed and its placement.
    before
        The placement of the epoch before, from which an agent that lost its data may still pull.
    plan
        The plan under way or last reached; its stage under way leads to `epoch` + 1.
    trunk
        Paths in force in `epoch`; None in journals of before they could differ from the committed plan's.
    """

    cluster: str
    epoch: int = 0
    placement: tuple[Replica, ...] = ()
    before: tuple[Replica, ...] = ()
    plan: Plan | None = None
    committed_plan: Plan | None = None
    trunk: tuple[TrunkPath, ...] | None = None
    phase: Phase = "idle"
    message: str = ""
    code: ExitCode = ExitCode.DONE

    @property
    def paths(self) -> Paths:
        """Paths in force; none before the first plan."""
        if self.trunk is not None:
            return self.trunk
        return self.committed_plan.trunk if self.committed_plan else ()


@dataclass(frozen=True)
class Refuse:
    """Answer the proposal of this event with a refusal."""

    code: ExitCode
    message: str


@dataclass(frozen=True)
class Accept:
    """Answer the proposal of this event: it is under way, or there is nothing to do."""

    nothing_to_do: bool


def is_busy(state: ClusterState) -> bool:
    """Whether a plan is under way."""
    return state.phase in {"proposed", "preparing", "prepared", "committed", "retiring"}


def judge(state: ClusterState, plan: Plan) -> Refuse | Accept:
    """Decide whether a plan may start now; does not modify anything."""
    same = state.plan is not None and state.plan.digest == plan.digest
    if refusal := next(_objections(state, plan, same=same), None):
        return refusal
    return Accept(nothing_to_do=same and state.epoch == plan.epoch and state.phase == "done")


def _objections(state: ClusterState, plan: Plan, *, same: bool) -> Iterator[Refuse]:
    """Yield what speaks against a plan, the first thing first."""
    if plan.cluster != state.cluster:
        yield Refuse(ExitCode.INVALID, f"the plan is for cluster {plan.cluster!r}, this is {state.cluster!r}")
    if plan.digest != plan.computed_digest():
        yield Refuse(ExitCode.INVALID, "the plan was altered after it was written; solve again")
    if same and (is_busy(state) or (state.epoch == plan.epoch and state.phase == "done")):
        return  # under way or reached: whoever asks again is told how far it is
    if is_busy(state):
        yield Refuse(ExitCode.REFUSED, f"another plan is under way ({state.phase}); wait until it is done")
    if plan.epoch <= plan.base_epoch:
        yield Refuse(ExitCode.INVALID, f"its epoch {plan.epoch} does not follow its base epoch {plan.base_epoch}")
    is_resumed = same and plan.base_epoch <= state.epoch < plan.epoch
    if plan.base_epoch != state.epoch and not is_resumed:
        yield Refuse(
            ExitCode.REFUSED,
            f"the plan is stale: it starts from epoch {plan.base_epoch}, the cluster is at epoch {state.epoch}; "
            f"{_way_out(state)}",
        )
    try:
        require_whole_paths(plan)
        placements_ahead(plan, state.placement, state.epoch)
    except InconsistentPlan as error:
        yield Refuse(ExitCode.INVALID, f"the plan contradicts itself: {error}")


def _way_out(state: ClusterState) -> str:
    """Say what a user whose plan is stale does next."""
    begun = state.plan
    if begun is not None and begun.base_epoch < state.epoch < begun.epoch:
        return f"it stopped half-way in plan {begun.digest[:12]}: apply that plan again first"
    return "solve again with --current and the plan that is active"


def placements_ahead(plan: Plan, current: Placement, epoch: int) -> list[Placement]:
    """Return the placements of the stages still to do, given the placement of `epoch`."""
    done = epoch - plan.base_epoch
    rest = plan.model_copy(
        update={
            "base_epoch": epoch,
            "steps": tuple(s.model_copy(update={"stage": s.stage - done}) for s in plan.steps if s.stage > done),
        }
    )
    return stage_placements(current, rest)
