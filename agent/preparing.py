"""Getting what an epoch gives: replicas and parts of the trunk, from here or from peers; then the layer ranges.

Decides the order: head-room first, then local copies, then peers. Runs in a thread of its own, so that tokens flow
meanwhile; tells how it ended as an event of the machine. Must not know what comes before or after preparing.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

from agent.budget import wanted_parts, wanted_replicas
from agent.errors import AgentError, CannotPrepare, RecordUnavailable
from agent.holdings import Holdings
from agent.layers import Layers
from agent.machine import NotObtained, Obtain, Obtained
from agent.transfer import Puller, Wanted
from agent.transport import Context
from runtime.errors import DiskFull, OverBudget, RuntimeFault
from runtime.trunk import PartKey
from schemas.checkpoint import InvalidCheckpoint
from schemas.messages import AssignedReplica, AssignedTrunkPart, Endpoints, Record
from schemas.outcome import ExitCode
from schemas.precision import PackedLayout
from schemas.store import RecordLayout, TrunkPart

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
        Layer ranges are being loaded.
    """

    def __init__(
        self,
        order: Obtain,
        holdings: Holdings,
        context: Context,
        *,
        endpoints: Callable[[str], Endpoints | None],
        layers: Layers,
        report: Callable[[tuple["Preparation", Obtained | NotObtained]], None],
        is_device_fault: Callable[[BaseException], bool] = lambda _: False,
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
        self._layers = layers
        self._parts: dict[PartKey, bytes] = {}
        self._report = report
        self._is_device_fault = is_device_fault
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
        """Obtain everything and report; not where the device fails meanwhile."""
        order = self.order
        if self._after is not None:
            self._after.join()  # one at a time; it was told to stop, but may be loading layers
            self._after = None
        if self.is_stopped:
            return
        try:
            self._obtain()
            outcome: Obtained | NotObtained = Obtained(order.epoch, order.plan)
        except (AgentError, RuntimeFault, InvalidCheckpoint, OSError) as error:
            if self._is_device_fault(error):
                return  # the processor takes over, and all of it is asked for again
            if not self.is_stopped:
                log.warning("epoch %d cannot be prepared: %s", order.epoch, error)
            outcome = NotObtained(order.epoch, order.plan, _exit_code(error), str(error))
        except Exception as error:
            if self._is_device_fault(error):
                return
            log.exception("epoch %d cannot be prepared", order.epoch)
            text = f"{type(error).__name__}: {error}; the agent's log has more"
            outcome = NotObtained(order.epoch, order.plan, ExitCode.FAILED, text)
        self._report((self, outcome))

    def _obtain(self) -> None:
        wanted = wanted_replicas(self.order.assignments)
        keys = self._layers.missing_parts(self.order.assignments)
        parts = {n: part for n, part in wanted_parts(self.order.assignments).items() if _key(part) in keys}
        residency = self._holdings.residency
        self._require_layout(residency.layout, residency.packed)
        missing = self._holdings.missing(wanted)
        self.to_move = sum(replica.brought.bytes for replica in missing) + sum(p.record.bytes for p in parts.values())
        self._holdings.require_room(wanted, missing)
        for attempt in range(ATTEMPTS):
            try:
                self._pull(self._find(self._holdings.missing(wanted)), self._find_parts(parts))
                break
            except RecordUnavailable as error:
                if attempt == ATTEMPTS - 1 or self._ended.wait(_PAUSE_S):
                    raise
                log.warning("%s; trying again", error)
        self._load()

    def _load(self) -> None:
        if self.is_stopped:
            return
        self.is_loading = True
        try:
            self._layers.load(self.order.assignments, self._parts)
        finally:
            self.is_loading = False
            self._parts = {}

    def _require_layout(self, ours: RecordLayout, packed: PackedLayout | None) -> None:
        for assignment in self.order.assignments:
            if assignment.layout not in {None, ours} or assignment.packed_layout not in {None, packed}:
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

    def _find_parts(self, parts: Mapping[str, AssignedTrunkPart]) -> list[AssignedTrunkPart]:
        """Take the trunk's parts that are here already; return those that are not."""
        absent = []
        for name, part in parts.items():
            if _key(part) in self._parts or self._ended.is_set():
                continue
            record = self._holdings.find_part(name)
            if record is None:
                absent.append(part)
            else:
                self._take_part(part, record)
        return absent

    def _pull(self, replicas: list[AssignedReplica], parts: list[AssignedTrunkPart]) -> None:
        """Pull what is absent from peers; equal records travel once."""
        by_name: dict[str, list[AssignedReplica | AssignedTrunkPart]] = {}
        everything: list[AssignedReplica | AssignedTrunkPart] = [*replicas, *parts]
        for each in everything:
            by_name.setdefault(_record(each).sha256, []).append(each)
        wanted = [Wanted(name, _record(each[0]).bytes, deque(each[0].sources)) for name, each in by_name.items()]
        puller = Puller(self._context, self._endpoints, stopped=self._ended.is_set)
        for record in puller.pull(wanted):
            for each in by_name[record.sha256]:
                if isinstance(each, AssignedReplica):
                    self._hold(each, record.data)
                else:
                    self._take_part(each, bytes(record.data))

    def _take_part(self, part: AssignedTrunkPart, record: bytes) -> None:
        """Take a verified part of the trunk, to be loaded when all are here."""
        with self._holding:
            if not self._ended.is_set():
                self._holdings.hold_part(part.record.sha256, record)
                self._parts[_key(part)] = record
                self.moved += len(record)

    def _hold(self, replica: AssignedReplica, record: bytes | bytearray | memoryview) -> None:
        with self._holding:
            if not self._ended.is_set():
                self._holdings.hold(replica, record)
                self.moved += replica.brought.bytes


def _record(each: AssignedReplica | AssignedTrunkPart) -> Record | TrunkPart:
    """Return what travels."""
    return each.brought if isinstance(each, AssignedReplica) else each.record


def _key(part: AssignedTrunkPart) -> PartKey:
    return part.record.part, part.record.layer


def _exit_code(error: Exception) -> ExitCode:
    if isinstance(error, DiskFull | OverBudget):
        return ExitCode.INFEASIBLE
    return ExitCode(getattr(error, "exit_code", ExitCode.FAILED))
