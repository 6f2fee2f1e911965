"""The coordinator's socket and the command line's, set in one place.

Decides how sockets are made (options of `schemas.wire`; keys will go here) and how a client waits for answers.
Must not know what messages mean.
"""

import socket
import time
from collections.abc import Iterator
from typing import Final

import zmq

from planner.control.errors import CannotBind, CoordinatorAbsent
from planner.control.rivals import Reach
from schemas.address import Address, InvalidAddress, parse_address, require_loopback
from schemas.messages import Endpoints, Message, RemoteProtocolError, decode, encode
from schemas.wire import DEALER_OPTIONS, ROUTER_OPTIONS, SHUTDOWN_LINGER_MS, plane_options

FIRST_ANSWER_S: Final = 3.0
SILENCE_S: Final = 15.0
_REACH_S: Final = 0.2  # nobody else is heard meanwhile


def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """Return a control socket with all its options set; the one place where sockets are made here."""
    made = context.socket(kind)
    for option in (*(ROUTER_OPTIONS if kind == zmq.ROUTER else DEALER_OPTIONS), *plane_options("control")):
        made.setsockopt(getattr(zmq, option.name), option.value)
    return made


def reach(endpoints: Endpoints) -> Reach:
    """Tell whether a process still listens where an agent said that it does."""
    try:
        with socket.create_connection((endpoints.address, endpoints.client), timeout=_REACH_S):
            return "listens"
    except ConnectionRefusedError:
        return "gone"
    except OSError:
        return "unknown"


class CoordinatorSocket:
    """The ROUTER that agents and commands talk to. Belongs to one thread."""

    def __init__(self, address: Address) -> None:
        try:
            require_loopback(address.host)
        except InvalidAddress as error:
            raise CannotBind(f"coordinator: {error}") from error
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = make_socket(self._context, zmq.ROUTER)
        try:
            self._socket.bind(address.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise CannotBind(
                f"coordinator: cannot listen on {address}: {error.strerror}; is another planner serve running there? "
                "Stop it or change coordinator.port in the topology"
            ) from error

    def receive(self, timeout_s: float) -> Iterator[tuple[bytes, bytes]]:
        """Yield (identity, frame) of everything that has come, waiting at most `timeout_s` for the first."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return
        for _ in range(256):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:
                yield frames[0], frames[1]

    def send(self, identity: bytes, message: Message) -> bool:
        """Send without waiting; False where the peer is gone or takes nothing more."""
        try:
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        """Close, giving what is under way a second to leave."""
        self._context.destroy(linger=SHUTDOWN_LINGER_MS)


class ControlClient:
    """A command's connection to the coordinator."""

    def __init__(self, coordinator: str) -> None:
        try:
            self._address = parse_address(coordinator)
            require_loopback(self._address.host)
        except InvalidAddress as error:
            raise CoordinatorAbsent(f"coordinator: {error}") from error
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = make_socket(self._context, zmq.DEALER)
        self._socket.connect(self._address.endpoint)

    def ask(self, message: Message, *, timeout_s: float = FIRST_ANSWER_S) -> Message:
        """Send one request and return its answer; raises `CoordinatorAbsent`."""
        self.send(message)
        answer = self.receive(timeout_s)
        if answer is None:
            raise self._absent()
        return answer

    def send(self, message: Message) -> None:
        """Send, waiting a moment for the connection; raises `CoordinatorAbsent`."""
        if not self._socket.poll(round(FIRST_ANSWER_S * 1000), zmq.POLLOUT):
            raise self._absent()
        self._socket.send(encode(message), zmq.NOBLOCK)

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message, or None after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if self._socket.poll(round(left * 1000) + 1):
                try:
                    return decode(self._socket.recv(zmq.NOBLOCK))
                except RemoteProtocolError:
                    continue  # not from a coordinator of this version; the time-out tells the user
        return None

    def _absent(self) -> CoordinatorAbsent:
        return CoordinatorAbsent(
            f"no coordinator answers at {self._address}; start it with planner serve TOPOLOGY, or name it with "
            "--coordinator HOST:PORT"
        )

    def close(self) -> None:
        """Close at once, sending what is queued."""
        self._context.destroy(linger=SHUTDOWN_LINGER_MS)

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
