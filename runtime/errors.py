"""Everything that can go wrong while tokens are executed, one class per kind, with what it is about as attributes.

Decides the exit code of each kind. Must not know who reports it.
"""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from schemas.outcome import ExitCode
from schemas.units import format_bytes


class RuntimeFault(Exception):
    """Base of all domain errors of the runtime; `exit_code` is what a command ends with."""

    exit_code = ExitCode.FAILED


class InvalidInput(RuntimeFault):
    """A file or argument that cannot be used as it is."""

    exit_code = ExitCode.INVALID


class InvalidStore(InvalidInput):
    """A directory that is not a store, or one whose records do not match its manifest."""


class DiskFull(RuntimeFault):
    """A file that does not fit on its disk."""

    def __init__(self, path: Path, *, needed: int, free: int) -> None:
        self.path, self.needed, self.free = path, needed, free
        super().__init__(
            f"{path}: no room on the disk: {format_bytes(needed)} needed, {format_bytes(free)} free; "
            "nothing was written; free some space or choose another place"
        )


@contextmanager
def writing(path: Path, *, needed: int) -> Iterator[None]:
    """Turn an OSError met while `path` is written (`needed` bytes) into `DiskFull` or `InvalidInput`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path, needed=needed, free=shutil.disk_usage(path.parent).free) from error
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error


class OverBudget(RuntimeFault):
    """A replica that does not fit into the bytes a tier may use."""

    def __init__(self, tier: str, *, needed: int, used: int, budget: int) -> None:
        self.tier, self.needed, self.used, self.budget = tier, needed, used, budget
        super().__init__(
            f"{tier} tier: {format_bytes(needed)} more would exceed its budget of {format_bytes(budget)}, "
            f"of which {format_bytes(used)} are used; drop replicas first or raise the budget"
        )


class ExpertUnavailable(RuntimeFault):
    """An expert that was asked of this node, or of nobody, and is not held where it was looked for."""

    def __init__(self, layer: int, expert: int, where: str) -> None:
        self.layer, self.expert = layer, expert
        super().__init__(f"layer {layer} expert {expert} is not held by {where}; apply a plan that places it")


class DamagedRecord(RuntimeFault):
    """A record that is not what its sha256 says, or cannot be read."""

    def __init__(self, where: Path | str, reason: str) -> None:
        self.where = where
        super().__init__(f"{where}: a record of an expert cannot be used: {reason}")


class ExpertLost(RuntimeFault):
    """An expert of this node whose record is damaged wherever it was looked for."""

    def __init__(self, layer: int, expert: int, reasons: Sequence[str]) -> None:
        self.layer, self.expert, self.reasons = layer, expert, tuple(reasons)
        super().__init__(
            f"layer {layer} expert {expert}: no intact record is left: {'; '.join(reasons)}; make the store again "
            "with agent prepare, or in a cluster apply the plan again, which fetches it anew"
        )


class BudgetTooSmall(RuntimeFault):
    """A budget of memory in which a node cannot work; says how much it needs."""

    exit_code = ExitCode.INFEASIBLE

    def __init__(self, tier: str, *, budget: int, needed: int, why: str) -> None:
        self.tier, self.budget, self.needed = tier, budget, needed
        super().__init__(
            f"{tier} budget of {format_bytes(budget)} is too small: at least {format_bytes(needed)} "
            f"({needed} bytes) are needed: {why}"
        )


class CallFailed(RuntimeFault):
    """An expert call without an answer. The agent's port raises this or a subclass."""

    def __init__(self, layer: int, experts: tuple[int, ...], holder: str, reason: str) -> None:
        self.layer, self.experts, self.holder = layer, experts, holder
        shown = ", ".join(str(expert) for expert in experts)
        super().__init__(f"layer {layer} expert {shown}: no answer from {holder}: {reason}")


class DeviceLost(RuntimeFault):
    """A device that does not answer, or cannot be used any more."""


class ContextFull(RuntimeFault):
    """A session that would grow beyond the tokens it was opened for, or beyond what the model can attend to."""

    exit_code = ExitCode.INVALID

    def __init__(self, *, wanted: int, limit: int, what: str) -> None:
        self.wanted, self.limit = wanted, limit
        super().__init__(f"{wanted} tokens exceed {what} of {limit}; shorten the prompt or ask for fewer tokens")


class KvBudgetExceeded(RuntimeFault):
    """A session whose KV cache does not fit beside those that are open."""

    def __init__(self, *, needed: int, used: int, budget: int, sessions: int) -> None:
        self.needed, self.used, self.budget, self.sessions = needed, used, budget, sessions
        super().__init__(
            f"KV cache: {format_bytes(needed)} more would exceed the budget of {format_bytes(budget)}, of which "
            f"{sessions} open sessions use {format_bytes(used)}; wait for one to end or plan for more context"
        )


class UnknownSession(RuntimeFault):
    """A session that was never opened, or was closed."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(f"there is no open session {session_id!r}; open it first")


class StepAbandoned(RuntimeFault):
    """A step that was to follow one that failed."""

    def __init__(self) -> None:
        super().__init__("an earlier step of this session failed; close it and open it again")
