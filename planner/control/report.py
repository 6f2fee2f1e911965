"""How `planner status` looks: a summary line and a table. Must not know where the figures come from."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from schemas.messages import NodeStatus, PlanStatus, StatusReport
from schemas.topology import TIERS, Tier
from schemas.units import format_bytes, format_seconds

_STYLES = {"up": "green", "stalled": "yellow", "away": "red", "stopped": "dim", "never seen": "dim"}


def status_view(report: StatusReport) -> RenderableType:
    """Return the status as something rich can print: a column per tier that some node may use."""
    tiers = [tier for tier in TIERS if any(getattr(node.memory_allowed, tier) for node in report.nodes)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("node", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("epoch", *tiers, "hits", "remote", "subst.", "tokens", "tokens/s", "heartbeat"):
        table.add_column(title, justify="right", no_wrap=True)
    for node in report.nodes:
        held = (_held(node, tier) for tier in tiers)
        table.add_row(node.id, Text(node.state, style=_STYLES[node.state]), str(node.epoch), *held, *_figures(node))
    return Group(Text(f"{report.cluster}: epoch {report.epoch}, {plan_line(report.plan)}"), table)


def plan_line(plan: PlanStatus) -> str:
    """Return the plan's state as one line."""
    if not plan.digest:
        return "no plan yet"
    text = f"plan {plan.digest[:12]} → epoch {plan.target} {plan.phase}, "
    text += f"{format_bytes(plan.moved)} / {format_bytes(plan.to_move)} moved"
    if plan.eta_s is not None:
        text += f", {format_seconds(plan.eta_s)} to go"
    return f"{text}: {plan.message}" if plan.message else text


def _figures(node: NodeStatus) -> tuple[str, ...]:
    heard = "–" if node.last_heartbeat_s is None else f"{node.last_heartbeat_s:.1f} s #{node.progress}"
    return (
        _share(node.hit_rate),
        _share(node.remote_share),
        _share(node.substitution_share),
        str(node.tokens),
        f"{node.tokens_per_s:.1f}",
        heard,
    )


def _held(node: NodeStatus, tier: Tier) -> str:
    """Write the experts of a tier, and how much of what it may use is used."""
    allowed = getattr(node.memory_allowed, tier)
    if not allowed:
        return "–"
    used = getattr(node.memory_used, tier)
    return f"{getattr(node.experts, tier)}: {used / allowed:.0%} of {format_bytes(allowed)}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
