"""What people read about plans, comparisons and topologies: short text and small tables.

Decides wording and columns only; the figures come from the same records that ``--json`` prints.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from planner.problem import Problem
from schemas.placement import Replica
from schemas.plan import Movement, Plan
from schemas.topology import TIERS, Tier
from schemas.units import format_bytes, format_seconds, format_share

_PIPED_WIDTH = 160


def console(file: TextIO) -> Console:
    """Return a console that leaves colour out where NO_COLOR or a pipe asks for it."""
    return Console(file=file, highlight=False, width=None if file.isatty() else _PIPED_WIDTH)


def share_text(value: float | None) -> str:
    """Write a share, or a dash where it is not known."""
    return "-" if value is None else format_share(value)


def gap_text(gap: float | None) -> str:
    """Write a gap, or that none is known."""
    return "no bound" if gap is None else f"gap {gap * 100:.2g} %"


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the summary of a plan: what changes first."""
    summary = plan.summary
    actions = Counter(step.action for step in plan.steps)
    moved = sum(step.bytes for step in plan.steps if step.action == "replicate")
    stages, paths = plan.epoch - plan.base_epoch, ", tokens take new paths" if plan.trunk_stage else ""
    if actions["replicate"] or actions["drop"]:
        dropped = f", drops {actions['drop']}" if actions["drop"] else ""
        change = f"makes {actions['replicate']} replicas ({format_bytes(moved)}){dropped}"
        yield f"{plan.cluster}: epoch {plan.base_epoch} → {plan.epoch} {change} in {_count(stages, 'stage')}{paths}"
    elif stages:
        yield f"{plan.cluster}: epoch {plan.base_epoch} → {plan.epoch} changes who calls whom, no replica{paths}"
    else:
        yield f"{plan.cluster}: nothing changes, epoch {plan.epoch} stays"
    yield (
        f"{plan.model.id}: {plan.model.layers} layers × {plan.model.experts} experts of "
        f"{format_bytes(plan.model.expert_bytes)}, {len(plan.placement)} replicas"
    )
    yield (
        f"{summary.status} by {summary.solver} in {summary.seconds:.2f} s: {summary.objective_name} "
        f"{summary.objective:.6g}, {gap_text(summary.gap)}"
    )
    takes, whole = "waits", " for experts elsewhere"
    if summary.paths is not None:
        prompts = any(path.prompt_tokens for path in summary.paths)
        takes, whole = "takes", f", compute and hops of its path{' and its part of the prompt' * prompts} included"
    yield (
        f"a token {takes} {_seconds(summary.predicted_latency_s)}{whole}; "
        f"{share_text(summary.remote_call_share)} of calls are remote, "
        f"{share_text(summary.any_remote_share)} of token-layers have one"
    )
    yield from _precision_lines(plan)
    if summary.spared_any_remote_share is not None:
        yield (
            f"while agents spend the quality budget of {share_text(plan.quality_budget)}, about "
            f"{share_text(summary.spared_any_remote_share)} of token-layers wait for another node"
        )
    if summary.queued_latency_s is not None:
        yield f"with queues at busy nodes a token {takes} {format_seconds(summary.queued_latency_s)}"
    yield from _load_lines(plan)
    if summary.movement is not None:
        yield movement_text(summary.movement)
    if summary.survival is not None:
        told = summary.survival
        yield (
            f"surviving any {told.losses} losses takes {told.replicas} replicas of every expert and costs a token "
            f"{format_seconds(max(told.extra_latency_s, 0.0))}"
        )


def _precision_lines(plan: Plan) -> Iterator[str]:
    """Yield in which precisions nodes hold experts, and why."""
    told = plan.summary.precision
    if told is None or plan.precisions is None:
        return
    held = Counter((each.precision, each.expert_bytes) for each in plan.precisions)
    named = {key: [each.node for each in plan.precisions if (each.precision, each.expert_bytes) == key] for key in held}
    parts = [f"{', '.join(nodes)} in {low} ({format_bytes(size)} each)" for (low, size), nodes in sorted(named.items())]
    chosen = f", chosen among {told.considered} ways" if told.considered > 1 else ""
    yield f"experts are held at {'; at '.join(parts)}{chosen}"
    if told.why:
        yield told.why
    elif told.rise is None:
        yield "what that costs in quality is not known: no calibration measured it"
    else:
        yield f"that raises perplexity by {format_share(told.rise)} at most, as calibrated"


def movement_text(found: Movement) -> str:
    """Say in a line what a movement is."""
    if not found.moved:
        return f"stays: {found.reason}"
    return (
        f"moves {format_bytes(found.new_bytes)} from {found.sources} nodes in {format_seconds(found.makespan_s)}: "
        f"{found.reason}"
    )


def _load_lines(plan: Plan) -> Iterator[str]:
    """Yield the busiest node and link, where they are known."""
    nodes = [(node.utilisation, node.id) for node in plan.summary.nodes if node.utilisation is not None]
    links = [(link.utilisation, " - ".join(link.between)) for link in plan.summary.links or ()]
    busiest = [f"{what} {name} {format_share(max(found)[0])}" for what, found, name in (
        ("node", nodes, max(nodes, default=(0, ""))[1]), ("link", links, max(links, default=(0, ""))[1])
    ) if found]  # fmt: skip
    if busiest:
        yield f"expected use of the busiest: {', '.join(busiest)}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def node_table(plan: Plan) -> Table:
    """Return one row per node: what it holds by tier, and what its tokens meet."""
    held = Counter((replica.node, replica.tier) for replica in plan.placement)
    tiers = [tier for tier in TIERS if any(held[node.id, tier] for node in plan.summary.nodes)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for heading in (*tiers, "experts of room", "compute", "remote calls", "any remote", "per token"):
        table.add_column(heading, justify="right")
    for node in plan.summary.nodes:
        room = f"{format_bytes(node.bytes)} of {format_bytes(node.capacity)}"
        table.add_row(
            node.id,
            *(str(held[node.id, tier]) for tier in tiers),
            room,
            share_text(node.utilisation),
            share_text(node.remote_call_share),
            share_text(node.any_remote_share),
            _seconds(node.predicted_latency_s),
        )
    return table


def layer_table(plan: Plan) -> Table:
    """Return one row per layer: which experts each node holds; host and disk marked h and d."""
    nodes = [node.id for node in plan.summary.nodes]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    for node in nodes:
        table.add_column(node)
    cells: dict[tuple[int, str], list[str]] = {}
    mark: dict[Tier, str] = {"device": "", "host": "h", "disk": "d"}
    for replica in plan.placement:
        cells.setdefault((replica.layer, replica.node), []).append(f"{replica.expert}{mark[replica.tier]}")
    for layer in range(plan.model.layers):
        table.add_row(str(layer), *(" ".join(cells.get((layer, node), [])) for node in nodes))
    return table


def reason_lines(plan: Plan) -> Iterator[str]:
    """Yield why each node got what it got."""
    for node in plan.summary.nodes:
        reserved = node.trunk_bytes + node.kv_bytes
        taken = f" ({format_bytes(reserved)} for trunk and KV cache)" if reserved else ""
        yield f"{node.id}: {node.why}{taken}"


def step_lines(plan: Plan) -> Iterator[str]:
    """Yield every step in order."""
    for step in plan.steps:
        if step.action == "switch":
            paths = ", tokens take their new paths" if step.stage == plan.trunk_stage else ""
            yield f"stage {step.stage}: switch to epoch {plan.base_epoch + step.stage}{paths}"
            continue
        source = f" from {step.source or 'a store'}" if step.action == "replicate" else ""
        what = f"layer {step.layer} expert {step.expert} on {step.node} ({step.tier})"
        yield f"stage {step.stage}: {step.action} {what}{source}"


def difference(first: Plan, second: Plan) -> dict[str, Any]:
    """Return what the second plan's placement has and has not beside the first's, as JSON data."""
    before, after = set(map(_key, first.placement)), set(map(_key, second.placement))

    def records(keys: set[tuple[int, int, str, str]]) -> list[dict[str, Any]]:
        return [dict(zip(("layer", "expert", "node", "tier"), key, strict=True)) for key in sorted(keys)]

    return {
        "same_placement": before == after,
        "same_routes": first.routes == second.routes,
        "same_paths": first.trunk == second.trunk,
        "same_precisions": (first.precisions or ()) == (second.precisions or ()),
        "added": records(after - before),
        "dropped": records(before - after),
        "kept": len(before & after),
    }


def _key(replica: Replica) -> tuple[int, int, str, str]:
    return replica.layer, replica.expert, replica.node, replica.tier


def difference_table(first: Plan, second: Plan) -> Table:
    """Return one row per node: replicas before, kept, added, dropped, after."""
    before, after = set(map(_key, first.placement)), set(map(_key, second.placement))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for heading in ("before", "kept", "added", "dropped", "after"):
        table.add_column(heading, justify="right")
    for node in sorted({key[2] for key in before | after}):
        have, want = ({key for key in keys if key[2] == node} for keys in (before, after))
        counts = (len(have), len(have & want), len(want - have), len(have - want), len(want))
        table.add_row(node, *map(str, counts))
    return table


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row per strategy."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "remote_call_share": ("remote calls", share_text),
        "any_remote_share": ("any remote", share_text),
        "predicted_latency_s": ("time per token", format_seconds),
        "wait_s": ("of it waits", format_seconds),
        "hops_per_token": ("hops", lambda hops: f"{hops:.3g}"),
        "bytes_per_token": ("bytes per token", format_bytes),
        "simulated_mean_s": ("simulated mean", format_seconds),
        "simulated_p95_s": ("simulated p95", format_seconds),
        "gap": ("gap", lambda gap: f"{gap * 100:.2g} %"),
        "seconds": ("seconds", lambda seconds: f"{seconds:.2f}"),
    }
    shown = {key: column for key, column in columns.items() if any(key in row for row in rows)}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    for heading, _ in shown.values():
        table.add_column(heading, justify="right")
    for row in rows:
        cells = ((row[key], written) for key, (_, written) in shown.items())
        table.add_row(row["strategy"], *("-" if value is None else written(value) for value, written in cells))
    return table


def room_table(problem: Problem) -> Table:
    """Return one row per node: memory taken by trunk and KV cache, and room for experts by tier."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for heading in ("trunk", "KV cache", *(f"experts in {tier}" for tier in TIERS)):
        table.add_column(heading, justify="right")
    slots = {(n, t): s for n, t, s in zip(problem.place_node, problem.place_tier, problem.slots, strict=True)}
    for node, name in enumerate(problem.node_ids):
        taken = (format_bytes(int(problem.trunk_bytes[node])), format_bytes(int(problem.kv_bytes[node])))
        table.add_row(name, *taken, *(str(slots.get((node, tier), 0)) for tier in range(len(TIERS))))
    return table
