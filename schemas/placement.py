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
    """Of the calls that `ingress` makes for an expert, `share` go to `holder`. Local replicas need no route."""

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
