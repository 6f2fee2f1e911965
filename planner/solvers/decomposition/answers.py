"""What an oracle says about experts at given prices, and what an oracle is.

Decides the contract between prices and experts. Must not know how either side works.
"""

from dataclasses import dataclass
from typing import Protocol

from planner.solvers.decomposition.arrays import Bools, Floats, Ints, Places
from planner.solvers.decomposition.prices import Coupling


@dataclass(frozen=True)
class Answer:
    """Good holders at one price vector, and how good any could be.

    Parameters
    ----------
    lower
        `[K]`, no holders of the expert cost less, prices included, s; inf where none are allowed.
    held
        `[K, P]`, holders; the cheapest where the oracle enumerates.
    place
        `[I, K]`, holder that serves each ingress.
    """

    lower: Floats
    held: Bools
    place: Places


@dataclass(frozen=True)
class NearTies:
    """Holder sets whose cost comes near the best, in order of expert, cheapest first.

    Parameters
    ----------
    expert
        `[C]`, index.
    held
        `[C, P]`, holders.
    """

    expert: Ints
    held: Bools


class Oracle(Protocol):
    """Answers prices with holders and lower bounds."""

    coupling: Coupling
    rounding: float  # relative error that a set's cost may have against a bound
    lists_ties: bool  # whether `near_ties` lists anything

    @property
    def is_whole(self) -> bool:
        """Whether the lower bounds of `answer` hold over all holder sets; those of `certify` always do."""

    def answer(self, theta: Floats) -> Answer:
        """Answer quickly. Does not modify the oracle."""

    def certify(self, theta: Floats) -> Answer:
        """Answer with lower bounds that hold. May modify what `answer` looks at."""

    def near_ties(
        self, theta: Floats, answer: Answer, slack: float, *, most: int, over_all: bool = False
    ) -> NearTies | None:
        """Return the sets within `slack` (s) of the best; None where more than `most` are, or they cannot be listed."""
