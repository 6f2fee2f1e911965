"""All sockets of an agent and of its clients are made here.

Decides options (from `schemas.wire`), addresses and lingering; keys will go into `make_socket` and nowhere else.
Must not know what is sent.
"""

from collections.abc import Callable
from typing import Any, Final

import zmq

from agent.errors import CannotBind
from schemas.address import Address, InvalidAddress, require_loopback
from schemas.wire import DEALER_OPTIONS, ROUTER_OPTIONS, Plane, plane_options

INPROC_LINGER_MS: Final = 300

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
Buffer = Any  # bytes, memoryview or NumPy array: there is no common type for them before Python 3.12


def make_socket(context: Context, kind: int, plane: Plane, *, frame_bytes: int = 0, identity: bytes = b"") -> Socket:
    """Return a ROUTER or DEALER of a plane with all its options set."""
    socket = context.socket(kind)
    for option in (*(ROUTER_OPTIONS if kind == zmq.ROUTER else DEALER_OPTIONS), *plane_options(plane, frame_bytes)):
        socket.setsockopt(getattr(zmq, option.name), option.value)
    if identity:
        socket.setsockopt(zmq.IDENTITY, identity)
    return socket


def bind(socket: Socket, address: Address, what: str) -> int:
    """Bind to a loopback address and return the port; raises `CannotBind`."""
    try:
        require_loopback(address.host)
        socket.bind(address.endpoint)
    except InvalidAddress as error:
        raise CannotBind(f"{what}: {error}") from error
    except zmq.ZMQError as error:
        raise CannotBind(
            f"{what}: cannot listen on {address}: {error.strerror}; is another agent running there? "
            "Stop it or change ports in the config"
        ) from error
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return int(endpoint.rpartition(":")[2])


def connect(socket: Socket, host: str, port: int) -> None:
    """Connect to a peer, which need not be there yet."""
    socket.connect(Address(host, port).endpoint)


def is_connected(dealer: Socket) -> bool:
    """Whether a peer is there: with IMMEDIATE set, a DEALER without one takes nothing."""
    return bool(int(dealer.get(zmq.EVENTS)) & zmq.POLLOUT)


def inproc_pair(context: Context, name: str) -> tuple[Socket, Callable[[], Socket]]:
    """Return a PULL socket and a function that makes PUSH sockets to it, one per thread."""
    pull = context.socket(zmq.PULL)
    pull.setsockopt(zmq.LINGER, 0)
    pull.bind(f"inproc://{name}")

    def make_push() -> Socket:
        push = context.socket(zmq.PUSH)
        push.setsockopt(zmq.LINGER, INPROC_LINGER_MS)  # with 0 its last words are lost when it closes
        push.connect(f"inproc://{name}")
        return push

    return pull, make_push
