"""HOST:PORT as users write it, and which hosts this version may bind.

Decides what an address is and that sockets stay on loopback while there are no keys. Must not know sockets.
"""

import ipaddress
from dataclasses import dataclass


class InvalidAddress(ValueError):
    """Text that is no address, or an address that may not be used; the message says why."""


@dataclass(frozen=True)
class Address:
    """A numeric host and a port; port 0 asks the system for a free one."""

    host: str
    port: int

    @property
    def endpoint(self) -> str:
        """The address as ZeroMQ wants it."""
        return f"tcp://{bracketed(self.host)}:{self.port or '*'}"

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"


def parse_address(text: str) -> Address:
    """Read HOST:PORT; IPv6 hosts are bracketed.

    >>> str(parse_address("127.0.0.1:7400"))
    '127.0.0.1:7400'
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise InvalidAddress(f"{text!r} is not HOST:PORT, such as 127.0.0.1:7400")
    return Address(parse_host(host.removeprefix("[").removesuffix("]")), int(port))


def parse_host(text: str) -> str:
    """Return a numeric host; `localhost` is 127.0.0.1, other names are refused so that nothing is looked up."""
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise InvalidAddress(f"{text!r} is not an IP address; write it in numbers, such as 127.0.0.1") from error


def require_loopback(host: str) -> str:
    """Return the numeric host if it is a loopback address; raises `InvalidAddress` for any other."""
    numeric = parse_host(host)
    if not ipaddress.ip_address(numeric).is_loopback:
        raise InvalidAddress(
            f"{host} is not a loopback address; this version has no keys yet, so it binds and connects only to "
            "127.0.0.0/8 and ::1"
        )
    return numeric


def bracketed(host: str) -> str:
    """Write an IPv6 host in brackets."""
    return f"[{host}]" if ":" in host else host
