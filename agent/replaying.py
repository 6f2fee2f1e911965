"""`agent replay`: any cache policy on any recorded trace, without a model.

Decides how capacities and policies are spelled and results shown. The work is done by `runtime.replay`.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from schemas.units import format_bytes, format_share, parse_bytes, parse_share

if TYPE_CHECKING:
    from runtime.replay import Recording, Replayed

EVICTION_NAMES: Final = ("rates", "steady", "cost-aware", "cyclfu", "least-stale", "score", "lfu", "lru")
ROUTING_NAMES: Final = (
    "exact",
    "mass",
    "mass-weighted",
    "mass-whole",
    "smoe",
    "cache-prior",
    "drop-cold",
    "adaptive",
    "hobbit",
    "buddy",
)
Rule = tuple[str, float]


class Capacity(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """Experts that fit: a count, a share of all, or bytes."""

    name = "capacity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return what kind of number it is, and the number."""
        text = str(value).strip()
        try:
            if text.isdigit():
                return "experts", float(text)
            return ("share", parse_share(text)) if text.endswith("%") else ("bytes", float(parse_bytes(text)))
        except ValueError as error:
            self.fail(f"{error}; write a count (256), a share (12.5 %) or bytes (600 MiB)", param, ctx)


class RoutingRule(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A routing policy and its number: ``mass=0.08``."""

    name = "rule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rule:
        """Return name and number."""
        name, _, number = str(value).partition("=")
        if name not in ROUTING_NAMES:
            self.fail(f"no routing policy {name!r}; there are {', '.join(ROUTING_NAMES)}", param, ctx)
        if name == "exact":
            return name, 0.0
        try:
            found = float(number)
        except ValueError:
            found = -1.0
        if not 0 <= found <= 10:
            self.fail(f"{value}: {name} needs a number in 0 … 10, as in {name}=0.08; 0 is exact", param, ctx)
        return name, found


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--capacity", "capacities", type=Capacity(), multiple=True, default=("8 %",), show_default=True,
    help="Experts that fit: a count, a share of all, or bytes. May be given several times.",
)  # fmt: skip
@click.option(
    "--eviction", "evictions", type=click.Choice(EVICTION_NAMES), multiple=True, default=EVICTION_NAMES,
    help="May be given several times; all by default.",
)  # fmt: skip
@click.option(
    "--routing", "routings", type=RoutingRule(), multiple=True, default=("exact",),
    help=f"NAME=NUMBER, may be given several times: {', '.join(ROUTING_NAMES)}.",
)  # fmt: skip
@click.option("--per-layer", is_flag=True, help="The capacity is of each layer's own cache, not of one for all.")
@click.option("--expert-bytes", help="Bytes of an expert, where the trace does not say.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw hit rates (FILE.svg).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def replay(
    *,
    trace: Path,
    capacities: tuple[tuple[str, float], ...],
    evictions: tuple[str, ...],
    routings: tuple[Rule, ...],
    per_layer: bool,
    expert_bytes: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay TRACE (a trace file or a *.route.csv) against a cache of experts, under several policies."""
    from runtime.replay import read_recording

    if plot and (plot.suffix != ".svg" or not plot.absolute().parent.is_dir()):
        raise click.UsageError(f"--plot {plot}: write a file that ends in .svg, in a directory that exists")
    recording = _sized(read_recording(trace), expert_bytes)
    _require_candidates(recording, routings)
    slots = [_slots(recording, kind, number, per_layer=per_layer) for kind, number in capacities]
    results = list(_results(recording, slots, evictions, routings, per_layer=per_layer))
    if plot:
        _draw(plot, recording, results, per_layer=per_layer)
    if as_json:
        rows = [
            {**dataclasses.asdict(r), "hit_rate": r.hit_rate, "loads_per_token": r.loads_per_token} for r in results
        ]
        click.echo(json.dumps({"trace": recording.name, "experts": recording.num_experts, "policies": rows}))
        return
    _print_table(recording, results)


def _sized(recording: "Recording", expert_bytes: str | None) -> "Recording":
    """Give experts the size that was asked for."""
    import numpy as np

    if expert_bytes is None:
        return recording
    try:
        size = float(parse_bytes(expert_bytes))
    except ValueError as error:
        raise click.UsageError(f"--expert-bytes: {error}") from error
    return dataclasses.replace(recording, expert_bytes=np.full(recording.layers, size))


def _require_candidates(recording: "Recording", routings: tuple[Rule, ...]) -> None:
    """Refuse to substitute where a trace has nothing to substitute by."""
    stand_ins = {"mass", "mass-whole", "smoe", "cache-prior", "buddy"}
    asked = [name for name, _ in routings if name in stand_ins]
    if asked and not recording.has_candidates:
        raise click.UsageError(
            f"--routing {asked[0]} replaces experts by lower-ranked ones, but {recording.name} has only the "
            f"{recording.top_k} that were chosen; record a trace with --candidates {2 * recording.top_k} or more"
        )


def _slots(recording: "Recording", kind: str, number: float, *, per_layer: bool) -> int:
    total = recording.experts if per_layer else recording.num_experts
    if kind == "bytes":
        if recording.expert_bytes is None:
            raise click.UsageError(
                "--capacity in bytes needs --expert-bytes: the trace does not say how large they are"
            )
        number = number // float(recording.expert_bytes.max())
    elif kind == "share":
        number = round(number * total)
    slots = min(int(number), total)
    if slots < recording.top_k:
        raise click.UsageError(
            f"--capacity: {slots} experts fit, but a token needs {recording.top_k} of a layer at once; give it room "
            f"for {recording.top_k} at least ({format_share(recording.top_k / total)} of all)"
        )
    return slots


def _results(
    recording: "Recording",
    slots: list[int],
    evictions: tuple[str, ...],
    routings: tuple[Rule, ...],
    *,
    per_layer: bool,
) -> Iterator["Replayed"]:
    from runtime.policy.eviction import EVICTIONS
    from runtime.replay import belady, replay, routing_of

    with click.progressbar(length=len(slots) * (1 + len(evictions) * len(routings)), file=sys.stderr) as bar:
        for count in slots:
            best = belady(recording, count, per_layer=per_layer)
            bar.update(1)
            for routing in routings:
                for name in evictions:
                    eviction = EVICTIONS[name](recording.layers, recording.experts)
                    shown = routing[0] if routing[0] == "exact" else f"{routing[0]}={routing[1]:g}"
                    rule = routing_of(recording, *routing)
                    found = replay(recording, count, eviction, rule, names=(name, shown), per_layer=per_layer)
                    bar.update(1)
                    yield dataclasses.replace(found, belady_hit_rate=best.hit_rate)
            yield dataclasses.replace(best, belady_hit_rate=best.hit_rate)


def _print_table(recording: "Recording", results: list["Replayed"]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    headings = (
        "slots",
        "eviction",
        "routing",
        "hit rate",
        "of Belady",
        "loads/token",
        "bytes/token",
        "waits",
        "mass lost",
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in {1, 2} else "right", no_wrap=True)
    for row in results:
        share = row.hit_rate / row.belady_hit_rate if row.belady_hit_rate else None
        table.add_row(
            str(row.slots),
            row.eviction,
            row.routing,
            format_share(row.hit_rate),
            "-" if share is None else format_share(share),
            f"{row.loads_per_token:.2f}",
            "-" if row.bytes_per_token is None else format_bytes(row.bytes_per_token),
            format_share(row.waits),
            format_share(row.lost_mass),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(
        f"{recording.name}: {recording.decode_tokens} decoded tokens, {recording.layers} layers × {recording.experts} "
        f"experts, top-{recording.top_k}",
        highlight=False,
    )
    console.print(table)


def _draw(plot: Path, recording: "Recording", results: list["Replayed"], *, per_layer: bool) -> None:
    from runtime.replay_chart import hit_rate_svg
    from schemas.files import write_atomic

    total = recording.experts if per_layer else recording.num_experts
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(results, key=lambda row: row.slots):
        name = row.eviction if row.routing == "exact" else f"{row.eviction}, {row.routing}"
        curves.setdefault(name, []).append((row.slots / total, row.hit_rate))
    write_atomic(plot, hit_rate_svg(curves, title=f"{recording.name}: hit rate by capacity"))


COMMANDS: Final = (replay,)
