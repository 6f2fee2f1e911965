"""A token's way as a picture: one SVG bar per ingress, as long as a token takes, in pieces of compute, waits and hops.

Decides layout and colours only; the figures are those of the plan. Hand-written SVG, as in `chart`: no library, no
background, the reader's light or dark colours.
"""

from collections.abc import Iterator, Sequence
from typing import Final
from xml.sax.saxutils import escape

from planner.journey import Leg, legs_of
from planner.journey_report import layers_text
from schemas.plan import PathSummary
from schemas.units import format_seconds

_LABEL_WIDTH: Final = 150
_BAR_WIDTH: Final = 720  # of the slowest path
_ROW_HEIGHT: Final = 74
_BAR_HEIGHT: Final = 22
_TOP: Final = 40
_MARGIN: Final = 12
_HUES: Final = ("#2f81f7", "#3fb950", "#db6d28", "#a371f7", "#d29922", "#f778ba", "#39c5cf", "#8c959f")
_CHARACTER: Final = 6.2  # width of one at 11 px, to leave out what does not fit
_STYLE: Final = """
text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f; font-size: 11px; }
.head { font-size: 13px; font-weight: 600; } .dim { opacity: .7; }
.wait { fill: #cf222e; } .hop { stroke: #57606a; stroke-width: 2; fill: none; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .hop { stroke: #8b949e; } }
"""


def paths_svg(paths: Sequence[PathSummary]) -> str:
    """Draw the ways of all ingresses to one scale: a colour for each node, red for waits, a line for a hop."""
    legs = [legs_of(path) for path in paths]
    longest = max((sum(leg.total_s for leg in way) for way in legs), default=0.0)
    scale = _BAR_WIDTH / longest if longest else 0.0
    nodes = list(dict.fromkeys(leg.node for way in legs for leg in way))
    hues = {node: _HUES[number % len(_HUES)] for number, node in enumerate(nodes)}
    width, height = _LABEL_WIDTH + _BAR_WIDTH + 110, _TOP + _ROW_HEIGHT * len(paths)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="-{_MARGIN} 0 {width + _MARGIN} {height}" role="img">',
        "<title>The way of a token from each ingress</title>",
        f"<style>{_STYLE}</style>",
        *_legend(hues),
    ]
    for number, (path, way) in enumerate(zip(paths, legs, strict=True)):
        body.extend(_row(path.ingress, way, _TOP + number * _ROW_HEIGHT, scale, hues))
    return "\n".join([*body, "</svg>", ""])


def _legend(hues: dict[str, str]) -> Iterator[str]:
    left = 0.0
    for name, hue in [*hues.items(), ("waits for experts elsewhere", "#cf222e")]:
        yield f'<rect x="{left:.0f}" y="6" width="11" height="11" rx="2" fill="{hue}"/>'
        yield _text(left + 16, 15, "", name)
        left += 34 + _CHARACTER * len(name)


def _row(ingress: str, way: Sequence[Leg], top: int, scale: float, hues: dict[str, str]) -> Iterator[str]:
    yield _text(0, top + 16, "head", ingress)
    left = float(_LABEL_WIDTH)
    for leg in way:
        computing, waiting, hopping = (scale * seconds for seconds in (leg.compute_s, leg.wait_s, leg.hop_s))
        told = f"{leg.node}, layers {layers_text(leg)}: {format_seconds(leg.compute_s)} of compute"
        yield _bar(left, top, computing, told, f'fill="{hues[leg.node]}"')
        if waiting:
            told = f"{leg.node} waits {format_seconds(leg.wait_s)} for experts elsewhere"
            yield _bar(left + computing, top, waiting, told, 'class="wait"')
        yield from _under(leg, left, top, computing + waiting)
        left += computing + waiting
        if leg.hops:
            yield from _hop(leg, left, top, hopping)
            left += hopping
    yield _text(left + 8, top + 16, "", format_seconds(sum(leg.total_s for leg in way)))


def _bar(left: float, top: int, width: float, told: str, look: str) -> str:
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BAR_HEIGHT}" {look}>'
        f"<title>{escape(told)}</title></rect>"
    )


def _under(leg: Leg, left: float, top: int, width: float) -> Iterator[str]:
    for line, told in enumerate((f"{leg.node} {layers_text(leg)}", format_seconds(leg.compute_s + leg.wait_s))):
        if _CHARACTER * len(told) <= width:
            yield _text(left, top + _BAR_HEIGHT + 14 + 13 * line, "dim" if line else "", told)


def _hop(leg: Leg, left: float, top: int, width: float) -> Iterator[str]:
    middle, right = top + _BAR_HEIGHT / 2, left + width
    told = f"{leg.node} → {leg.onward}: {format_seconds(leg.hop_s)}"
    yield (
        f'<path class="hop" d="M {left:.1f} {middle} H {right:.1f} m -4 -4 l 4 4 l -4 4">'
        f"<title>{escape(told)}</title></path>"
    )
    if _CHARACTER * len(format_seconds(leg.hop_s)) <= width:
        yield _text(left + 3, middle - 6, "dim", format_seconds(leg.hop_s))


def _text(x: float, y: float, kind: str, content: str) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{escape(content)}</text>'
