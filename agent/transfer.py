"""The weights plane: expert records travel as chunks, pulled by credit and named by their sha256.

Decides how much is asked for ahead, which source is tried next and when a source is given up; a record is delivered
only when its sha256 is right. Must not know what a record is for, nor where it is kept.

Flow: wanted records ──► up to `WINDOW` chunk requests under way per source ──► checksummed chunks in order ──► sha256
──► delivered. A source that stays silent, has not got the record or damages it is replaced by the next; what was
already verified is not asked for again.
"""

import hashlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import zmq

from agent.errors import RecordUnavailable
from agent.transport import Context, Socket, connect, make_socket
from schemas.messages import Endpoints, RemoteProtocolError
from schemas.wire import (
    CHUNK_BYTES,
    WINDOW,
    CallFault,
    Chunk,
    ChunkFault,
    ChunkRequest,
    pack_chunk,
    pack_chunk_fault,
    pack_chunk_request,
    parse_chunk,
    parse_chunk_request,
)

log = logging.getLogger(__name__)

SOURCE_SILENCE_S: Final = 5.0
_POLL_MS: Final = 100


class RecordReader(Protocol):
    """Something that has records."""

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Return bytes of a record, fewer at its end; raises KeyError where it is not held. Modifies nothing."""

    def size(self, sha256: str) -> int:
        """Return a record's bytes; raises KeyError where it is not held."""


@dataclass
class Wanted:
    """A record to get: what is here of it so far, and the sources left to try."""

    sha256: str
    size: int
    sources: deque[str]
    data: bytearray = field(default_factory=bytearray)
    asked: int = 0
    why: str = "no source was named"


class _Source:
    """One peer to pull from: its socket, the records it is pulled for and the requests under way, in order."""

    def __init__(self, name: str, socket: Socket, now: float) -> None:
        self.name = name
        self.socket = socket
        self.records: deque[Wanted] = deque()
        self.under_way: dict[int, tuple[Wanted, int]] = {}
        self.heard_at = now


class Puller:
    """Pulls records from peers. Belongs to the thread that makes it.

    Parameters
    ----------
    endpoints
        Where a node listens now; None while it is not known.
    stopped
        Whether to give up; asked several times a second.
    """

    def __init__(
        self,
        context: Context,
        endpoints: Callable[[str], Endpoints | None],
        *,
        stopped: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._endpoints = endpoints
        self._stopped = stopped
        self._clock = clock
        self._ids = itertools.count(1)
        self._sources: dict[str, _Source] = {}
        self._poller = zmq.Poller()

    def pull(self, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        """Yield every record when it is whole and verified.

        Raises
        ------
        RecordUnavailable
            A record has no source left; names it and what each source said last.
        """
        self._left = 0
        done: list[Wanted] = []
        for record in wanted:
            self._left += 1
            self._assign(record)
        try:
            while self._left and not self._stopped():
                self._ask()
                done += self._receive()
                self._give_up_silent()
                while done:
                    self._left -= 1
                    yield done.pop()
        finally:
            self._close()

    def _assign(self, record: Wanted) -> None:
        """Queue a record at the next source that can be reached."""
        while record.sources:
            name = record.sources.popleft()
            source = self._sources.get(name) or self._connect(name)
            if source is not None:
                record.asked = len(record.data)
                source.records.append(record)
                return
            record.why = f"{name} is not there"
        raise RecordUnavailable(f"record {record.sha256[:12]}… ({record.size} bytes) from nowhere: {record.why}")

    def _connect(self, name: str) -> _Source | None:
        where = self._endpoints(name)
        if where is None:
            return None
        socket = make_socket(self._context, zmq.DEALER, "weights")
        connect(socket, where.address, where.weights)
        self._poller.register(socket, zmq.POLLIN)
        self._sources[name] = _Source(name, socket, self._clock())
        return self._sources[name]

    def _ask(self) -> None:
        for source in self._sources.values():
            while len(source.under_way) < WINDOW and (record := self._next_record(source)) is not None:
                length = min(CHUNK_BYTES, record.size - record.asked)
                request = ChunkRequest(next(self._ids), record.sha256, record.asked, length)
                try:
                    source.socket.send_multipart(pack_chunk_request(request), zmq.NOBLOCK)
                except zmq.Again:
                    break  # not connected yet, or queue full
                source.under_way[request.request] = (record, record.asked)
                record.asked += length

    def _next_record(self, source: _Source) -> Wanted | None:
        for record in source.records:
            if record.asked < record.size:
                return record
        return None

    def _receive(self) -> list[Wanted]:
        """Take in what has come; return records that became whole."""
        done = []
        ready = {socket for socket, _ in self._poller.poll(_POLL_MS)}
        for source in list(self._sources.values()):
            while source.socket in ready and source.name in self._sources:
                try:
                    frames = source.socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if record := self._take(source, frames):
                    done.append(record)
        return done

    def _take(self, source: _Source, frames: list[bytes]) -> Wanted | None:
        try:
            answer = parse_chunk(frames)
        except RemoteProtocolError as error:
            self._drop_source(source, f"{source.name}: {error}")
            return None
        record, offset = source.under_way.pop(answer.request, (None, 0))
        if record is None or record not in source.records:
            return None  # late, or of a record taken away from this source
        source.heard_at = self._clock()
        if isinstance(answer, ChunkFault):
            self._reassign(source, record, f"{source.name}: {answer.fault.message}")
            return None
        return self._append(source, record, offset, answer)

    def _append(self, source: _Source, record: Wanted, offset: int, chunk: Chunk) -> Wanted | None:
        if chunk.offset != offset or chunk.total != record.size or offset != len(record.data):
            self._reassign(source, record, f"{source.name} sent bytes that were not asked for")
            return None
        record.data += chunk.data
        if len(record.data) < record.size:
            return None
        source.records.remove(record)
        if hashlib.sha256(record.data).hexdigest() == record.sha256:
            return record
        record.data.clear()
        self._reassign(source, record, f"{source.name} sent a record with another sha256")
        return None

    def _reassign(self, source: _Source, record: Wanted, why: str) -> None:
        log.warning("record %s: %s", record.sha256[:12], why)
        if record in source.records:
            source.records.remove(record)
        record.why = why
        self._assign(record)

    def _drop_source(self, source: _Source, why: str) -> None:
        self._poller.unregister(source.socket)
        source.socket.close()
        del self._sources[source.name]
        for record in list(source.records):
            self._reassign(source, record, why)

    def _give_up_silent(self) -> None:
        now = self._clock()
        for source in list(self._sources.values()):
            if not source.records:
                source.heard_at = now
            elif now - source.heard_at > SOURCE_SILENCE_S:
                self._drop_source(source, f"{source.name} was silent for {SOURCE_SILENCE_S:.0f} s")

    def _close(self) -> None:
        for source in self._sources.values():
            self._poller.unregister(source.socket)
            source.socket.close()
        self._sources.clear()


class WeightsServer(threading.Thread):
    """Answers chunk requests from whatever records are here. Owns the socket it is given."""

    def __init__(self, socket: Socket, reader: RecordReader, stopped: Callable[[], bool]) -> None:
        super().__init__(name="weights", daemon=True)
        self._socket = socket
        self._reader = reader
        self._stopped = stopped

    def run(self) -> None:
        """Serve until stopped."""
        try:
            while not self._stopped():
                if self._socket.poll(_POLL_MS):
                    self._answer(self._socket.recv_multipart())
        finally:
            self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        identity, *rest = frames
        try:
            request = parse_chunk_request(rest)
        except RemoteProtocolError as error:
            log.warning("weights plane: %s", error)
            return
        try:
            # a peer that stops reading is not waited for: its puller asks again, or elsewhere
            self._socket.send_multipart([identity, *self._chunk(request)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("weights plane: a chunk could not be sent: %s", error)

    def _chunk(self, request: ChunkRequest) -> list[bytes | memoryview] | list[bytes]:
        try:
            total = self._reader.size(request.sha256)
            if request.offset + request.length > total:
                return pack_chunk_fault(request.request, CallFault(code="refused", message=f"it has {total} bytes"))
            data = self._reader.read(request.sha256, request.offset, request.length)
        except KeyError:
            return pack_chunk_fault(request.request, CallFault(code="not_held", message="has no such record"))
        except OSError as error:
            return pack_chunk_fault(request.request, CallFault(code="failed", message=f"cannot read it: {error}"))
        return pack_chunk(Chunk(request.request, request.offset, total, data))
