"""The agent's line to the coordinator: messages in, messages out. Must not know what they mean or when one is due."""

import logging
from collections.abc import Iterator
from typing import Final

import zmq

from agent.transport import Context, connect, make_socket
from schemas.address import parse_address
from schemas.messages import Message, RemoteProtocolError, decode, encode

GOODBYE_MS: Final = 300

log = logging.getLogger(__name__)


class ControlLine:
    """A DEALER with the node's id as identity. Belongs to one thread."""

    def __init__(self, context: Context, coordinator: str, node: str) -> None:
        self._socket = make_socket(context, zmq.DEALER, "control", identity=node.encode())
        address = parse_address(coordinator)
        connect(self._socket, address.host, address.port)

    def send(self, message: Message) -> bool:
        """Send without waiting; False where the coordinator is not there."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_ms: int) -> Iterator[Message]:
        """Yield everything that has come, waiting at most `timeout_ms` for the first."""
        if not self._socket.poll(timeout_ms):
            return
        while True:
            try:
                yield decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except RemoteProtocolError as error:
                log.warning("from the coordinator: %s", error)

    def close(self) -> None:
        """Close, giving the last message a moment to leave."""
        self._socket.close(linger=GOODBYE_MS)
