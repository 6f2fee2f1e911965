"""Links with latency and bandwidth between processes of one machine: network namespaces and a router in user space.

Decides when each packet arrives: a directed link sends one packet after the other at its rate and delivers each after
its delay, in order. Every namespace has one TUN device, and all traffic between namespaces goes through one router
process, so that no traffic shaping of the kernel is needed. Agents listen on loopback addresses only: node i of the
lab is 127.77.0.i, routed like any other address inside the lab's namespaces. The router owns namespaces and devices;
it ends when its standard input closes, whatever becomes of the process that started it. Must not know what is sent.

The router itself takes some tens of µs for a packet, more on a busy machine: `Lab.round_trip_s` says what a link
really takes. Linux, root and /dev/net/tun are needed.
"""

import contextlib
import fcntl
import heapq
import json
import os
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PREFIX: Final = "emlab"
DEVICE: Final = "emtun"
_MTU: Final = 1500
_QUEUE_S: Final = 0.2  # a link that is this far behind drops what comes
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_TUN: Final = Path("/dev/net/tun")
_PACKETS_AT_ONCE: Final = 64
_SPIN_S: Final = 120e-6  # before a packet is due the router stays awake: a sleeping CPU would deliver it as much late

Pair = tuple[int, int]


class NoLab(RuntimeError):
    """This machine or user cannot run a lab."""


@dataclass(frozen=True)
class Line:
    """One direction of a link: seconds one way, bytes per second (infinite: no limit)."""

    delay_s: float
    bandwidth: float = float("inf")


def require_lab() -> None:
    """Raise `NoLab` with everything that is missing."""
    missing = []
    if sys.platform != "linux":
        missing.append(f"Linux (this is {sys.platform})")
    elif os.geteuid():
        missing.append("root: run it with sudo, or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN")
    if not _TUN.exists():
        missing.append(f"{_TUN}: modprobe tun, or pass the device into the container")
    missing += [
        f"the command {name}: install iproute2 and procps" for name in ("ip", "sysctl") if not shutil.which(name)
    ]
    if missing:
        raise NoLab("emulated links need " + "; ".join(missing))


class Lab:
    """Namespaces 1 … n with lines between them, from `__enter__` to `__exit__`.

    Parameters
    ----------
    lines
        One for each pair in both orders, or in one order if both directions are alike. Pairs without one cannot talk.
    """

    def __init__(self, size: int, lines: Mapping[Pair, Line]) -> None:
        self._size = size
        self._lines = {**{(b, a): line for (a, b), line in lines.items()}, **lines}
        self._name = f"{PREFIX}{os.getpid()}"

    def __enter__(self) -> "Lab":
        require_lab()
        remove_leftovers()
        lines = [[a, b, line.delay_s, min(line.bandwidth, 1e18)] for (a, b), line in self._lines.items()]
        self._router = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.lab", json.dumps([self._name, self._size, lines])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._router.stdout
        if self._router.stdout.readline() != "ready\n":
            self.__exit__()
            raise NoLab("the router of the lab did not start; see what it said above")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._router.stdin
        self._router.stdin.close()
        self._router.wait()  # it must not be killed: it removes the namespaces
        assert self._router.stdout
        self._router.stdout.close()

    def address(self, number: int) -> str:
        return address(number)

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """Return a command as it must be started to run inside a namespace."""
        return ["ip", "netns", "exec", f"{self._name}-{number}", *command]

    def round_trip_s(self, first: int, second: int, *, size: int = 900, count: int = 200) -> float:
        """Median seconds that `size` bytes there and back take over TCP, with a pause between as decoding has."""
        echo = subprocess.Popen(
            self.command(second, [sys.executable, "-c", _ECHO, address(second), str(size)]),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert echo.stdout
        try:
            port = echo.stdout.readline().strip()
            ping = [sys.executable, "-c", _PING, address(second), port, str(size), str(count)]
            done = subprocess.run(self.command(first, ping), check=True, stdout=subprocess.PIPE, text=True)
        finally:
            echo.kill()
            echo.wait()
            echo.stdout.close()
        return statistics.median(map(float, done.stdout.split()))


_ECHO: Final = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
peer = server.accept()[0]
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := peer.recv(int(sys.argv[2]), socket.MSG_WAITALL):
    peer.sendall(data)
"""
_PING: Final = """
import socket, sys, time
host, port, size, count = sys.argv[1], *map(int, sys.argv[2:])
peer = socket.create_connection((host, port))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(count):
    began = time.perf_counter()
    peer.sendall(bytes(size))
    peer.recv(size, socket.MSG_WAITALL)
    print(time.perf_counter() - began)
    time.sleep(0.002)
"""


def address(number: int) -> str:
    return f"127.77.0.{number}"


def remove_leftovers() -> None:
    """Delete namespaces of labs whose process is gone; only a router that was killed leaves any."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)):
        if not Path("/proc", name.removeprefix(PREFIX).partition("-")[0]).exists():
            _remove(name)


def main() -> None:
    """Be the router: make the namespaces, say so, carry packets until standard input closes, remove everything."""
    name, size, lines = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; who started this router ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    hurry()
    names = [f"{name}-{number}" for number in range(1, size + 1)]
    try:
        devices = {number: _open(each, number) for number, each in enumerate(names, start=1)}
        print("ready", flush=True)
        Router(devices, {(a, b): Line(delay, rate) for a, b, delay, rate in lines}).run(sys.stdin.fileno())
    finally:
        for each in names:
            _remove(each)


def hurry() -> None:
    """Let the kernel run this process as soon as a packet is there or due, since links do not wait for a CPU."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _open(name: str, number: int) -> int:
    """Make a namespace with its device and return the device's file descriptor."""
    _run("ip", "netns", "add", name)
    device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    unique = f"{DEVICE}{os.getpid()}.{number}"[:15]
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", unique.encode(), _IFF_TUN | _IFF_NO_PI))
    _run("ip", "link", "set", unique, "netns", name, "name", DEVICE)
    for command in (
        "ip link set lo up",
        "ip addr del 127.0.0.1/8 dev lo",  # else all of 127/8 would stay inside the namespace
        "ip addr add 127.0.0.1/32 dev lo",
        f"sysctl -qw net.ipv4.conf.all.route_localnet=1 net.ipv4.conf.{DEVICE}.route_localnet=1",
        f"ip addr add {address(number)}/24 dev {DEVICE}",
        f"ip link set {DEVICE} mtu {_MTU} txqueuelen 2000 up",
    ):
        _run("ip", "netns", "exec", name, *command.split())
    return device


def _remove(name: str) -> None:
    """Delete a namespace, if it is there, and end what still runs inside: only a lab starts anything there."""
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for process in map(int, inside.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@dataclass
class Router:
    """Carries packets between devices, one thread, no locks."""

    devices: dict[int, int]
    lines: dict[Pair, Line]
    _free_s: dict[Pair, float] = field(default_factory=dict)  # when each line has sent what it was given
    _due: list[tuple[float, int, int, bytes]] = field(default_factory=list)  # when, tie-break, to whom, packet
    _count: int = 0

    def run(self, stop: int) -> None:
        """Carry packets until file descriptor `stop` closes."""
        number_of = {device: number for number, device in self.devices.items()}
        watched = [*number_of, stop]
        while True:
            self._deliver()
            wait = max(0.0, self._due[0][0] - time.monotonic() - _SPIN_S) if self._due else None
            ready = select.select(watched, (), (), wait)[0]
            now = time.monotonic()
            if stop in ready and not os.read(stop, 4096):
                return
            for device in ready:
                if device != stop:
                    self._take(number_of[device], device, now)

    def _deliver(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(self._due)
            try:
                os.write(self.devices[target], packet)
            except OSError:
                continue  # the device's queue is full, or its end is not up: a lost packet

    def _take(self, source: int, device: int, now: float) -> None:
        for packet in _packets(device):
            target = packet[19] if packet[16:19] == b"\x7f\x4d\x00" else 0  # destination 127.77.0.x
            line = self.lines.get((source, target))
            if line is None:
                continue
            free = max(now, self._free_s.get((source, target), 0.0))
            if free - now > _QUEUE_S:
                continue
            self._free_s[source, target] = free = free + len(packet) / line.bandwidth
            self._count += 1
            heapq.heappush(self._due, (free + line.delay_s, self._count, target, packet))


def _packets(device: int) -> Iterable[bytes]:
    """Yield IPv4 packets that wait at a device, at most as many as leave the others their turn."""
    for _ in range(_PACKETS_AT_ONCE):
        try:
            packet = os.read(device, 65536)
        except BlockingIOError:
            return
        if len(packet) >= 20 and packet[0] >> 4 == 4:
            yield packet


if __name__ == "__main__":
    main()
