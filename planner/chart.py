"""A comparison of strategies as a picture: one SVG file with a row per strategy and a column of bars per figure.

Decides layout and colours only; rows are those of `compare`. Hand-written SVG, so that a picture needs no library; it
has no background and follows the reader's light or dark colours.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

from schemas.units import format_bytes, format_seconds, format_share

_LABEL_WIDTH: Final = 260
_COLUMN_WIDTH: Final = 190
_BAR_WIDTH: Final = 110  # the rest of a column is for its value
_ROW_HEIGHT: Final = 46
_BAR_HEIGHT: Final = 16
_TOP: Final = 64
_MARGIN: Final = 12
_NOTE_CHARACTERS: Final = 48

_STYLE: Final = """
text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f; }
.title { font-size: 15px; font-weight: 600; } .head { font-size: 12px; font-weight: 600; }
.name { font-size: 13px; } .value { font-size: 12px; } .note { font-size: 10px; opacity: .7; }
.bar { fill: #8c959f; } .best { fill: #2f81f7; } .rule { stroke: #8c959f; stroke-opacity: .4; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .bar { fill: #6e7681; } }
"""


@dataclass(frozen=True)
class Column:
    """One figure: its key in a row, its heading, how values are written. Less is better in all of them."""

    key: str
    heading: str
    written: Callable[[float], str]


COLUMNS: Final = (
    Column("any_remote_share", "token-layers that wait", format_share),
    Column("predicted_latency_s", "time per token", format_seconds),
    Column("bytes_per_token", "bytes per token", format_bytes),
)


def comparison_svg(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    notes: Mapping[str, str] | None = None,
    columns: Sequence[Column] = COLUMNS,
) -> str:
    """Draw rows of a comparison.

    Parameters
    ----------
    rows
        With `strategy` and the columns' keys; None where a strategy found nothing.
    notes
        A line about a strategy, written small under its name.
    """
    width, height = _LABEL_WIDTH + _COLUMN_WIDTH * len(columns), _TOP + _ROW_HEIGHT * len(rows) + 12
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="-{_MARGIN} 0 {width + _MARGIN} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        _text(0, 20, "title", title),
        f'<line class="rule" x1="0" x2="{width}" y1="{_TOP - 8}" y2="{_TOP - 8}"/>',
    ]
    for number, row in enumerate(rows):
        body.extend(
            _label(str(row["strategy"]), (notes or {}).get(str(row["strategy"]), ""), _TOP + number * _ROW_HEIGHT)
        )
    for number, column in enumerate(columns):
        body.extend(_bars(rows, column, _LABEL_WIDTH + number * _COLUMN_WIDTH))
    return "\n".join([*body, "</svg>", ""])


def _label(name: str, note: str, top: int) -> Iterator[str]:
    yield _text(0, top + 13, "name", name)
    for number, line in enumerate(textwrap.wrap(note, _NOTE_CHARACTERS, max_lines=2, placeholder=" …")):
        yield _text(0, top + 26 + 11 * number, "note", line)


def _bars(rows: Sequence[Mapping[str, Any]], column: Column, left: int) -> Iterator[str]:
    yield _text(left, _TOP - 16, "head", column.heading)
    values = [row[column.key] for row in rows]
    known = [value for value in values if value is not None]
    highest, lowest = max(known, default=0.0), min(known, default=0.0)
    for number, value in enumerate(values):
        top = _TOP + number * _ROW_HEIGHT
        if value is None:
            yield _text(left, top + 13, "value", "–")
            continue
        length = _BAR_WIDTH * value / highest if highest else 0.0
        kind = "bar best" if value == lowest else "bar"
        yield f'<rect class="{kind}" x="{left}" y="{top}" width="{length:.1f}" height="{_BAR_HEIGHT}" rx="2"/>'
        yield _text(left + length + 6, top + 13, "value", column.written(value))


def _text(x: float, y: float, kind: str, content: str) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{escape(content)}</text>'
