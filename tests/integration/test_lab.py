"""The emulator of links: when packets arrive, and that a lab leaves nothing behind. No model, no agents."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.lab import Lab, Line, NoLab, Router, address, require_lab
from tests.cluster import wait_for


def packet(target: int, size: int = 1000, mark: int = 0) -> bytes:
    """As much of an IPv4 packet as the router reads."""
    return bytes([0x45, mark]) + bytes(14) + bytes([127, 77, 0, target]) + bytes(size - 20)


@pytest.fixture
def ends() -> Iterator[dict[int, socket.socket]]:
    """Three nodes with sockets for devices; a line from 1 to 2 of 20 ms and 100 kB/s, and none to 3."""
    pairs = {number: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for number in (1, 2, 3)}
    for _, device in pairs.values():
        device.setblocking(False)
    stop, stopping = os.pipe()
    router = Router({n: device.fileno() for n, (_, device) in pairs.items()}, {(1, 2): Line(0.02, 100e3)})
    thread = threading.Thread(target=router.run, args=(stop,))
    thread.start()
    for end, _ in pairs.values():
        end.settimeout(5)
    yield {number: end for number, (end, _) in pairs.items()}
    os.close(stopping)
    thread.join()
    os.close(stop)
    for pair in pairs.values():
        for each in pair:
            each.close()


def test_packets_take_delay_and_rate_and_keep_their_order(ends: dict[int, socket.socket]) -> None:
    began = time.monotonic()
    for mark in range(3):
        ends[1].send(packet(2, mark=mark))
    took = []
    for mark in range(3):
        assert ends[2].recv(2000)[1] == mark
        took.append(time.monotonic() - began)
    assert all(seconds >= 0.02 + 0.01 * (mark + 1) for mark, seconds in enumerate(took)), took


def test_a_pair_without_a_line_cannot_talk(ends: dict[int, socket.socket]) -> None:
    ends[2].send(packet(1))
    ends[1].send(packet(3))
    ends[1].send(packet(2))
    assert ends[2].recv(2000) == packet(2)
    for silent in (1, 3):
        ends[silent].settimeout(0.01)
        with pytest.raises(TimeoutError):
            ends[silent].recv(2000)


def test_a_line_too_far_behind_drops(ends: dict[int, socket.socket]) -> None:
    for mark in range(40):  # 10 ms each: the queue holds 200 ms
        ends[1].send(packet(2, mark=mark))
    ends[2].settimeout(0.1)
    arrived = 0
    with contextlib.suppress(TimeoutError):
        while ends[2].recv(2000):
            arrived += 1
    assert 18 <= arrived <= 30


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoLab, match=r"root: .*the command ip: install iproute2"):
        require_lab()


def can_run() -> bool:
    try:
        require_lab()
    except NoLab:
        return False
    return True


@pytest.mark.skipif(not can_run(), reason="needs Linux, root and /dev/net/tun")
class TestNamespaces:
    def test_a_round_trip_takes_what_the_line_says(self) -> None:
        with Lab(2, {(1, 2): Line(0.01)}) as lab:
            assert 0.02 <= lab.round_trip_s(1, 2, count=20) < 0.04
        assert not namespaces_of(os.getpid())

    def test_nothing_is_left_when_the_starter_is_killed(self) -> None:
        code = (
            "import subprocess, time\nfrom tests.bench.lab import Lab, Line\n"
            "with Lab(2, {(1, 2): Line(0.01)}) as lab:\n"
            "    inside = subprocess.Popen(lab.command(2, ['sleep', '600']))\n"
            "    print(inside.pid, flush=True)\n    time.sleep(600)\n"
        )
        starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert starter.stdout
        inside = int(starter.stdout.readline())
        assert namespaces_of(starter.pid)
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        starter.stdout.close()
        wait_for(lambda: not namespaces_of(starter.pid), timeout_s=20, what="namespaces removed")
        wait_for(lambda: not runs(inside), timeout_s=20, what="the process inside ended")


def namespaces_of(process: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"emlab{process}-")]


def runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_addresses_are_loopback() -> None:
    assert address(3) == "127.77.0.3"
