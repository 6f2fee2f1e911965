"""What can go wrong in an agent or between a client and an agent, with the exit code it ends in."""

from runtime.errors import CallFailed
from schemas.outcome import ExitCode


class AgentError(Exception):
    """Base of the agent's own failures; the message is meant for people."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, exit_code: ExitCode | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class CannotBind(AgentError):
    """A port is taken, or an address may not be bound."""

    exit_code = ExitCode.INVALID


class CoordinatorAbsent(AgentError):
    """Nobody answers at the coordinator's address."""

    exit_code = ExitCode.INVALID


class Refused(AgentError):
    """The coordinator or another agent refused; carries the exit code it gave."""


class JournalUnusable(AgentError):
    """The data directory cannot be used, or is another node's."""

    exit_code = ExitCode.INVALID


class JournalUnwritable(AgentError):
    """The journal took nothing more; without it the agent decides nothing."""


class DataUnusable(AgentError):
    """The data directory's records cannot be read or removed."""

    exit_code = ExitCode.INVALID


class ThreadLost(AgentError):
    """A thread of the agent ended by itself; the whole agent ends, and starts again from its journal."""


class NoActivePlan(AgentError):
    """Tokens were asked for before a plan was applied."""


class CannotPrepare(AgentError):
    """An epoch cannot be prepared here; told to the coordinator, which aborts it."""


class RecordUnavailable(CannotPrepare):
    """No source gave a record's bytes."""


class HolderUnreachable(CallFailed):
    """A holder, and every other replica's holder, did not answer in time."""


class RequestCancelled(AgentError):
    """The client cancelled its request, or was lost."""
