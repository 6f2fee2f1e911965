"""What can go wrong between the command line and the coordinator, with the exit code it ends in."""

from planner.errors import PlannerError
from schemas.outcome import ExitCode


class ControlError(PlannerError):
    """Base of the control plane's failures; the message is meant for people."""

    def __init__(self, message: str, exit_code: ExitCode | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code  # type: ignore[misc]


class CoordinatorAbsent(ControlError):
    """Nobody answers at the coordinator's address."""

    exit_code = ExitCode.INVALID


class CannotBind(ControlError):
    """The coordinator's port is taken, or its address may not be bound."""

    exit_code = ExitCode.INVALID


class JournalUnusable(ControlError):
    """The journal cannot be opened, or is another cluster's."""

    exit_code = ExitCode.INVALID


class JournalUnwritable(ControlError):
    """The journal took nothing more; without it the coordinator decides nothing."""


class Refused(ControlError):
    """The coordinator refused a request; carries its exit code."""
