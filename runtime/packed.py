"""Records of lower precision as sources: weights out of a packed record, and a packed record made anew from weights.

Decides nothing: rounding weights to codes gives the same bytes whenever it is done, so that what a damaged packed
record held can be had from the checkpoint's own record. Must not know where the records lie (`runtime.records`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.precision import pack_record, unpack_parts, views_of
from runtime.records import Source, scatter
from schemas.precision import PackedLayout
from schemas.store import RecordLayout


@dataclass(frozen=True)
class Repacked:
    """A packed record that is made from a record of weights whenever it is read."""

    source: Source
    layout: RecordLayout
    packed: PackedLayout

    def __hash__(self) -> int:
        """Hash without the layouts."""
        return hash((self.source, self.packed.precision))

    def read_into(self, parts: Sequence[memoryview], *, check: bool) -> None:
        """Read the weights and pack them."""
        record = bytearray(self.layout.bytes)
        self.source.read_into([memoryview(record)], check=check)
        scatter(pack_record(record, self.packed), parts)


@dataclass(frozen=True)
class Unpacked:
    """A record of weights that is made from a packed one whenever it is read."""

    source: Source
    layout: RecordLayout
    packed: PackedLayout

    def __hash__(self) -> int:
        """Hash without the layouts."""
        return hash((self.source, self.packed.precision, "weights"))

    def read_into(self, parts: Sequence[memoryview], *, check: bool) -> None:
        """Read the packed record and unpack it into the parts."""
        record = bytearray(self.packed.bytes)
        self.source.read_into([memoryview(record)], check=check)
        unpack_parts(torch.frombuffer(record, dtype=torch.uint8), self.packed, views_of(self.layout, parts))


def bytes_read(source: Source, filled: int) -> int:
    """Return how many bytes it took to read a record that fills so many: those of what lies at its source."""
    match source:
        case Unpacked(source=Repacked(layout=layout)) | Repacked(layout=layout):
            return layout.bytes
        case Unpacked(packed=packed):
            return packed.bytes
    return filled
