"""A plan as one HTML file: its summary, the ways of tokens as a picture and in figures, nodes, layers and experts.

Decides what is on the page and in which order; figures and words are those of `report` and `journey_report`. The file
needs nothing else: no script, no font, no address.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

from planner.journey import legs_of
from planner.journey_report import layers_text, path_lines
from planner.picture import paths_svg
from planner.report import plan_lines, reason_lines, share_text
from schemas.plan import PathSummary, Plan
from schemas.units import format_bytes, format_seconds

_STYLE: Final = """
:root { color-scheme: light dark; }
body { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; margin: 2rem auto; max-width: 64rem;
       padding: 0 1rem; line-height: 1.45; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 1.5rem; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8883; }
th:first-child, td:first-child { text-align: left; }
h2 { font-size: 1.1rem; margin-top: 2rem; } p { margin: .2rem 0; } figure { margin: 1rem 0; overflow-x: auto; }
"""


def plan_page(plan: Plan) -> str:
    """Return the page of a plan."""
    paths = plan.summary.paths or ()
    body = [f"<h1>{escape(plan.cluster)}: epoch {plan.epoch}</h1>", *_paragraphs(plan_lines(plan))]
    if paths:
        body += [
            "<h2>The way of a token</h2>",
            f"<figure>{paths_svg(paths)}</figure>",
            *_paragraphs(path_lines(paths, why=True)),
        ]
        body += _table(("tokens of", "layers", "run on", "compute", "waits", "hop onward"), _leg_rows(paths))
    body += ["<h2>Nodes</h2>", *_table(_NODE_HEADINGS, _node_rows(plan)), *_paragraphs(reason_lines(plan))]
    if paths:
        body += ["<h2>Layer by layer</h2>", *_table(*_layers(paths))]
    title = escape(f"{plan.cluster}, epoch {plan.epoch}")
    return "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        *body,
        "</body></html>",
        "",
    ])  # fmt: skip


_NODE_HEADINGS: Final = (
    "node",
    "experts",
    "bytes",
    "room",
    "trunk",
    "KV cache",
    "compute",
    "remote calls",
    "per token",
)


def _node_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    for node in plan.summary.nodes:
        sizes = (node.bytes, node.capacity, node.trunk_bytes, node.kv_bytes)
        latency = node.predicted_latency_s
        yield (
            node.id,
            str(node.experts),
            *map(format_bytes, sizes),
            share_text(node.utilisation),
            share_text(node.remote_call_share),
            "-" if latency is None else format_seconds(latency),
        )


def _leg_rows(paths: Sequence[PathSummary]) -> Iterator[tuple[str, ...]]:
    for path in paths:
        for leg in legs_of(path):
            times = (leg.compute_s, leg.wait_s, leg.hop_s)
            yield path.ingress, layers_text(leg), leg.node, *map(format_seconds, times)


def _layers(paths: Sequence[PathSummary]) -> tuple[tuple[str, ...], Iterator[tuple[str, ...]]]:
    """Return headings and one row per decoder layer: for each ingress the node, and its seconds there and onward."""
    headings = ("layer", *(heading for path in paths for heading in (path.ingress, "compute", "wait", "hop")))

    def rows() -> Iterator[tuple[str, ...]]:
        for costs in zip(*(path.layers for path in paths), strict=True):
            yield (
                str(costs[0].layer),
                *(
                    cell
                    for cost in costs
                    for cell in (cost.node, *(_time(seconds) for seconds in (cost.compute_s, cost.wait_s, cost.hop_s)))
                ),
            )

    return headings, rows()


def _time(seconds: float) -> str:
    return format_seconds(seconds) if seconds else ""


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield f"<p>{escape(line)}</p>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"<table><tr>{''.join(f'<th>{escape(heading)}</th>' for heading in headings)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
    yield "</table>"
