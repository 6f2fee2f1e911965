"""What was tried before a trunk was chosen, as a reader is told.

Must not know how a trial was made.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from planner.errors import InfeasibleProblem, PlannerError
from planner.problem import Floats

STAY = "stay"


@dataclass(frozen=True, eq=False)
class Trial:
    """One trunk that was tried with a placement of its own.

    Attributes
    ----------
    name
        ``stay``, ``pipeline``, ``pipeline-speed``, or how it began.
    latency_s
        Seconds of a token of each ingress, float64 ``[I]``; None where nothing fits.
    mean_s
        Mean over all tokens that enter; None where nothing fits.
    note
        Why nothing fits.
    """

    name: str
    latency_s: Floats | None = None
    mean_s: float | None = None
    note: str = ""


def why_nothing(failed: Mapping[str, PlannerError]) -> PlannerError:
    """Return why no trunk would do: of all that were tried, what misses least."""
    found = [error for error in failed.values() if isinstance(error, InfeasibleProblem)]
    if not found:
        return next(iter(failed.values()))
    return min(found, key=lambda error: sum(one.value - one.limit for one in error.violations))
