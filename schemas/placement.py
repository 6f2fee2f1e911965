"""Which node holds which expert in which tier: a placement as sorted records.

Decides the order of records and what two placements differ in. Must not know why a replica is where it is.
"""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from schemas.base import FrozenModel
from schemas.topology import NodeId, Tier


class Replica(FrozenModel):
    """A copy of expert (layer, expert) on `node`, kept in `tier`."""

    layer: Annotated[int, Field(ge=0)]
    expert: Annotated[int, Field(ge=0)]
    node: NodeId
    tier: Tier = "device"

    @property
    def key(self) -> tuple[int, int]:
        """(layer, expert)."""
        return self.layer, self.expert


class Route(FrozenModel):
    """Of the rows that `ingress` has for an expert, `share` are computed by `holder`.

    Routes say it all for their expert: where there is one, a replica that the ingress holds itself is used only as
    far as a route names the ingress as holder (its disk may be slower than a call), and when no other holder answers.
    Without a route the ingress uses its own replica, or else the holder with the fastest tier.
    """

    ingress: NodeId
    layer: Annotated[int, Field(ge=0)]
    expert: Annotated[int, Field(ge=0)]
    holder: NodeId
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


def sorted_replicas(replicas: Iterable[Replica]) -> tuple[Replica, ...]:
    """Return replicas in the order of files: layer, expert, node."""
    return tuple(sorted(replicas, key=lambda r: (r.layer, r.expert, r.node)))


def sorted_routes(routes: Iterable[Route]) -> tuple[Route, ...]:
    """Return routes in the order of files: ingress, layer, expert, holder."""
    return tuple(sorted(routes, key=lambda r: (r.ingress, r.layer, r.expert, r.holder)))
