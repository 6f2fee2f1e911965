"""What one node noted of one request: spans, and what it sent and heard, by its own clock.

Decides how that travels: in parts of bounded size. Must not know what spans mean, nor how clocks are compared.
"""

from typing import Annotated, Final

from pydantic import Field

from schemas.base import FrozenModel
from schemas.topology import NodeId

MOST: Final = 8192  # spans, and hops, of one node and session; later ones are counted only

Label = Annotated[str, Field(max_length=120)]
SpanRecord = tuple[Label, Label, float, float, dict[Label, float]]
"""Track, name, began, ended (s by the node's own clock), figures about it."""
HopRecord = tuple[NodeId, Label, float, bool]
"""The other node, what was sent, when (s by this node's clock), and whether it was sent, rather than heard, here."""


class TracePart(FrozenModel):
    """A part of what a node noted of a session.

    Attributes
    ----------
    missed
        Spans and hops beyond what is kept.
    is_last
        Nothing of this node and session follows.
    is_silent
        The node did not tell anything in time; made by the ingress.
    """

    node: NodeId
    session: str
    spans: Annotated[tuple[SpanRecord, ...], Field(max_length=MOST)] = ()
    hops: Annotated[tuple[HopRecord, ...], Field(max_length=MOST)] = ()
    missed: Annotated[int, Field(ge=0)] = 0
    is_last: bool = False
    is_silent: bool = False
