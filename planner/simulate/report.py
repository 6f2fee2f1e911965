"""A simulation as text for people and as JSON data: the same figures.

Decides columns and keys only.
"""

import sys
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from planner.report import console
from planner.simulate.outcome import Latency, Simulation
from schemas.units import format_bytes, format_seconds, format_share


def document(found: Simulation) -> dict[str, Any]:
    """Return the figures as JSON data: times in s, sizes in bytes."""
    return {
        "tokens": found.tokens,
        "events": found.events,
        "elapsed_s": found.elapsed_s,
        "latency": asdict(found.total),
        "ingresses": [{"id": name, **asdict(latency)} for name, latency in found.ingresses.items()],
        "first_tokens": [{"id": name, **asdict(first)} for name, first in found.first_tokens.items()],
        "nodes": [asdict(node) for node in found.nodes],
        "links": [asdict(link) for link in found.links],
        "overloaded": list(found.overloaded),
    }


def show(found: Simulation) -> None:
    """Print the figures as tables."""
    out = console(sys.stdout)
    out.print(
        f"{found.tokens} tokens, {found.events} token-layers in {format_seconds(found.elapsed_s)} of simulated time"
    )
    out.print(_latency_table(found))
    if found.first_tokens:
        out.print(_first_table(found))
    out.print(_use_table(found))
    if found.overloaded:
        out.print(
            f"overloaded: {', '.join(found.overloaded)}. More is asked of them than they can do, so latencies grow "
            "with --tokens; lower --rate-scale or the topology's tokens_per_s"
        )


def _latency_table(found: Simulation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokens entering at", no_wrap=True)
    for heading in ("tokens", "mean", "p50", "p95", "p99", "network", "of it hops", "queues", "compute", "software"):
        table.add_column(heading, justify="right")
    for name, latency in found.ingresses.items():
        table.add_row(name, *_latency_cells(latency))
    table.add_section()
    table.add_row("all", *_latency_cells(found.total))
    return table


def _first_table(found: Simulation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("first token behind prompts at", no_wrap=True)
    for heading in ("prompts", "mean", "p50", "p95", "p99"):
        table.add_column(heading, justify="right")
    for name, first in found.first_tokens.items():
        times = (first.mean_s, first.p50_s, first.p95_s, first.p99_s)
        table.add_row(name, str(first.prompts), *map(format_seconds, times))
    return table


def _latency_cells(latency: Latency) -> tuple[str, ...]:
    waits = latency.waits
    times = (latency.mean_s, latency.p50_s, latency.p95_s, latency.p99_s)
    parts = (waits.network_s, waits.hops_s, waits.queue_s, waits.compute_s, waits.overhead_s)
    return (str(latency.tokens), *map(format_seconds, (*times, *parts)))


def _use_table(found: Simulation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("node or link", no_wrap=True)
    for heading in ("busy", "bytes", "bytes per token"):
        table.add_column(heading, justify="right")
    for node in found.nodes:
        table.add_row(node.id, format_share(node.utilisation), "", "")
    table.add_section()
    for link in found.links:
        name = f"{link.source} → {link.target}"
        table.add_row(
            name, format_share(link.utilisation), format_bytes(link.bytes), format_bytes(link.bytes_per_token)
        )
    return table
