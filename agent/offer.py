"""What a node offers to the sessions of others, and what went through it: values that threads hand to each other.

Decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.sessions import Range
from runtime.engine import Segment


@dataclass(frozen=True)
class Offer:
    """What this node runs now; replaced whole.

    Attributes
    ----------
    epoch
        That new steps use; 0 before the first plan.
    segments
        Loaded layer ranges.
    current
        Those that the active epoch gives.
    """

    epoch: int = 0
    segments: Mapping[Range, Segment] = field(default_factory=dict)
    current: frozenset[Range] = frozenset()


@dataclass
class Traffic:
    """Counted for heartbeats: tokens that entered here, and what left for the next node of a path."""

    entered: int = 0
    hops: int = 0
