"""How weights lie in a record of lower precision than the checkpoint's: codes, and what turns them back into weights.

Decides where each of them is in the record, and how many bytes that takes. Must not know how codes are made
(`runtime.precision`). Next to each other along a weight matrix's input axis, `group` weights share one scale.
"""

import math
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import Field, model_validator

from schemas.base import FrozenModel
from schemas.model import DTYPE_ITEMSIZE

LowPrecision = Literal["int8", "int4"]
Precision = Literal["checkpoint", "int8", "int4"]
PartName = Literal["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"]

BIASES: Final[tuple[PartName, ...]] = ("gate_up_proj_bias", "down_proj_bias")
"""Parts that are kept as they are."""
LOW_PRECISIONS: Final[tuple[LowPrecision, ...]] = get_args(LowPrecision)
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)  # the most bits first

INT4_GROUP: Final = 32
"""Weights of an int4 group."""

_CODES_OF_A_BYTE: Final[dict[LowPrecision, int]] = {"int8": 1, "int4": 2}
_GROUP_BYTES: Final[dict[LowPrecision, int]] = {"int8": 4, "int4": 4}
"""Of each group: a float32 scale; a bfloat16 scale and a bfloat16 minimum."""


class PackedPart(FrozenModel):
    """One tensor of a packed record, from `offset` bytes on: codes, then scales, then (int4) minima.

    Attributes
    ----------
    shape
        Of the tensor, as `schemas.store.Part` has it.
    axis, group
        The input axis of a weight matrix and how many weights along it share a scale. None: the tensor is kept as it
        is, in the record's dtype (biases).
    """

    name: PartName
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    offset: Annotated[int, Field(ge=0)]
    axis: Annotated[int, Field(ge=0)] | None = None
    group: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _groups_divide_the_axis(self) -> Self:
        if (self.axis is None) != (self.group is None):
            raise ValueError(f"part {self.name}: axis and group belong together")
        if self.axis is not None and self.group is not None:
            if self.axis >= len(self.shape):
                raise ValueError(f"part {self.name}: has no axis {self.axis}")
            if self.shape[self.axis] % self.group:
                raise ValueError(f"part {self.name}: groups of {self.group} do not divide {self.shape[self.axis]}")
        return self

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_groups(self) -> int:
        """Number of groups; 0 where the tensor is kept as it is."""
        return 0 if self.group is None else self.elements // self.group

    def grouped(self) -> tuple[int, int, int, int]:
        """Return the shape in which the third axis runs through a group, [outer, groups, group, inner]."""
        axis, group = self.axis or 0, self.group or 1
        return (
            math.prod(self.shape[:axis]),
            self.shape[axis] // group,
            group,
            math.prod(self.shape[axis + 1 :]),
        )


class PackedLayout(FrozenModel):
    """The layout of every record of a model at a low precision: `bytes` are the parts without any gap.

    `dtype` is what the weights were before, and are again when they are used.
    """

    precision: LowPrecision
    dtype: Literal["float32", "float16", "bfloat16"]
    bytes: Annotated[int, Field(ge=1)]
    parts: Annotated[tuple[PackedPart, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _parts_fill_the_record(self) -> Self:
        offset = 0
        for part in self.parts:
            if part.offset != offset:
                raise ValueError(f"part {part.name} is at {part.offset}, expected {offset}")
            if part.group is not None and part.group % _CODES_OF_A_BYTE[self.precision]:
                raise ValueError(f"part {part.name}: groups of {part.group} do not fill bytes")
            offset += sum(self.sizes(part))
        if offset != self.bytes:
            raise ValueError(f"parts take {offset} bytes, the record says {self.bytes}")
        return self

    def sizes(self, part: PackedPart) -> tuple[int, int]:
        """Return the bytes of a part's codes, and of what each group needs; all in the first if it is kept as it is."""
        return part_sizes(part, self.precision, self.dtype)


def packed_matrix_bytes(elements: int, inputs: int, precision: LowPrecision) -> int | None:
    """Return what a weight matrix takes when packed; None where groups do not divide its input axis of `inputs`.

    >>> packed_matrix_bytes(64 * 64, 64, "int8"), packed_matrix_bytes(64 * 48, 48, "int4")
    (4352, None)
    """
    group = inputs if precision == "int8" else INT4_GROUP
    if inputs % group:
        return None
    return elements // _CODES_OF_A_BYTE[precision] + elements // group * _GROUP_BYTES[precision]


def part_sizes(part: PackedPart, precision: LowPrecision, dtype: str) -> tuple[int, int]:
    """Return what `PackedLayout.sizes` does, before there is a layout."""
    if part.group is None:
        return part.elements * DTYPE_ITEMSIZE[dtype], 0
    return part.elements // _CODES_OF_A_BYTE[precision], part.num_groups * _GROUP_BYTES[precision]
