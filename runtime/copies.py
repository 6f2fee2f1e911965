"""An expert in memory, and what it is called: a copy of (layer, expert), perhaps in a low precision, in a tier's slot.

Decides nothing. Must not know who keeps which copy.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from runtime.timeline import Recorder
from schemas.precision import LOW_PRECISIONS, LowPrecision
from schemas.topology import Tier

if TYPE_CHECKING:
    from runtime.cuda.copies import Launch

Key = tuple[int, int]
CopyKey = tuple[int, int] | tuple[int, int, LowPrecision]
"""(layer, expert), of a copy in low precision with that."""
Place = tuple[CopyKey, Tier]

MEMORY: Final[tuple[Tier, ...]] = ("device", "host")


def copy_keys(key: Key) -> list[CopyKey]:
    """Return the names of all copies that there may be of an expert, the best first."""
    return [key, *((*key, precision) for precision in LOW_PRECISIONS)]


@dataclass(slots=True, eq=False)
class Copy:
    """An expert in memory. `users` borrow it; one dropped while borrowed is freed when the last user is done.

    Attributes
    ----------
    is_assigned
        It was put here, and is not merely cached.
    is_ready
        It is filled.
    is_guess
        It was loaded ahead, and its layer has not run yet.
    is_guest
        The plan gave it to other nodes; it makes room for all others.
    found
        Where its record came from.
    error
        Why it could not be filled.
    recorder
        Takes the span of its load, for whoever began it.
    launch
        Of a load that the device makes, until whoever uses the copy comes behind it.
    """

    key: CopyKey
    tier: Tier
    slot: int
    is_assigned: bool = False
    is_ready: bool = False
    is_dropped: bool = False
    is_guess: bool = False
    is_guest: bool = False
    users: int = 0
    found: Tier = "disk"
    error: Exception | None = None
    recorder: Recorder | None = None
    launch: "Launch | None" = None
