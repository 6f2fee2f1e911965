"""What `planner status` says, computed from the last heartbeats.

Decides when a node counts as away or stalled, what the shares are shares of, and which of the plan's expectations stand
beside what was counted. Pure: times are passed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from planner.control.stages import travelling_bytes
from planner.control.state import ClusterState
from planner.journey import Promise, promises
from schemas.messages import (
    Catalogue,
    Heartbeat,
    Hello,
    NodeState,
    NodeStatus,
    PlanStatus,
    Served,
    TierBytes,
    TierCounts,
)
from schemas.plan import Plan
from schemas.topology import Memory

AWAY_S: Final = 3.0
STALLED_S: Final = 5.0


@dataclass(frozen=True)
class AgentView:
    """What is known of one agent: its hello, its last heartbeat, when it came and when its progress last changed.

    `has_stopped` after its goodbye. `since` is what it had counted when every agent had come to the
    epoch in force.
    """

    hello: Hello
    heartbeat: Heartbeat | None
    heard_at: float
    progressed_at: float
    has_stopped: bool = False
    since: Served = field(default_factory=Served)

    def from_now(self) -> "AgentView":
        """Return the view with what was counted so far left out of figures per token."""
        return self if self.heartbeat is None else replace(self, since=self.heartbeat.served)


def promises_in_force(state: ClusterState, views: Mapping[str, AgentView]) -> Mapping[str, Promise]:
    """Return what the plan that was committed expects at each node, once tokens take its paths."""
    plan = state.committed_plan
    if plan is None or plan.summary.paths is None or state.paths != plan.trunk:
        return {}
    tokens = {n: float(v.heartbeat.served.tokens - v.since.tokens) for n, v in views.items() if v.heartbeat}
    return promises(plan.summary.paths, tokens)


def unlike_offers(plan: Plan, views: Mapping[str, AgentView]) -> str:
    """Say which agents cannot hold experts in the precision that a plan wants of them; empty if all can."""
    unlike = [
        f"{each.node} can hold experts in {' or '.join(views[each.node].hello.precisions)}, the plan wants them in "
        f"{each.precision} there"
        for each in plan.precisions or ()
        if each.node in views and each.precision not in views[each.node].hello.precisions
    ]
    advice = "set precision in the agent's config to the plan's (or to plan) and start it again, or solve with its own"
    return "; ".join([*unlike, advice]) if unlike else ""


def node_status(
    node: str, allowed: Memory, view: AgentView | None, *, now: float, promise: Promise | None = None
) -> NodeStatus:
    """Return one row of the table; `promise` is what the plan expects there."""
    planned: dict[str, Any] = {
        "planned_hops_per_token": promise.hops if promise else None,
        "planned_calls_per_token": promise.calls if promise else None,
        "planned_wait_per_token_s": promise.wait_s if promise else None,
    }
    if view is None:
        none = TierBytes()
        return NodeStatus(
            id=node, state="never seen", epoch=0, experts=TierCounts(), memory_used=none,
            memory_allowed=TierBytes(device=allowed.device, host=allowed.host, disk=allowed.disk), hit_rate=None,
            substitution_share=None, quality=None, cache=None, remote_share=None, tokens_per_s=0.0, tokens=0,
            last_heartbeat_s=None, progress=0, ran_tokens=0, precision="checkpoint", **planned,
        )  # fmt: skip
    beat = view.heartbeat
    served = beat.served if beat else Served()
    rows = served.device_rows + served.host_rows + served.disk_rows + served.remote_rows
    state, since = _state(view, now), view.since
    ran = served.step_tokens - since.step_tokens
    return NodeStatus(
        id=node,
        state=state,
        epoch=(beat.standing if beat else view.hello.standing).active,
        experts=beat.held if beat else TierCounts(),
        memory_used=beat.used if beat else TierBytes(),
        memory_allowed=view.hello.memory,
        hit_rate=served.device_rows / rows if rows else None,
        substitution_share=served.substituted_rows / rows if rows else None,
        quality=served.quality,
        device=beat.device if beat else "cpu",
        device_note=beat.device_note if beat else "",
        cache=served.cache,
        precision=served.precision,
        low_share=served.low_rows / rows if rows else None,
        remote_share=served.remote_rows / rows if rows else None,
        any_remote_share=served.remote_events / served.events if served.events else None,
        tokens_per_s=served.tokens_per_s if state in {"up", "stalled"} else 0.0,
        tokens=served.tokens,
        last_heartbeat_s=now - view.heard_at,
        progress=beat.progress if beat else 0,
        ran_tokens=ran,
        hops_per_token=(served.hops - since.hops) / ran if ran else None,
        calls_per_token=(served.calls - since.calls) / ran if ran else None,
        call_wait_per_token_s=(served.call_wait_s - since.call_wait_s) / ran if ran else None,
        **planned,
    )


def _state(view: AgentView, now: float) -> NodeState:
    if view.has_stopped:
        return "stopped"
    if now - view.heard_at > AWAY_S:
        return "away"
    if view.heartbeat and view.heartbeat.in_flight and now - view.progressed_at > STALLED_S:
        return "stalled"
    return "up"


def plan_status(
    state: ClusterState,
    views: Mapping[str, AgentView],
    *,
    preparing_s: float | None,
    catalogue: Catalogue | None = None,
) -> PlanStatus:
    """Return how far the plan is.

    Parameters
    ----------
    preparing_s
        How long its stage has been preparing.
    catalogue
        What a store has: records that it lacks in a node's precision travel in the checkpoint's.
    """
    plan = state.plan
    if plan is None:
        return PlanStatus(digest="", phase=state.phase, epoch=state.epoch, target=0, moved=0, to_move=0)
    sizes = [(s.stage, travelling_bytes(s, plan, catalogue)) for s in plan.steps if s.action == "replicate"]
    total = sum(size for _, size in sizes)
    before = sum(size for stage, size in sizes if plan.base_epoch + stage <= state.epoch)
    stage = [v.heartbeat.moved for v in views.values() if v.heartbeat and v.heartbeat.to_move]
    moving = sum(stage) if state.phase == "preparing" else 0
    moved = min(total, before + moving)
    eta = (total - moved) * preparing_s / moving if preparing_s and moving and moved < total else None
    return PlanStatus(
        digest=plan.digest,
        phase=state.phase,
        epoch=state.epoch,
        target=plan.epoch,
        moved=moved,
        to_move=total,
        eta_s=eta,
        message=state.message,
    )
