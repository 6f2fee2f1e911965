"""How bytes of a file come into memory: through the kernel's page cache, or past it.

Decides when what was asked to be read directly is read through the cache all the same: where the file system, or the
platform, knows no direct reads. Through the cache a record that was read before may come from memory that nobody
counts; past it a record always comes from the disk, sooner than through a cold cache and later than from a warm one,
and takes none of the machine's memory. Must not know what is in the bytes.
"""

import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, Protocol, get_args

log = logging.getLogger(__name__)

ReadWay = Literal["cached", "direct"]
READ_WAYS: Final[tuple[ReadWay, ...]] = get_args(ReadWay)

_BLOCK: Final = 4096  # offsets, lengths and addresses of direct reads are multiples of it, which every disk takes
_REFUSALS: Final = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_DIRECT: Final = getattr(os, "O_DIRECT", 0)  # not on every platform


class Reads(Protocol):
    """A way of reading."""

    def read(self, file: Path, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill the parts one after another from an offset of a file.

        Raises
        ------
        OSError
            It cannot be read.
        EOFError
            It ends before the parts are full.
        """
        ...


class CachedReads:
    """Through the page cache, without reading ahead: what lies behind a record is another expert."""

    def read(self, file: Path, offset: int, parts: Sequence[memoryview]) -> None:
        """Read straight into the parts."""
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, offset, 0, os.POSIX_FADV_RANDOM)
            _read_all(descriptor, parts, offset)
        finally:
            os.close(descriptor)


def _read_all(descriptor: int, parts: Sequence[memoryview], offset: int) -> None:
    """Fill the parts, however few bytes one call brings."""
    left = list(parts)
    while left:
        count = os.preadv(descriptor, left, offset)
        if count == 0:
            raise EOFError
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


class DirectReads:
    """Past the page cache, into aligned memory of the thread's own and from there into the parts. Thread-safe."""

    def __init__(self) -> None:
        self._refused: set[Path] = set()
        self._own = threading.local()

    def read(self, file: Path, offset: int, parts: Sequence[memoryview]) -> None:
        """Read whole blocks; through the cache in a directory whose file system refuses that."""
        if not _DIRECT or file.parent in self._refused:
            CACHED.read(file, offset, parts)
            return
        skipped = offset % _BLOCK
        needed = skipped + sum(map(len, parts))
        buffer = self._buffer(-(-needed // _BLOCK) * _BLOCK)
        try:
            _read_blocks(file, offset - skipped, buffer, needed)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self._refused.add(file.parent)
            log.info("%s: has no direct reads; its records are read through the page cache", file.parent)
            CACHED.read(file, offset, parts)
            return
        for part in parts:
            part[:] = buffer[skipped : skipped + len(part)]
            skipped += len(part)

    def _buffer(self, size: int) -> memoryview:
        """Return memory of this thread that begins at a page."""
        known: memoryview | None = getattr(self._own, "buffer", None)
        if known is None or len(known) < size:
            known = self._own.buffer = memoryview(mmap.mmap(-1, size))
        return known[:size]


def _read_blocks(file: Path, offset: int, buffer: memoryview, needed: int) -> None:
    """Fill a buffer of whole blocks; a file may end within the last one."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
    try:
        done = 0
        while done < needed:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            done += count
            if done < needed and (count == 0 or done % _BLOCK):
                raise EOFError
    finally:
        os.close(descriptor)


CACHED: Final = CachedReads()


def reads_of(way: ReadWay) -> Reads:
    """Return a way of reading by its name."""
    return CACHED if way == "cached" else DirectReads()
