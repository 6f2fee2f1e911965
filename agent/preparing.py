"""Getting an epoch's replicas: what is here, what peers have, and the trunk where tokens enter.

Decides the order: head-room first, then local copies, then peers. Runs in a thread of its own, so that tokens flow
meanwhile; tells how it ended as an event of the machine. Must not know what comes before or after preparing.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from agent.errors import AgentError, CannotPrepare, RecordUnavailable
from agent.holdings import Holdings
from agent.machine import NotObtained, Obtain, Obtained, wanted_replicas
from agent.transfer import Puller, Wanted
from agent.transport import Context
from runtime.errors import DiskFull, OverBudget, RuntimeFault
from schemas.checkpoint import InvalidCheckpoint
from schemas.messages import AssignedReplica, Endpoints
from schemas.outcome import ExitCode
from schemas.store import RecordLayout

log = logging.getLogger(__name__)

ATTEMPTS: Final = 3
_PAUSE_S: Final = 1.0


class Preparation(threading.Thread):
    """One `Obtain` under way.

    Attributes
    ----------
    moved, to_move
        Bytes obtained and verified, and all that were missing at the start.
    is_loading
        The trunk is being loaded.
    """

    def __init__(
        self,
        order: Obtain,
        holdings: Holdings,
        context: Context,
        *,
        endpoints: Callable[[str], Endpoints | None],
        load_trunk: Callable[[], None],
        report: Callable[[tuple["Preparation", Obtained | NotObtained]], None],
        after: "Preparation | None",
    ) -> None:
        super().__init__(name=f"prepare-{order.epoch}", daemon=True)
        self.order = order
        self.moved = 0
        self.to_move = 0
        self.is_loading = False
        self._holdings = holdings
        self._context = context
        self._endpoints = endpoints
        self._load_trunk = load_trunk
        self._report = report
        self._after = after
        self._ended = threading.Event()
        self._holding = threading.Lock()

    def stop(self) -> None:
        """Give up: from now on nothing is held or reported any more. Does not wait for the thread."""
        with self._holding:
            self._ended.set()

    @property
    def is_stopped(self) -> bool:
        """Whether it was given up: what it reports is of no interest any more."""
        return self._ended.is_set()

    def run(self) -> None:
        """Obtain everything and report."""
        order = self.order
        if self._after is not None:
            self._after.join()  # one at a time; it was told to stop, but may be loading a trunk
            self._after = None
        if self.is_stopped:
            return
        try:
            self._obtain()
            outcome: Obtained | NotObtained = Obtained(order.epoch, order.plan)
        except (AgentError, RuntimeFault, InvalidCheckpoint, OSError) as error:
            if not self.is_stopped:
                log.warning("epoch %d cannot be prepared: %s", order.epoch, error)
            outcome = NotObtained(order.epoch, order.plan, _exit_code(error), str(error))
        except Exception as error:
            log.exception("epoch %d cannot be prepared", order.epoch)
            text = f"{type(error).__name__}: {error}; the agent's log has more"
            outcome = NotObtained(order.epoch, order.plan, ExitCode.FAILED, text)
        self._report((self, outcome))

    def _obtain(self) -> None:
        wanted = wanted_replicas(self.order.assignments)
        self._require_layout(self._holdings.residency.layout)
        missing = self._holdings.missing(wanted)
        self.to_move = sum(replica.record.bytes for replica in missing)
        self._holdings.require_room(wanted, missing)
        if self.order.ingress and not self.is_stopped:
            self.is_loading = True
            try:
                self._load_trunk()
            finally:
                self.is_loading = False
        for attempt in range(ATTEMPTS):
            try:
                self._pull(self._find(self._holdings.missing(wanted)))
                return
            except RecordUnavailable as error:
                if attempt == ATTEMPTS - 1 or self._ended.wait(_PAUSE_S):
                    raise
                log.warning("%s; trying again", error)

    def _require_layout(self, ours: RecordLayout) -> None:
        for assignment in self.order.assignments:
            if assignment.layout not in {None, ours}:
                raise CannotPrepare(
                    "the store's records are laid out for another model or dtype than this agent's; make the store "
                    "again with agent prepare and the dtype of the agent's config",
                    ExitCode.INVALID,
                )

    def _find(self, missing: list[AssignedReplica]) -> list[AssignedReplica]:
        """Hold what is here already; return what is not."""
        absent = []
        for replica in missing:
            if self._ended.is_set():
                return []
            record = self._holdings.find(replica)
            if record is None:
                absent.append(replica)
            else:
                self._hold(replica, record)
        return absent

    def _pull(self, absent: list[AssignedReplica]) -> None:
        """Pull what is absent from peers; equal records travel once."""
        by_name: dict[str, list[AssignedReplica]] = {}
        for replica in absent:
            by_name.setdefault(replica.record.sha256, []).append(replica)
        wanted = [Wanted(name, each[0].record.bytes, deque(each[0].sources)) for name, each in by_name.items()]
        puller = Puller(self._context, self._endpoints, stopped=self._ended.is_set)
        for record in puller.pull(wanted):
            for replica in by_name[record.sha256]:
                self._hold(replica, record.data)

    def _hold(self, replica: AssignedReplica, record: bytes | bytearray | memoryview) -> None:
        with self._holding:
            if not self._ended.is_set():
                self._holdings.hold(replica, record)
                self.moved += replica.record.bytes


def _exit_code(error: Exception) -> ExitCode:
    if isinstance(error, DiskFull | OverBudget):
        return ExitCode.INFEASIBLE
    return ExitCode(getattr(error, "exit_code", ExitCode.FAILED))
