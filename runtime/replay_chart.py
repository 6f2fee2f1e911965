"""Hit rates by capacity as a picture: one SVG file with a line per policy.

Decides layout and colours only; the figures are those of `replay`. Hand-written SVG, so that a picture needs no
library; it has no background and follows the reader's light or dark colours.
"""

from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

Curve = Sequence[tuple[float, float]]
"""(share of experts that fit, hit rate), ascending."""

_WIDTH, _HEIGHT = 640, 360
_LEFT, _TOP, _RIGHT, _BOTTOM = 56, 44, 150, 44
_COLOURS: Final = ("#2f81f7", "#d29922", "#3fb950", "#f85149", "#a371f7", "#db61a2", "#8c959f")
_STYLE: Final = """
text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; font-size: 12px; fill: #24292f; }
.title { font-size: 15px; font-weight: 600; } .rule { stroke: #8c959f; stroke-opacity: .4; }
.curve { fill: none; stroke-width: 2; } .best { stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }
"""


def hit_rate_svg(curves: Mapping[str, Curve], *, title: str) -> str:
    """Draw a line per policy; one named ``belady`` is dashed, as what cannot be had."""
    highest = max(share for curve in curves.values() for share, _ in curve)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>',
    ]
    for tenth in range(0, 11, 2):
        y = _y(tenth / 10)
        body.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    for share in sorted({share for curve in curves.values() for share, _ in curve}):
        x, y = _x(share, highest), _HEIGHT - _BOTTOM + 18
        body.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{100 * share:.3g} %</text>')
    body.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">share of all experts that fit; hit rate of decoded tokens</text>')
    labels = _spread([_y(curve[-1][1]) for curve in curves.values()])
    for number, ((name, curve), label) in enumerate(zip(curves.items(), labels, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{_x(share, highest):.1f},{_y(rate):.1f}" for share, rate in curve)
        kind = "curve best" if name == "belady" else "curve"
        body.append(f'<polyline class="{kind}" stroke="{colour}" points="{points}"/>')
        x = _WIDTH - _RIGHT + 8
        body.append(f'<text x="{x}" y="{label + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return "\n".join([*body, "</svg>", ""])


def _x(share: float, highest: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share / max(highest, 1e-9)


def _y(rate: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - rate)


def _spread(wanted: list[float], gap: float = 15.0) -> list[float]:
    """Move labels down so that none covers another."""
    placed, lowest = dict[int, float](), -gap
    for index in sorted(range(len(wanted)), key=wanted.__getitem__):
        lowest = placed[index] = max(wanted[index], lowest + gap)
    return [placed[index] for index in range(len(wanted))]
