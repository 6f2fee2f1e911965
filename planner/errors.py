"""What can go wrong while planning, as errors that carry data and the exit code they end a command with.

Decides nothing else; every error's message says what, which, limit against value, and the next step.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from schemas.outcome import ExitCode


class PlannerError(Exception):
    """Base of the planner's own errors."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


@dataclass(frozen=True)
class Violation:
    """One constraint that is not kept: which, where, its limit against the value, and what would fix it.

    Attributes
    ----------
    constraint
        coverage, assignment, one-tier, memory, load, link, replicas, pin, ban, trunk or quality.
    subject
        What breaks it: a node, place, link or expert, as a reader names it.
    value, limit
        In `unit`; `value` is on the wrong side of `limit`.
    message
        The whole sentence.
    """

    constraint: str
    subject: str
    value: float
    limit: float
    unit: str
    message: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return asdict(self)


class InfeasibleProblem(PlannerError):
    """No placement keeps every constraint; `violations` say which are in the way."""

    exit_code = ExitCode.INFEASIBLE

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("\n".join(f"infeasible: {violation.message}" for violation in self.violations))


class UnfitPrecision(PlannerError):
    """Experts of the model cannot be held in a precision that was asked for."""

    exit_code = ExitCode.INVALID


class NoPlacementFound(PlannerError):
    """A solver ended without a placement and without proof that there is none."""


class GapNotReached(PlannerError):
    """A gap was asked for and not reached in the time; the best placement is known all the same."""

    def __init__(self, asked: float, reached: float | None, seconds: float) -> None:
        self.asked, self.reached = asked, reached
        have = "no bound" if reached is None else f"a gap of {reached:.2g}"
        super().__init__(
            f"{have} after {seconds:.1f} s, not the {asked:.2g} that was asked for; the plan has the best placement "
            "found: raise --time-limit or --gap"
        )


class BrokenPlacement(PlannerError):
    """A solver or strategy returned a placement that breaks constraints; `violations` say which."""

    def __init__(self, solver: str, violations: Iterable[Violation]) -> None:
        self.solver, self.violations = solver, tuple(violations)
        told = "; ".join(violation.message for violation in self.violations)
        super().__init__(f"{solver} breaks constraints that it does not know: {told}. Use --solver milp or cpsat")


class UnsafePlan(PlannerError):
    """No order of steps reaches the target within memory while keeping every expert."""

    exit_code = ExitCode.REFUSED

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("\n".join(self.reasons))
