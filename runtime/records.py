"""Where the record of an expert can be read from, straight into the memory where it is used.

Decides what counts as damage: other bytes than the sha256 says, fewer of them, or a disk that returns an error. Flow:
`reads` into the parts of a slot → checked where the caller asks for it. Must not know who needs the record or why.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from runtime.errors import DamagedRecord, InvalidInput, RuntimeFault, writing
from runtime.reads import CACHED, Reads
from schemas.checkpoint import Checkpoint
from schemas.store import RecordLayout

log = logging.getLogger(__name__)


class Source(Protocol):
    """One place where a record lies. Hashable; two that are equal have the same bytes."""

    def read_into(self, parts: Sequence[memoryview], *, check: bool) -> None:
        """Fill the parts of a record in their order. Raises `DamagedRecord`, after which the parts are undefined.

        Parameters
        ----------
        check
            Compare with the sha256; a source that cannot be damaged need not.
        """
        ...


@dataclass(frozen=True)
class RecordFile:
    """A record at an offset of a file, or a file of its own."""

    file: Path
    sha256: str
    offset: int = 0
    reads: Reads = field(default=CACHED, compare=False, repr=False)

    def read_into(self, parts: Sequence[memoryview], *, check: bool) -> None:
        """Read it, whole or not at all."""
        try:
            self.reads.read(self.file, self.offset, parts)
        except OSError as error:
            raise DamagedRecord(self.file, error.strerror or str(error)) from error
        except EOFError as error:
            raise DamagedRecord(self.file, "it was cut short") from error
        if check:
            _check(self.file, parts, self.sha256)


def _check(where: Path | str, parts: Sequence[memoryview], sha256: str) -> None:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    if digest.hexdigest() != sha256:
        raise DamagedRecord(where, "its sha256 is another than promised")


@dataclass(frozen=True)
class CheckpointExpert:
    """An expert whose record is made from the checkpoint's own tensors whenever it is read; nothing names its bytes."""

    checkpoint: Checkpoint
    layout: RecordLayout
    key: tuple[int, int]

    def __hash__(self) -> int:
        """Hash without the checkpoint's tables."""
        return hash(self.key)

    def read_into(self, parts: Sequence[memoryview], *, check: bool) -> None:  # noqa: ARG002
        """Make the record."""
        from runtime.store import read_record

        scatter(read_record(self.checkpoint, self.layout, self.key), parts)


@dataclass(frozen=True)
class FetchedRecord:
    """A record that somebody else brings: other nodes."""

    sha256: str
    fetch: Callable[[str], bytes | bytearray | memoryview]

    def read_into(self, parts: Sequence[memoryview], *, check: bool) -> None:  # noqa: ARG002
        """Fetch it by its name; whoever brings it has checked it."""
        try:
            scatter(self.fetch(self.sha256), parts)
        except (RuntimeFault, OSError, ValueError) as error:
            raise DamagedRecord(f"record {self.sha256[:12]}… at other nodes", str(error)) from error


def scatter(record: bytes | bytearray | memoryview, parts: Sequence[memoryview]) -> None:
    """Copy a record into its parts; raises ValueError where the sizes differ."""
    view, start = memoryview(record), 0
    for part in parts:
        part[:] = view[start : start + len(part)]
        start += len(part)
    if start != len(view):
        raise ValueError(f"a record of {len(view)} bytes does not fit parts of {start}")


def read_first(
    sources: Sequence[Source], parts: Sequence[memoryview], checked: set[Source]
) -> tuple[Source | None, dict[Source, str]]:
    """Read a record from the first source that is intact; returns it, and the damaged ones with what is wrong.

    Parameters
    ----------
    checked
        Sources whose sha256 was found right; others are checked, and added. Modified.
    """
    damaged: dict[Source, str] = {}
    for source in sources:
        try:
            source.read_into(parts, check=source not in checked)
        except DamagedRecord as error:
            log.warning("%s; it is looked for elsewhere", error)
            checked.discard(source)
            damaged[source] = str(error)
        else:
            checked.add(source)
            return source, damaged
    return None, damaged


def write_record(directory: Path | None, record: bytes | bytearray | memoryview) -> Path:
    """Write a record into a file named by its sha256, whole or not at all; returns the file."""
    if directory is None:
        raise InvalidInput("the disk tier has a budget but no directory for its records; name one")
    file = directory / hashlib.sha256(record).hexdigest()
    if file.is_file() and file.stat().st_size == len(record):
        return file
    with writing(file, needed=len(record)):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=directory, prefix=".record.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(record)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink()
            raise
    return file
