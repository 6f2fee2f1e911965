"""Weights in fewer bits: how they are rounded to codes, and what the codes stand for. Pure.

Decides the codes. int8: symmetric, one float32 scale for each output (all weights that one output sums over). int4:
groups of 32 weights along the input axis, each with a bfloat16 scale and minimum; two codes share a byte, those of the
matrix' first half in its low bits and those of its second half in its high bits. Minima cost half a bit per weight, and
err less (rms, tinymoe-base) than symmetric codes in smaller groups of as many bytes. Every weight comes back within
half a scale of itself, and as the same bits wherever it is unpacked: one product, then (int4) one sum, each rounded
once.

Flow: record of weights → `pack_record` → packed record → `unpack_parts` → weights in their dtype. Must not know which
experts are held how.
"""

from collections.abc import Sequence
from typing import Final

import torch

from runtime.errors import InvalidInput
from runtime.tensors import torch_dtype
from schemas.model import DTYPE_ITEMSIZE
from schemas.precision import BIASES, INT4_GROUP, LowPrecision, PackedLayout, PackedPart, PartName, part_sizes
from schemas.store import RecordLayout

GROUP: Final = INT4_GROUP
"""Weights of an int4 group."""

Buffer = bytes | bytearray | memoryview


class UnfitPrecision(InvalidInput):
    """Weights whose shape has no place for the groups of a precision."""

    def __init__(self, precision: LowPrecision, name: str, shape: Sequence[int], *, size: int, group: int) -> None:
        self.precision, self.part, self.size, self.group = precision, name, size, group
        super().__init__(
            f"{precision} does not fit this model: {name} {list(shape)} has an input axis of {size}, which "
            f"groups of {group} do not divide; use int8, which needs no groups, or the checkpoint's dtype"
        )


def packed_layout(layout: RecordLayout, precision: LowPrecision) -> PackedLayout:
    """Return how records of `layout` are packed.

    Raises
    ------
    UnfitPrecision
        Groups do not divide the input axis of a part.
    """
    parts: list[PackedPart] = []
    offset = 0
    for part in layout.parts:
        axis = None if part.name in BIASES else 0 if layout.form.kind == "gpt_oss" else 1
        packed = _packed_part(part.name, part.shape, axis=axis, precision=precision, offset=offset)
        parts.append(packed)
        offset += sum(part_sizes(packed, precision, layout.dtype))
    return PackedLayout(precision=precision, dtype=layout.dtype, bytes=offset, parts=tuple(parts))


def _packed_part(
    name: PartName, shape: tuple[int, ...], *, axis: int | None, precision: LowPrecision, offset: int = 0
) -> PackedPart:
    group = None
    if axis is not None:
        group = shape[axis] if precision == "int8" else GROUP
        if shape[axis] % group:
            raise UnfitPrecision(precision, name, shape, size=shape[axis], group=group)
    return PackedPart(name=name, shape=shape, offset=offset, axis=axis, group=group)


def rounded(weights: torch.Tensor, *, name: PartName, axis: int, precision: LowPrecision) -> torch.Tensor:
    """Return a weight matrix as it comes back from codes; `axis` is its input axis.

    Raises
    ------
    UnfitPrecision
        Groups do not divide that axis.
    """
    part = _packed_part(name, tuple(weights.shape), axis=axis, precision=precision)
    codes, *groups = (piece.contiguous().view(-1).view(torch.uint8) for piece in quantise(weights, part, precision))
    out = torch.empty(part.shape, dtype=weights.dtype)
    _dequantise(codes, torch.cat(groups), part, precision, out)
    return out


def pack_record(record: Buffer, packed: PackedLayout) -> bytes:
    """Return a record of weights as a packed record."""
    data = torch.frombuffer(bytearray(record), dtype=torch_dtype(packed.dtype))
    pieces, start = [], 0
    for part in packed.parts:
        weights = data[start : start + part.elements].view(part.shape)
        start += part.elements
        pieces += [weights] if part.group is None else quantise(weights, part, packed.precision)
    return b"".join(piece.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for piece in pieces)


def quantise(weights: torch.Tensor, part: PackedPart, precision: LowPrecision) -> list[torch.Tensor]:
    """Return codes and scales (int8), or codes, scales and minima (int4), of weights of the part's shape."""
    grouped = weights.float().reshape(part.grouped())  # [outer, groups, group, inner]
    return _to_int8(grouped) if precision == "int8" else _to_int4(grouped)


def _to_int8(grouped: torch.Tensor) -> list[torch.Tensor]:
    """Round to -127 … 127 times the scale."""
    scale = _no_zeros(grouped.abs().amax(2, keepdim=True) / 127)
    return [(grouped / scale).round().clamp(-127, 127).to(torch.int8), scale]


def _to_int4(grouped: torch.Tensor) -> list[torch.Tensor]:
    """Round to the minimum plus 0 … 15 times the scale, which reach from below the least to above the largest."""
    least, most = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    minimum = -_rounded_up(-least)
    scale = _no_zeros(_rounded_up((most - minimum.float()) / 15))
    codes = ((grouped - minimum.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
    low, high = codes.view(-1).chunk(2)
    return [low | (high << 4), scale, minimum]


def _rounded_up(values: torch.Tensor) -> torch.Tensor:
    """Return the least bfloat16 that are not below float32 values."""
    rounded = values.bfloat16()
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < values, above, rounded)


def _no_zeros(scale: torch.Tensor) -> torch.Tensor:
    """Return scales by which can be divided: weights that are all alike need none."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def unpack_parts(record: torch.Tensor, packed: PackedLayout, parts: Sequence[torch.Tensor]) -> None:
    """Turn a packed record back into weights, which `parts` are overwritten with, in their order, each of its shape.

    Parameters
    ----------
    record
        uint8 [bytes], on the parts' device.
    """
    for part, out in zip(packed.parts, parts, strict=True):
        codes_bytes, group_bytes = packed.sizes(part)
        codes = record[part.offset : part.offset + codes_bytes]
        if part.group is None:
            out.view(-1).view(torch.uint8).copy_(codes)
            continue
        start = part.offset + codes_bytes
        _dequantise(codes, record[start : start + group_bytes], part, packed.precision, out)


def _dequantise(
    codes: torch.Tensor, groups: torch.Tensor, part: PackedPart, precision: LowPrecision, out: torch.Tensor
) -> None:
    """Convert, then multiply (and add) in place: quicker than operations of mixed types, which do not vectorise."""
    outer, count, _, inner = part.grouped()
    values = out if out.dtype == torch.float32 else torch.empty(part.shape, device=out.device)
    grouped, flat = values.view(part.grouped()), values.view(-1)
    if precision == "int8":
        flat.copy_(codes.view(torch.int8))
        grouped.mul_(_typed(groups, torch.float32).view(outer, count, 1, inner))
    else:
        scale, minimum = _typed(groups, torch.bfloat16).float().view(2, outer, count, 1, inner)
        flat[: len(codes)].copy_(codes & 15)
        flat[len(codes) :].copy_(codes >> 4)
        grouped.mul_(scale).add_(minimum)
    if values is not out:
        out.copy_(values)


def _typed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as elements, which lie in a record where they fall."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def empty_parts(layout: RecordLayout, device: torch.device | None = None) -> list[torch.Tensor]:
    """Return memory for the weights of one record, part by part."""
    dtype = torch_dtype(layout.dtype)
    return [torch.empty(part.shape, dtype=dtype, device=device) for part in layout.parts]


def views_of(layout: RecordLayout, parts: Sequence[memoryview]) -> list[torch.Tensor]:
    """Return the bytes of a record's parts, which can be written, as tensors that share their memory."""
    dtype = torch_dtype(layout.dtype)
    return [
        torch.frombuffer(memory, dtype=dtype, count=len(memory) // DTYPE_ITEMSIZE[layout.dtype]).view(part.shape)
        for memory, part in zip(parts, layout.parts, strict=True)
    ]
