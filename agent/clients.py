"""The client plane: prompts come in, tokens go out, several requests at a time.

Decides who may run (as many at once as the context was planned for, the rest wait in line), and when a request ends
early: cancelled, or its client lost. One thread owns the ROUTER; each worker thread owns its expert sockets and hands
tokens over in-process. Must not know how tokens are made.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import zmq

from agent.errors import RequestCancelled
from agent.transport import Context, Socket, inproc_pair
from runtime.errors import RuntimeFault
from schemas.messages import (
    Alive,
    BudgetChanged,
    BudgetRequest,
    Cancel,
    Failed,
    Finished,
    Generated,
    GenerateRequest,
    Message,
    Refusal,
    RemoteProtocolError,
    Traced,
    decode,
    encode,
)
from schemas.outcome import ExitCode

log = logging.getLogger(__name__)

LOST_CLIENT_S: Final = 5.0
MAX_WAITING: Final = 64
FAREWELL_MS: Final = 300
LAST_WORDS_S: Final = 0.5
_POLL_MS: Final = 100


@dataclass
class Request:
    """A request under way or in line."""

    client: bytes
    wanted: GenerateRequest
    alive_at: float
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> tuple[bytes, str]:
        """Client and its own id of the request: one client cannot touch another's."""
        return self.client, self.wanted.request


class TokenSource(Protocol):
    """Makes tokens in one worker thread."""

    def generate(
        self, wanted: GenerateRequest, is_cancelled: Callable[[], bool]
    ) -> Iterator[Generated | Traced | Finished]:
        """Yield tokens and then how it ended; raises errors with an `exit_code`."""

    def close(self) -> None:
        """Close what this thread owns."""


class ClientServer(threading.Thread):
    """Owns the client ROUTER and its workers.

    Parameters
    ----------
    make_source
        Called once in each worker thread.
    set_budget
        Changes what this node may take of its device; raises errors with an `exit_code`.
    """

    def __init__(
        self,
        context: Context,
        socket: Socket,
        *,
        workers: int,
        make_source: Callable[[], TokenSource],
        set_budget: Callable[[int], BudgetChanged],
        stopped: Callable[[], bool],
    ) -> None:
        super().__init__(name="clients", daemon=True)
        self._socket = socket
        self._stopped = stopped
        self._make_source = make_source
        self._set_budget = set_budget
        self._requests: dict[tuple[bytes, str], Request] = {}
        self._line: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._inbox, self._make_push = inproc_pair(context, "answers")
        self._workers = [threading.Thread(target=self._work, name=f"request-{n}", daemon=True) for n in range(workers)]

    def run(self) -> None:
        """Serve until stopped; then cancel what runs and wait for the workers."""
        for worker in self._workers:
            worker.start()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._inbox, zmq.POLLIN)
        try:
            while not self._stopped():
                ready = dict(poller.poll(_POLL_MS))
                if self._inbox in ready:
                    self._forward()
                if self._socket in ready:
                    self._take(*self._socket.recv_multipart())
                self._drop_lost()
        finally:
            told = set(self._requests)
            self._stop_workers()
            self._forward()  # clients are told why their answer ends
            self._hear_out(told)
            self._inbox.close()
            self._socket.close(linger=FAREWELL_MS)

    def _stop_workers(self) -> None:
        for request in self._requests.values():
            request.cancelled.set()
        for _ in self._workers:
            self._line.put(None)
        for worker in self._workers:
            worker.join()

    def _hear_out(self, told: set[tuple[bytes, str]]) -> None:
        """Wait until clients have read their last message, which they answer: a closed connection would drop it."""
        deadline = time.monotonic() + LAST_WORDS_S
        while told and (left_s := deadline - time.monotonic()) > 0:
            if self._socket.poll(round(left_s * 1000) or 1):
                client, *frames = self._socket.recv_multipart()
                with suppress(RemoteProtocolError):
                    message = decode(frames[0] if len(frames) == 1 else b"")
                    told -= {(client, message.request)} if isinstance(message, Cancel) else set()

    def _take(self, client: bytes, *frames: bytes) -> None:
        try:
            message = decode(frames[0] if len(frames) == 1 else b"")
        except RemoteProtocolError as error:
            self._send(client, Refusal(code=ExitCode.INVALID, message=str(error)))
            return
        match message:
            case GenerateRequest():
                self._accept(client, message)
            case Cancel(request=name):
                if found := self._requests.get((client, name)):
                    found.cancelled.set()
            case Alive(request=name):
                if found := self._requests.get((client, name)):
                    found.alive_at = time.monotonic()
            case BudgetRequest(device=device):
                self._send(client, self._changed_budget(device))
            case _:
                self._send(client, Refusal(code=ExitCode.INVALID, message=f"an agent takes no {message.type}"))

    def _changed_budget(self, device: int) -> BudgetChanged | Refusal:
        try:
            return self._set_budget(device)
        except RuntimeFault as error:
            return Refusal(code=error.exit_code, message=str(error))

    def _accept(self, client: bytes, wanted: GenerateRequest) -> None:
        request = Request(client, wanted, time.monotonic())
        if request.name in self._requests:
            return  # sent twice: it is under way
        if len(self._requests) >= MAX_WAITING + len(self._workers):
            text = f"{len(self._requests)} requests are waiting already; try again later"
            self._send(client, Failed(request=wanted.request, code=ExitCode.FAILED, message=text))
            return
        self._requests[request.name] = request
        self._line.put(request)

    def _forward(self) -> None:
        """Pass what workers made on to the clients."""
        for _ in range(256):
            try:
                client, frame, last = self._inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            name = (client, last.decode())
            if last:
                self._requests.pop(name, None)
            try:
                self._socket.send_multipart([client, frame], zmq.NOBLOCK)
            except zmq.ZMQError:
                self._cancel_all_of(client)

    def _cancel_all_of(self, client: bytes) -> None:
        for request in self._requests.values():
            if request.client == client and not request.cancelled.is_set():
                log.info("request %s: its client is lost", request.wanted.request)
                request.cancelled.set()

    def _drop_lost(self) -> None:
        now = time.monotonic()
        for request in self._requests.values():
            if now - request.alive_at > LOST_CLIENT_S:
                self._cancel_all_of(request.client)

    def _send(self, client: bytes, message: Message) -> None:
        try:
            self._socket.send_multipart([client, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            log.info("a client left before its answer")

    def _work(self) -> None:
        """Answer requests, one after the other; the loop of a worker thread."""
        push = self._make_push()
        source = self._make_source()
        try:
            while (request := self._line.get()) is not None:
                self._answer(request, source, push)
        finally:
            source.close()
            push.close()

    def _answer(self, request: Request, source: TokenSource, push: Socket) -> None:
        wanted = request.wanted
        try:
            if request.cancelled.is_set():
                raise RequestCancelled("the request was cancelled while it waited in line")
            for message in source.generate(wanted, request.cancelled.is_set):
                last = wanted.request if isinstance(message, Finished) else ""
                push.send_multipart([request.client, encode(message), last.encode()])
                if request.cancelled.is_set() and not last:
                    raise RequestCancelled("the request was cancelled")
        except Exception as error:
            code = ExitCode(getattr(error, "exit_code", ExitCode.FAILED))
            if not hasattr(error, "exit_code"):
                log.exception("request %s failed", wanted.request)
            text = str(error) or type(error).__name__
            if self._stopped() and isinstance(error, RequestCancelled):
                text = "the agent was stopped; the answer is not complete, ask again"
            failed = Failed(request=wanted.request, code=code, message=text)
            push.send_multipart([request.client, encode(failed), wanted.request.encode()])
