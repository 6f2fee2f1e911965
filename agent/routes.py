"""From an epoch's assignment to whom is called for what, now and if that fails.

Decides nothing that the assignment does not say. Pure; must not know sockets.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from runtime.routing import LOCAL, Routing
from schemas.messages import Assignment
from schemas.placement import Route


@dataclass(frozen=True)
class EpochRoutes:
    """One epoch as an ingress sees it.

    Attributes
    ----------
    routing
        What the dispatcher uses: the first choice, in turn where a plan splits calls.
    holders
        All other nodes that hold (layer, expert), best first.
    local
        Experts held here: what to fall back on, even where another node is asked first.
    """

    routing: Routing
    holders: Mapping[tuple[int, int], tuple[str, ...]]
    local: frozenset[tuple[int, int]]

    @property
    def epoch(self) -> int:
        """The epoch."""
        return self.routing.epoch


AtHand = Mapping[int, Collection[int]]
"""Of each layer that a node runs, the experts that it need not ask others for."""


def at_hand(assignment: Assignment, routing: Routing, layers: Iterable[int]) -> AtHand:
    """Return what is at hand without a wait in some layers of a node under its assignment.

    What is called although it is here too, because a plan says so, is not at hand, nor is what is on disk alone.
    """
    held = {(r.record.layer, r.record.expert) for r in assignment.replicas if r.tier != "disk"}
    called = (routing.tables != LOCAL).any(axis=0)
    experts = range(called.shape[1])
    return {layer: [each for each in experts if (layer, each) in held and not called[layer, each]] for layer in layers}


def epoch_routes(assignment: Assignment, node: str, *, layers: int, experts: int) -> EpochRoutes:
    """Return the routes of `node` under its assignment."""
    local = frozenset((r.record.layer, r.record.expert) for r in assignment.replicas)
    routes = []
    for hop in assignment.routing:
        shares = hop.shares or (1.0,)
        routes += [
            Route(ingress=node, layer=hop.layer, expert=hop.expert, holder=holder, share=share)
            for holder, share in zip(hop.holders, shares, strict=False)
        ]
    others = {(hop.layer, hop.expert): tuple(h for h in hop.holders if h != node) for hop in assignment.routing}
    routing = Routing.build(assignment.epoch, layers=layers, experts=experts, local=local, routes=routes, others=others)
    return EpochRoutes(routing, others, local)
