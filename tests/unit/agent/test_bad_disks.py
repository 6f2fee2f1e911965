"""Disks as they fail: one that is really full, one whose reads really return an error."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from agent.errors import JournalUnwritable
from agent.holdings import Holdings
from agent.journal import Journal
from agent.machine import AgentState
from runtime.errors import DiskFull, ExpertLost
from runtime.slots import Residency
from runtime.store import Store
from runtime.timeline import Process, Span, write_trace
from schemas.files import CannotWrite
from schemas.messages import AssignedReplica, Record
from schemas.topology import Tier
from tests.families import make_checkpoint, make_store

PAGE = 4096


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("disks")
    return make_store(make_checkpoint("qwen3_moe", directory / "model"), directory / "store")


@pytest.fixture
def disk(tmp_path: Path, store: Store) -> Iterator[Path]:
    """A file system with room for four records and a little more."""
    path = tmp_path / "disk"
    path.mkdir()
    size = 4 * store.manifest.layout.bytes + 16 * PAGE
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def replica(store: Store, expert: int, tier: Tier) -> tuple[AssignedReplica, bytes]:
    name = store.by_key[0, expert].sha256
    record = Record(layer=0, expert=expert, sha256=name, bytes=store.manifest.layout.bytes)
    return AssignedReplica(record=record, tier=tier, sources=("other",)), store.read(name)


def holdings_on(store: Store, data: Path, fetch: Callable[[AssignedReplica], bytes] | None = None) -> Holdings:
    size = store.manifest.layout.bytes
    residency = Residency(store.manifest.layout, {"device": 8 * size, "disk": 8 * size}, data / "records")
    holdings = Holdings(residency, None, data, disk_budget=8 * size, fetch=fetch)
    holdings.open({})
    return holdings


def fill(disk: Path, *, leave: int) -> Path:
    """Let somebody else take all of a disk but so many bytes."""
    file = disk / "somebody else's"
    free = shutil.disk_usage(disk).free
    file.write_bytes(bytes(free - leave))
    return file


def test_a_disk_that_somebody_else_fills_meanwhile(store: Store, disk: Path) -> None:
    """The room was there when it was asked for."""
    holdings = holdings_on(store, disk / "data")
    fill(disk, leave=2 * PAGE)
    each, record = replica(store, 0, "disk")
    with pytest.raises(DiskFull, match=r"no room on the disk: .* needed, .* free; nothing was written; free some"):
        holdings.hold(each, record)
    assert not list((disk / "data" / "records").iterdir())
    assert holdings.residency.used()["disk"] == 0
    on_device, record = replica(store, 1, "device")
    holdings.hold(on_device, record)  # without a backing copy, which merely saves time
    assert (holdings.backing_bytes, holdings.find(on_device)) == (0, record)


def test_a_journal_on_a_full_disk_keeps_what_it_had(store: Store, disk: Path) -> None:
    journal = Journal(disk / "agent.journal", "n0")
    journal.write(AgentState(retired=1))
    fill(disk, leave=0)
    with pytest.raises(JournalUnwritable, match=r"cannot be written: .* free some space there"):
        journal.write(AgentState(cluster="x" * 100_000))
    journal.close()
    assert Journal(disk / "agent.journal", "n0").state == AgentState(retired=1)


def test_nothing_is_left_of_a_trace_that_does_not_fit(disk: Path) -> None:
    fill(disk, leave=2 * PAGE)
    spans = [Span("steps", f"token {number}", number, number + 1, {}) for number in range(1000)]
    with pytest.raises(CannotWrite, match=r"trace\.json: cannot be written: No space left on device"):
        write_trace(disk / "trace.json", [Process("n0", spans)])
    assert [file.name for file in disk.iterdir()] == ["somebody else's"]


def break_reads(file: Path) -> None:
    """Let every read of a file return EIO, as the kernel does at an address that nobody has."""
    file.unlink(missing_ok=True)
    file.symlink_to("/proc/self/mem")
    with file.open("rb", buffering=0) as stream, pytest.raises(OSError, match="Input/output error"):
        stream.read(1)


def test_a_record_that_cannot_be_read_is_fetched_elsewhere(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetched = []

    def fetch(wanted: AssignedReplica) -> bytes:
        fetched.append(wanted.record.expert)
        return record

    each, record = replica(store, 3, "disk")
    holdings = holdings_on(store, tmp_path, fetch)
    holdings.hold(each, record)
    with holdings.residency.borrow(0, [3]) as (lent,):
        want = lent.weights.down.clone()
    break_reads(tmp_path / "records" / each.record.sha256)
    with holdings.residency.borrow(0, [3]) as (lent,):
        assert torch.equal(lent.weights.down, want)
    assert fetched == [3]
    assert "Input/output error; it is looked for elsewhere" in caplog.text


def test_a_record_that_is_nowhere_else_is_lost_and_named(store: Store, tmp_path: Path) -> None:
    each, record = replica(store, 3, "disk")
    holdings = holdings_on(store, tmp_path)
    holdings.hold(each, record)
    break_reads(tmp_path / "records" / each.record.sha256)
    with (
        pytest.raises(ExpertLost, match=r"layer 0 expert 3: no intact record is left: .*Input/output error"),
        holdings.residency.borrow(0, [3]),
    ):
        pass


def test_a_copy_that_cannot_be_read_is_none_when_an_epoch_is_prepared(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is pulled again, instead of the preparation failing with it."""
    holdings = holdings_on(store, tmp_path)
    each, _ = replica(store, 2, "device")
    break_reads(tmp_path / "backing" / each.record.sha256)
    with caplog.at_level(logging.WARNING):
        assert holdings.find(each) is None
    assert "cannot be read: Input/output error; it is fetched again" in caplog.text
    assert not (tmp_path / "backing" / each.record.sha256).is_symlink()
