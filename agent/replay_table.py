"""What `agent replay` found, as a table and as a picture.

Decides which columns are shown: those that something is in. Must not know how anything was replayed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from schemas.units import format_bytes, format_seconds, format_share

if TYPE_CHECKING:
    from runtime.replay import Guessed, Recording, Replayed

_WIDTH: Final = 240  # of a file; a table takes what it needs of it


def print_table(recording: "Recording", results: list["Replayed"], *, first: int) -> None:
    """Print a row per policy; columns that say nothing of any row are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown = {heading: [cell(row) for row in results] for heading, cell in _COLUMNS.items()}
    shown = {heading: cells for heading, cells in shown.items() if heading in _ALWAYS or set(cells) - {"-", "none"}}
    for heading in shown:
        table.add_column(heading, justify="left" if heading in _TEXT else "right", no_wrap=True)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    counted = f"{recording.decode_tokens} decoded tokens"
    if first:
        counted += f", of which the last {recording.decode_tokens - first} count (the others were learnt from)"
    console.print(
        f"{recording.name}: {counted}, {recording.layers} layers × {recording.experts} experts, top-{recording.top_k}",
        highlight=False,
    )
    console.print(table)


def _of_belady(row: "Replayed") -> str:
    return format_share(row.hit_rate / row.belady_hit_rate) if row.belady_hit_rate else "-"


def _wasted(row: "Replayed") -> str:
    """Return what was loaded ahead and not used, loads and bytes per token."""
    if row.guessed is None:
        return "-"
    loads = (row.guessed.loads - row.guessed.used) / max(row.tokens, 1)
    if row.bytes_per_token is None:
        return f"{loads:.2f}"
    return f"{loads:.2f} ({format_bytes(row.guessed.wasted_bytes / max(row.tokens, 1))})"


def _of_guesses(value: Callable[["Guessed"], str]) -> Callable[["Replayed"], str]:
    return lambda row: "-" if row.guessed is None else value(row.guessed)


_COLUMNS: Final[Mapping[str, Callable[["Replayed"], str]]] = {
    "slots": lambda row: str(row.slots),
    "eviction": lambda row: row.eviction,
    "routing": lambda row: row.routing,
    "prefetch": lambda row: row.prefetch,
    "hit rate": lambda row: format_share(row.hit_rate),
    "of Belady": _of_belady,
    "loads/token": lambda row: f"{row.loads_per_token:.2f}",
    "bytes/token": lambda row: "-" if row.bytes_per_token is None else format_bytes(row.bytes_per_token),
    "recall": _of_guesses(lambda guessed: format_share(guessed.recall)),
    "precision": _of_guesses(lambda guessed: format_share(guessed.precision)),
    "ahead/token": lambda row: "-" if row.guessed is None else f"{row.guessed.loads / max(row.tokens, 1):.2f}",
    "wasted/token": _wasted,
    "reload/token": lambda row: "-" if row.reload_s is None else format_seconds(row.reload_s),
    "waits": lambda row: format_share(row.waits),
    "mass lost": lambda row: format_share(row.lost_mass),
}
_TEXT: Final = {"eviction", "routing", "prefetch"}
_ALWAYS: Final = _COLUMNS.keys() - {"prefetch", "recall", "precision", "ahead/token", "wasted/token", "reload/token"}


def draw(plot: Path, recording: "Recording", results: list["Replayed"], *, per_layer: bool) -> None:
    """Draw hit rates by capacity, a line per policy."""
    from runtime.replay_chart import hit_rate_svg
    from schemas.files import write_atomic

    total = recording.experts if per_layer else recording.num_experts
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(results, key=lambda row: row.slots):
        other = [each for each in (row.routing, row.prefetch) if each not in {"exact", "none"}]
        curves.setdefault(", ".join([row.eviction, *other]), []).append((row.slots / total, row.hit_rate))
    write_atomic(plot, hit_rate_svg(curves, title=f"{recording.name}: hit rate by capacity"))
