"""What several nodes noted of one request, on one clock.

Decides how much each node's clock is ahead of the ingress's, from what was sent and heard alone: nothing arrives before
it was sent, so every message bounds the difference of two clocks; paths of messages bound it between any two nodes,
and a path there and one back bound it from both sides. The middle is taken; half the distance is what is not known.
Pure. Must not know how spans were noted.

    aheadᵦ − aheadₐ ≤ heardᵦ − sentₐ        for every message from a to b, each by its own clock
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.timeline import Process, Span
from schemas.tracing import TracePart

Message = tuple[str, str, str]
"""From whom, to whom, and what."""


@dataclass(frozen=True)
class Clock:
    """How far a clock is ahead of the first node's, s, give or take `error_s`; None where nothing bounds it."""

    ahead_s: float
    error_s: float | None


def clocks(nodes: Sequence[str], sent: Mapping[Message, float], heard: Mapping[Message, float]) -> dict[str, Clock]:
    """Return each node's clock against that of the first one."""
    most = {(a, b): 0.0 if a == b else math.inf for a in nodes for b in nodes}  # by which b's is ahead of a's
    for message, at in heard.items():
        if message in sent:
            pair = message[:2]
            most[pair] = min(most[pair], at - sent[message])
    for via in nodes:
        for a in nodes:
            for b in nodes:
                most[a, b] = min(most[a, b], most[a, via] + most[via, b])
    return {node: _between(-most[node, nodes[0]], most[nodes[0], node]) for node in nodes}


def _between(least: float, most: float) -> Clock:
    if math.isfinite(least) and math.isfinite(most):
        return Clock((least + most) / 2, max(0.0, (most - least) / 2))
    known = least if math.isfinite(least) else most
    return Clock(known if math.isfinite(known) else 0.0, None)


def processes(parts: Sequence[TracePart], ingress: str) -> list[Process]:
    """Return one process for each node that told something, the ingress first, with hops as spans of who heard them."""
    nodes = sorted({part.node for part in parts if not part.is_silent}, key=lambda node: (node != ingress, node))
    sent, heard = _messages(parts, is_sent=True), _messages(parts, is_sent=False)
    known = {name: at for name, at in heard.items() if name in sent and {*name[:2]} <= set(nodes)}
    by_node = clocks(nodes, sent, known) if nodes else {}
    return [
        Process(
            _label(node, clock, is_first=node == nodes[0]),
            [*_spans(parts, node), *_hops(by_node, node, sent, known)],
            clock.ahead_s,
        )
        for node, clock in by_node.items()
    ]


def _messages(parts: Iterable[TracePart], *, is_sent: bool) -> dict[Message, float]:
    """Return when messages were sent, or heard, first: what is repeated may have been lost."""
    found: dict[Message, float] = {}
    for part in parts:
        for other, what, at, was_sent in part.hops:
            if was_sent == is_sent:
                ends = (part.node, other) if is_sent else (other, part.node)
                name = (*ends, f"{part.session}/{what}")
                found[name] = min(found.get(name, math.inf), at)
    return found


def _spans(parts: Iterable[TracePart], node: str) -> list[Span]:
    return [Span(*span) for part in parts if part.node == node for span in part.spans]


def _hops(
    by_node: Mapping[str, Clock], node: str, sent: Mapping[Message, float], heard: Mapping[Message, float]
) -> list[Span]:
    """Return what came to a node as spans on its own clock."""
    spans = []
    for message, at in heard.items():
        begin, end, what = message
        if end == node:
            left = sent[message] - by_node[begin].ahead_s + by_node[node].ahead_s
            spans.append(Span("hops", f"from {begin}: {what.partition('/')[2]}", min(left, at), at, {}))
    return spans


def _label(node: str, clock: Clock, *, is_first: bool) -> str:
    if is_first:
        return node
    return f"{node} (clock ± {1e3 * clock.error_s:.2f} ms)" if clock.error_s is not None else f"{node} (clock unsure)"
