"""Pulling records over real sockets: resumed from the verified prefix, damaged, from several sources, and given up."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from agent.errors import RecordUnavailable
from agent.transfer import Puller, Wanted, WeightsServer
from agent.transport import bind, make_socket
from schemas.address import Address
from schemas.messages import Endpoints
from schemas.wire import CHUNK_BYTES

BIG = bytes(range(256)) * (5 * CHUNK_BYTES // 512)  # two chunks and a half
NAME = hashlib.sha256(BIG).hexdigest()


class Shelf:
    """Records of one peer; remembers which bytes were asked for. `answers` may refuse or change them."""

    def __init__(self, *records: bytes, answer: Callable[[int, bytes], bytes] = lambda _, data: data) -> None:
        self.records = {hashlib.sha256(record).hexdigest(): record for record in records}
        self.asked: list[tuple[str, int]] = []
        self.answer = answer

    def size(self, sha256: str) -> int:
        return len(self.records[sha256])

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        self.asked.append((sha256, offset))
        return self.answer(offset, self.records[sha256][offset : offset + length])


@contextmanager
def peers(**shelves: Shelf) -> Iterator[Puller]:
    context, over = zmq.Context(), threading.Event()
    places, servers = {}, []
    for name, shelf in shelves.items():
        socket = make_socket(context, zmq.ROUTER, "weights")
        port = bind(socket, Address("127.0.0.1", 0), "weights")
        places[name] = Endpoints(address="127.0.0.1", expert=1, weights=port, client=1, session=1)
        servers.append(WeightsServer(socket, shelf, over.is_set))
        servers[-1].start()
    try:
        yield Puller(context, places.get, stopped=over.is_set)
    finally:
        over.set()
        for server in servers:
            server.join()
        context.destroy(linger=0)


def wanted(record: bytes, *sources: str) -> Wanted:
    return Wanted(hashlib.sha256(record).hexdigest(), len(record), deque(sources))


def pulled(puller: Puller, *records: Wanted) -> dict[str, bytes]:
    return {record.sha256: bytes(record.data) for record in puller.pull(records)}


def test_a_record_of_several_chunks_arrives_whole() -> None:
    with peers(b=Shelf(BIG)) as puller:
        assert pulled(puller, wanted(BIG, "b")) == {NAME: BIG}


def test_what_is_here_of_a_record_is_not_asked_for_again() -> None:
    """The first source fails after a chunk; the next one is asked for the rest alone."""

    def fail_later(offset: int, data: bytes) -> bytes:
        if offset:
            raise OSError("the disk is gone")
        return data

    broken, sound = Shelf(BIG, answer=fail_later), Shelf(BIG)
    with peers(b=broken, c=sound) as puller:
        assert pulled(puller, wanted(BIG, "b", "c")) == {NAME: BIG}
    assert broken.asked[0] == (NAME, 0)
    assert [offset for _, offset in sound.asked] == [CHUNK_BYTES, 2 * CHUNK_BYTES]


def test_a_record_with_another_sha256_is_fetched_from_the_next_source_from_its_beginning() -> None:
    damaged, sound = Shelf(BIG, answer=lambda _, data: bytes(len(data))), Shelf(BIG)
    with peers(b=damaged, c=sound) as puller:
        assert pulled(puller, wanted(BIG, "b", "c")) == {NAME: BIG}
    assert sound.asked[0] == (NAME, 0)


def test_several_sources_each_give_what_is_asked_of_them() -> None:
    small = [bytes([n]) * 100 for n in range(6)]
    b, c = Shelf(*small), Shelf(*small)
    with peers(b=b, c=c) as puller:
        got = pulled(puller, *(wanted(record, "bc"[n % 2]) for n, record in enumerate(small)))
    assert sorted(got.values()) == small
    assert len(b.asked) == len(c.asked) == 3


def test_a_source_that_is_not_there_or_has_nothing_is_passed_over() -> None:
    with peers(b=Shelf(), c=Shelf(BIG)) as puller:
        assert pulled(puller, wanted(BIG, "gone", "b", "c")) == {NAME: BIG}


def test_a_silent_source_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.transfer.SOURCE_SILENCE_S", 0.3)

    def hang(_: int, data: bytes) -> bytes:
        time.sleep(1)
        return data

    with peers(b=Shelf(BIG, answer=hang), c=Shelf(BIG)) as puller:
        assert pulled(puller, wanted(BIG, "b", "c")) == {NAME: BIG}


def test_without_a_source_left_the_record_and_the_last_reason_are_named() -> None:
    with peers(b=Shelf()) as puller, pytest.raises(RecordUnavailable, match=f"{NAME[:12]}.*b: has no such record"):
        pulled(puller, wanted(BIG, "b"))
