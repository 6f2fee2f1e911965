"""The session plane's connections to other nodes: one DEALER to each, and what waits until it can be sent.

Decides how long a message waits for a connection, and that the order of what goes to a node is kept. What is given up
is handed back. Whoever uses it sees to it that one thread at a time does. Must not know what messages mean.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import zmq

from agent.transport import Context, Socket, connect, make_socket
from schemas.messages import Endpoints

LIMBO_S: Final = 0.4  # for messages that are repeated anyway
FAREWELL_MS: Final = 300


@dataclass(frozen=True)
class Parcel:
    """A message that could not be sent yet, and the session it belongs to."""

    node: str
    session: str
    frame: bytes
    expires_at: float


@dataclass(frozen=True)
class _Link:
    where: Endpoints
    socket: Socket


class Links:
    """Connections to the session plane of other nodes.

    Parameters
    ----------
    identity
        By which other nodes know who speaks.
    endpoints
        Where each node listens now.
    frame_bytes
        The largest frame.
    poller
        Told which sockets there are: faults come back over them.
    """

    def __init__(
        self,
        context: Context,
        *,
        identity: bytes,
        endpoints: Callable[[], Mapping[str, Endpoints]],
        frame_bytes: int,
        poller: zmq.Poller,
    ) -> None:
        self._context = context
        self._identity = identity
        self._endpoints = endpoints
        self._frame_bytes = frame_bytes
        self._poller = poller
        self._links: dict[str, _Link] = {}
        self._waiting: dict[str, deque[Parcel]] = {}

    @property
    def has_waiting(self) -> bool:
        """Whether something could not be sent yet."""
        return bool(self._waiting)

    def is_waiting(self, session: str) -> bool:
        """Whether something of a session could not be sent yet."""
        return any(parcel.session == session for line in self._waiting.values() for parcel in line)

    def send(self, node: str, session: str, frame: bytes, *, expires_at: float) -> None:
        """Send at once, or keep it behind what waits for that node already."""
        line = self._waiting.get(node)
        if line is not None or not self._try(node, frame):
            self._waiting.setdefault(node, deque()).append(Parcel(node, session, frame, expires_at))

    def retry(self, now: float) -> list[Parcel]:
        """Send what can be sent now; return what is given up."""
        given_up = []
        for node, line in list(self._waiting.items()):
            while line and self._try(node, line[0].frame):
                line.popleft()
            while line and line[0].expires_at < now:
                given_up.append(line.popleft())
            if not line:
                del self._waiting[node]
        return given_up

    def forget(self, session: str) -> None:
        """Drop what waits for a session that is over."""
        for node, line in list(self._waiting.items()):
            kept = deque(parcel for parcel in line if parcel.session != session)
            if kept:
                self._waiting[node] = kept
            else:
                del self._waiting[node]

    def receive(self, ready: Mapping[Any, int]) -> Iterator[tuple[str, list[bytes]]]:
        """Yield what nodes sent back over sockets that are `ready`."""
        for node, link in list(self._links.items()):
            while link.socket in ready and not link.socket.closed:
                try:
                    yield node, link.socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break

    def close(self) -> None:
        """Close every connection; what was sent has a moment to leave."""
        for link in self._links.values():
            link.socket.close(linger=FAREWELL_MS)
        self._links.clear()

    def _try(self, node: str, frame: bytes) -> bool:
        link = self._link(node)
        if link is None:
            return False
        try:
            link.socket.send(frame, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False  # not connected
        return True

    def _link(self, node: str) -> _Link | None:
        """Return the connection to a node, made anew where its address has changed; None if it is not known."""
        where, known = self._endpoints().get(node), self._links.get(node)
        if where is None or (known is not None and (known.where is where or known.where == where)):
            return known
        if known is not None:
            self._poller.unregister(known.socket)
            known.socket.close()
        socket = make_socket(
            self._context, zmq.DEALER, "session", frame_bytes=self._frame_bytes, identity=self._identity
        )
        connect(socket, where.address, where.session)
        self._poller.register(socket, zmq.POLLIN)
        self._links[node] = _Link(where, socket)
        return self._links[node]
