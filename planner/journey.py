"""A token's way as a reader follows it: one leg for each node that it visits, from the layers that a plan tells of.

Decides where a leg ends and what of it is compute, wait and hop. Must not know how legs are shown.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

from schemas.plan import PathSummary


class Leg(NamedTuple):
    """Layers that one node runs one after the other, and the hop from there to the node of the next leg.

    `onward` is the node of the next leg, after the last that of the first; the same node where the token stays.
    """

    node: str
    first_layer: int
    last_layer: int
    compute_s: float
    wait_s: float
    hop_s: float
    calls: float
    onward: str

    @property
    def total_s(self) -> float:
        """All together."""
        return self.compute_s + self.wait_s + self.hop_s

    @property
    def hops(self) -> bool:
        """Whether the token leaves the node."""
        return self.onward != self.node


class Promise(NamedTuple):
    """What a plan expects of a token that runs through a node's layers: hops onward, calls, seconds waited for them."""

    hops: float
    calls: float
    wait_s: float


def legs_of(path: PathSummary) -> tuple[Leg, ...]:
    """Return the legs of a path in order."""
    runs = [list(layers) for _, layers in groupby(path.layers, key=lambda layer: layer.node)]
    following = [*runs[1:], *runs[:1]]
    return tuple(
        Leg(
            node=layers[0].node,
            first_layer=layers[0].layer,
            last_layer=layers[-1].layer,
            compute_s=sum(layer.compute_s for layer in layers),
            wait_s=sum(layer.wait_s for layer in layers),
            hop_s=sum(layer.hop_s for layer in layers),
            calls=sum(layer.calls for layer in layers),
            onward=after[0].node,
        )
        for layers, after in zip(runs, following, strict=True)
    )


def promises(paths: Iterable[PathSummary], tokens: Mapping[str, float]) -> dict[str, Promise]:
    """Return what each node on a path may expect, per token and leg.

    Parameters
    ----------
    tokens
        That entered at each ingress, the weight of its path; where none is known of any, all weigh the same.
    """
    paths = tuple(paths)
    known = any(tokens.get(path.ingress, 0) > 0 for path in paths)
    weight: dict[str, float] = {}
    sums: dict[str, tuple[float, float, float]] = {}
    for path in paths:
        entered = tokens.get(path.ingress, 0) if known else 1.0
        for leg in legs_of(path):
            weight[leg.node] = weight.get(leg.node, 0.0) + entered
            hops, calls, wait_s = sums.get(leg.node, (0.0, 0.0, 0.0))
            sums[leg.node] = hops + entered * leg.hops, calls + entered * leg.calls, wait_s + entered * leg.wait_s
    return {node: Promise(*(value / total for value in sums[node])) for node, total in weight.items() if total}
