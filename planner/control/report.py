"""How `planner status` looks: a summary line, a table of nodes, and one of what tokens met at those that run layers.

Must not know where the figures come from.
"""

from collections.abc import Callable, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from schemas.messages import LayerUse, NodeLayers, NodeStatus, PlanStatus, StatusReport
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
    head = Text(f"{report.cluster}: epoch {report.epoch}, {plan_line(report.plan)}")
    notes = [Text(f"{node.id}: {words}") for node in report.nodes if (words := _device(node))]
    notes += [Text(f"{node.id}: {words}") for node in report.nodes if (words := _precision(node))]
    notes += [Text(f"{node.id}: {words}") for node in report.nodes if (words := _guests(node))]
    notes += [Text(f"{node.id}: {node.quality.note}") for node in report.nodes if node.quality and node.quality.note]
    running = [node for node in report.nodes if node.hops_per_token is not None]
    paths = (Text(), path_table(running)) if running else ()
    layers = [part for node in report.layers for part in (Text(), layer_table(node), Text(time_line(node)))]
    return Group(head, table, *notes, *paths, *layers)


def layer_table(node: NodeLayers) -> Table:
    """Return what each layer met at a node; tiers, loads and substitutions only where there were any."""
    columns = [(title, tell) for title, tell in _LAYER_COLUMNS if any(tell(layer) for layer in node.layers)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"layers at {node.node}", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for number, layer in enumerate(node.layers):
        table.add_row(str(number), *(_shown(title, tell(layer)) for title, tell in columns))
    return table


def time_line(node: NodeLayers) -> str:
    """Return how a node's time with tokens was split, as one line."""
    loads_s = sum(layer.load_wait_s for layer in node.layers)
    local_s, wait_s = (sum(getattr(layer, name) for layer in node.layers) for name in ("local_s", "wait_s"))
    parts = {
        "trunk": node.trunk_s,
        "resident experts": max(0.0, local_s - loads_s),
        "loads": loads_s,
        "other nodes": wait_s,
    }
    split = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts.items())
    return f"time of {node.tokens} tokens: {split}"


def _rows(layer: LayerUse) -> int:
    return layer.device_rows + layer.host_rows + layer.disk_rows + layer.remote_rows


_LAYER_COLUMNS: Final[tuple[tuple[str, Callable[[LayerUse], float]], ...]] = (
    ("tokens", lambda layer: layer.tokens),
    *(
        (name, lambda layer, field=f"{name}_rows": getattr(layer, field) / max(1, _rows(layer)))
        for name in (*TIERS, "remote")
    ),
    ("subst.", lambda layer: layer.replaced_rows / max(1, _rows(layer))),
    ("calls", lambda layer: layer.calls),
    ("loads", lambda layer: layer.loads),
    ("bytes", lambda layer: layer.load_bytes),
    ("experts for", lambda layer: max(0.0, layer.local_s - layer.load_wait_s)),
    ("loads for", lambda layer: layer.load_wait_s),
    ("others for", lambda layer: layer.wait_s),
)
_COUNTED: Final = frozenset({"tokens", "calls", "loads"})


def _shown(title: str, value: float) -> str:
    if title.endswith(" for"):
        return format_seconds(value)
    if title == "bytes":
        return format_bytes(round(value))
    return f"{value:.0f}" if title in _COUNTED else f"{value:.1%}"


def _guests(node: NodeStatus) -> str:
    """Say what a node caches of others' experts."""
    cache = node.cache
    if cache is None or not cache.brought:
        return ""
    return (
        f"brought {cache.brought} experts of other nodes ({format_bytes(cache.brought_bytes)}) into memory that the "
        f"plan leaves free, and found them there {cache.guest_hits} times"
    )


def path_table(nodes: Sequence[NodeStatus]) -> Table:
    """Return what a token met at each node that ran layers for it, beside what the plan expects of a generated one."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("per token at", no_wrap=True)
    for title in ("hops", "planned", "calls", "planned", "wait", "planned"):
        table.add_column(title, justify="right", no_wrap=True)
    for node in nodes:
        figures = (
            node.hops_per_token,
            node.planned_hops_per_token,
            node.calls_per_token,
            node.planned_calls_per_token,
        )
        waits = (node.call_wait_per_token_s, node.planned_wait_per_token_s)
        counted = ("–" if value is None else f"{value:.2f}" for value in figures)
        table.add_row(node.id, *counted, *("–" if value is None else format_seconds(value) for value in waits))
    return table


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


def _device(node: NodeStatus) -> str:
    """Say where a node computes, unless that is its processor because nobody asked for anything else."""
    if node.device_note:
        return f"{node.device_note}; the processor computes instead"
    return "" if node.device == "cpu" else f"computes on {node.device}"


def _precision(node: NodeStatus) -> str:
    """Say where a node executes experts in less than the checkpoint's precision."""
    if node.precision != "checkpoint":
        return f"executes every expert in {node.precision}"
    return f"{node.low_share:.1%} of experts in low precision" if node.low_share else ""


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
