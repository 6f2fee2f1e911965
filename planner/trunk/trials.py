"""What was tried before a trunk was chosen, as a reader is told.

Must not know how a trial was made.
"""

from dataclasses import dataclass

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
