"""Manifest of a store: which expert records a directory holds, how one is laid out and how it is computed.

Decides what must be known about a record to verify, send and execute it without the checkpoint it came from.
Must not know how records are made or read (`runtime.store`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from schemas.base import FrozenModel
from schemas.files import Fault
from schemas.model import DTYPE_ITEMSIZE, ModelSpec
from schemas.precision import LowPrecision, PackedLayout, PartName

STORE_FORMAT: Final = "expertmesh-store-1"
MANIFEST_NAME: Final = "manifest.json"
RECORDS_NAME: Final = "records.bin"
RECORD_ALIGNMENT: Final = 4096

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(FrozenModel):
    """One tensor of a record: row-major, at `offset` bytes from the record's start."""

    name: PartName
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    offset: Annotated[int, Field(ge=0)]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class ExpertForm(FrozenModel):
    """How an expert computes.

    Attributes
    ----------
    kind
        ``swiglu``: gate_up_proj [2F, D] and down_proj [D, F] as in a linear layer, gate half first.
        ``gpt_oss``: gate_up_proj [D, 2F] and down_proj [F, D] with biases, gate and up interleaved and clamped.
    activation
        Name of the gate's activation in transformers; unused by gpt_oss.
    alpha, limit
        Only of gpt_oss: the sigmoid's slope and where gate and up are clamped.
    """

    kind: Literal["swiglu", "gpt_oss"]
    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0


class RecordLayout(FrozenModel):
    """The layout of every record of a model at one dtype: `bytes` are the parts without any gap."""

    form: ExpertForm
    dtype: Literal["float32", "float16", "bfloat16"]
    bytes: Annotated[int, Field(ge=1)]
    parts: Annotated[tuple[Part, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _parts_fill_the_record(self) -> Self:
        itemsize, offset = DTYPE_ITEMSIZE[self.dtype], 0
        for part in self.parts:
            if part.offset != offset:
                raise ValueError(f"part {part.name} is at {part.offset}, expected {offset}")
            offset += part.elements * itemsize
        if offset != self.bytes:
            raise ValueError(f"parts take {offset} bytes, the record says {self.bytes}")
        return self


class StoreRecord(FrozenModel):
    """Where the record of an expert lies in the records file, and its sha256, which is its name everywhere else."""

    layer: Annotated[int, Field(ge=0)]
    expert: Annotated[int, Field(ge=0)]
    offset: Annotated[int, Field(ge=0, multiple_of=RECORD_ALIGNMENT)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Sha256

    @property
    def key(self) -> tuple[int, int]:
        """(layer, expert)."""
        return self.layer, self.expert


class TrunkPart(FrozenModel):
    """A part of the trunk at rest: one decoder layer without its routed experts, the embedding, or norm and head.

    The record is a safetensors file of the part's tensors, under the names that the whole model's parameters have.
    `layer` is the decoder layer; 0 for the embedding, the last one for the head.
    """

    part: Literal["embedding", "layer", "head"]
    layer: Annotated[int, Field(ge=0)]
    sha256: Sha256
    bytes: Annotated[int, Field(ge=1)]


class StoredTrunkPart(TrunkPart):
    """A part of the trunk, and where its record lies in the records file."""

    offset: Annotated[int, Field(ge=0, multiple_of=RECORD_ALIGNMENT)]

    @property
    def key(self) -> tuple[Literal["embedding", "layer", "head"], int]:
        """(part, layer)."""
        return self.part, self.layer


class PackedRecords(FrozenModel):
    """The records of every expert at one low precision, sorted by layer and expert."""

    layout: PackedLayout
    records: Annotated[tuple[StoreRecord, ...], Field(min_length=1)]


class StoreManifest(FrozenModel):
    """What a store holds: every expert of `model` at `dtype`, sorted by layer and expert, and the trunk.

    Attributes
    ----------
    trunk
        Empty in stores that were made before it travelled: nodes then need the checkpoint itself.
    packed
        Experts once more in low precisions, each at most once; in old stores none.
    """

    format: Literal["expertmesh-store-1"] = STORE_FORMAT
    model: ModelSpec
    dtype: Literal["float32", "float16", "bfloat16"]
    layout: RecordLayout
    records: Annotated[tuple[StoreRecord, ...], Field(min_length=1)]
    trunk: tuple[StoredTrunkPart, ...] = ()
    packed: tuple[PackedRecords, ...] = ()

    def packed_as(self, precision: LowPrecision) -> PackedRecords | None:
        """Return the records of a low precision; None where there are none."""
        return next((each for each in self.packed if each.layout.precision == precision), None)


def manifest_faults(manifest: StoreManifest) -> Iterator[Fault]:
    """Yield what in a well-formed manifest contradicts itself."""
    model, layout = manifest.model, manifest.layout
    if manifest.dtype != layout.dtype:
        yield Fault("layout.dtype", f"is {layout.dtype}, the store says {manifest.dtype}")
    if layout.bytes != model.expert_bytes:
        yield Fault("layout.bytes", f"is {layout.bytes}, the model's experts have {model.expert_bytes}")
    yield from _record_faults("records", manifest.records, layout.bytes, model)
    last = model.num_decoder_layers - 1
    parts = [("embedding", 0), *(("layer", layer) for layer in range(last + 1)), ("head", last)]
    if manifest.trunk and [part.key for part in manifest.trunk] != parts:
        yield Fault("trunk", f"does not list embedding, layers 0 … {last} and head once, in order")
    for index, packed in enumerate(manifest.packed):
        if packed.layout.precision in {each.layout.precision for each in manifest.packed[:index]}:
            yield Fault(f"packed[{index}].layout.precision", f"is {packed.layout.precision} once more")
        shapes = [(part.name, part.shape) for part in packed.layout.parts]
        if packed.layout.dtype != layout.dtype or shapes != [(part.name, part.shape) for part in layout.parts]:
            yield Fault(f"packed[{index}].layout", "is of other weights than the store's own layout")
        yield from _record_faults(f"packed[{index}].records", packed.records, packed.layout.bytes, model)


def _record_faults(where: str, records: Sequence[StoreRecord], size: int, model: ModelSpec) -> Iterator[Fault]:
    wanted = [(layer, expert) for layer in range(model.layers) for expert in range(model.experts)]
    if [record.key for record in records] != wanted:
        yield Fault(where, f"do not list every one of {model.layers} × {model.experts} experts once, in order")
    for index, record in enumerate(records):
        if record.bytes != size:
            yield Fault(f"{where}[{index}].bytes", f"is {record.bytes}, the layout says {size}")
