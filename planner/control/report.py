"""How `planner status` looks: a summary line and a table. Must not know where the figures come from."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from schemas.messages import NodeStatus, PlanStatus, StatusReport, TierBytes, TierCounts
from schemas.topology import TIERS
from schemas.units import format_bytes, format_seconds, format_share

_STYLES = {"up": "green", "stalled": "yellow", "away": "red", "never seen": "dim"}


def status_view(report: StatusReport) -> RenderableType:
    """Return the status as something rich can print."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("node", "state"):
        table.add_column(title)
    for title in ("epoch", "experts", "memory", "hits", "subst.", "remote", "tokens/s", "heartbeat", "progress"):
        table.add_column(title, justify="right")
    for node in report.nodes:
        table.add_row(node.id, Text(node.state, style=_STYLES[node.state]), *_figures(node))
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
    return (
        str(node.epoch),
        _tiers(node.experts),
        _memory(node.memory_used, node.memory_allowed),
        _share(node.hit_rate),
        _share(node.substitution_share),
        _share(node.remote_share),
        f"{node.tokens_per_s:.1f}",
        "–" if node.last_heartbeat_s is None else f"{format_seconds(round(node.last_heartbeat_s, 1))} ago",
        str(node.progress),
    )


def _tiers(counts: TierCounts) -> str:
    parts = [f"{getattr(counts, tier)} {tier}" for tier in TIERS if getattr(counts, tier)]
    return ", ".join(parts) or "0"


def _memory(used: TierBytes, allowed: TierBytes) -> str:
    parts = [
        f"{tier} {format_bytes(getattr(used, tier))} / {format_bytes(getattr(allowed, tier))}"
        for tier in TIERS
        if getattr(allowed, tier)
    ]
    return "\n".join(parts)


def _share(value: float | None) -> str:
    return "–" if value is None else format_share(value)
