"""Reading records through the page cache and past it: the same bytes, the same faults, and a way back where it is refused."""

import hashlib
import logging
from pathlib import Path

import pytest

from runtime.errors import DamagedRecord
from runtime.reads import CACHED, READ_WAYS, DirectReads, reads_of
from runtime.records import RecordFile

SIZE = 10_000  # no multiple of anything
DATA = bytes(range(256)) * 40


@pytest.fixture(params=READ_WAYS)
def way(request):
    return reads_of(request.param)


@pytest.fixture
def store(tmp_path):
    """Three records at aligned offsets; the last one ends where the file does."""
    path = tmp_path / "records.bin"
    path.write_bytes(b"".join(DATA[:SIZE].ljust(12_288, b"\0") for _ in range(2)) + DATA[:SIZE])
    return path


def record(path, way, offset=0, data=DATA[:SIZE]):
    return RecordFile(path, hashlib.sha256(data).hexdigest(), offset, way)


def parts_of(*sizes):
    buffers = [bytearray(size) for size in sizes]
    return buffers, [memoryview(each) for each in buffers]


@pytest.mark.parametrize("offset", [0, 12_288, 24_576])
def test_every_record_is_read_the_short_last_one_too(store, way, offset):
    buffers, parts = parts_of(1, 4_095, 5_904)
    record(store, way, offset).read_into(parts, check=True)
    assert b"".join(buffers) == DATA[:SIZE]


def test_an_offset_need_not_be_aligned(store, way):
    buffers, parts = parts_of(300)
    way.read(store, 12_288 + 77, parts)
    assert bytes(buffers[0]) == DATA[77:377]


def test_a_flipped_bit_is_refused(store, way):
    content = bytearray(store.read_bytes())
    content[12_288 + 5_000] ^= 1
    store.write_bytes(content)
    with pytest.raises(DamagedRecord, match="its sha256 is another than promised"):
        record(store, way, 12_288).read_into(parts_of(SIZE)[1], check=True)
    record(store, way).read_into(parts_of(SIZE)[1], check=True)


@pytest.mark.parametrize("length", [0, 4_096, 30_000, 34_575])
def test_a_file_that_was_cut_is_told_of(store, way, length):
    store.write_bytes(store.read_bytes()[:length])
    with pytest.raises(DamagedRecord, match="it was cut short"):
        record(store, way, 24_576).read_into(parts_of(SIZE)[1], check=False)


def test_a_file_that_is_gone_is_told_of(tmp_path, way):
    with pytest.raises(DamagedRecord, match="No such file"):
        record(tmp_path / "none", way).read_into(parts_of(SIZE)[1], check=True)


def test_where_the_file_system_knows_no_direct_reads_the_cache_is_used(caplog):
    file, way = Path("/proc/version"), DirectReads()
    data = file.read_bytes()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            buffers, parts = parts_of(len(data))
            record(file, way, data=data).read_into(parts, check=True)
            assert bytes(buffers[0]) == data
    assert [each.message for each in caplog.records] == [
        "/proc: has no direct reads; its records are read through the page cache"
    ]


def test_sources_are_the_same_however_they_are_read(tmp_path):
    one, other = (RecordFile(tmp_path, "00", 4096, way) for way in (CACHED, DirectReads()))
    assert one == other
    assert hash(one) == hash(other)
