"""Weights in fewer bits: never further off than half a scale, always the same bits, as many bytes as promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from runtime.precision import (
    GROUP,
    UnfitPrecision,
    empty_parts,
    pack_record,
    packed_layout,
    quantise,
    rounded,
    unpack_parts,
    views_of,
)
from runtime.tensors import torch_dtype
from schemas.model import DTYPE_ITEMSIZE
from schemas.precision import LOW_PRECISIONS, PackedLayout
from schemas.store import ExpertForm, Part, RecordLayout

PRECISION = st.sampled_from(LOW_PRECISIONS)
DTYPE = st.sampled_from(sorted(DTYPE_ITEMSIZE))
KIND = st.sampled_from(["swiglu", "gpt_oss"])
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def layout_of(*, hidden=64, ffn=32, dtype="float32", kind="swiglu"):
    shapes = {"gate_up_proj": (2 * ffn, hidden), "down_proj": (hidden, ffn)}
    if kind == "gpt_oss":
        shapes = {
            "gate_up_proj": (hidden, 2 * ffn),
            "gate_up_proj_bias": (2 * ffn,),
            "down_proj": (ffn, hidden),
            "down_proj_bias": (hidden,),
        }
    parts, offset = [], 0
    for name, shape in shapes.items():
        part = Part(name=name, shape=shape, offset=offset)
        parts.append(part)
        offset += part.elements * DTYPE_ITEMSIZE[dtype]
    return RecordLayout(form=ExpertForm(kind=kind), dtype=dtype, bytes=offset, parts=tuple(parts))


@st.composite
def weights(draw, layout):
    """Weights of any size and sign, some of them far from nought, all alike, or nought."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    scale, shift = draw(st.sampled_from([0.0, 1e-4, 0.05, 1.0, 100.0])), draw(st.sampled_from([0.0, 0.0, 1.0, -30.0]))
    dtype = torch_dtype(layout.dtype)
    return [(torch.randn(part.shape, generator=generator) * scale + shift).to(dtype) for part in layout.parts]


def record_of(parts):
    return b"".join(part.view(-1).view(torch.uint8).numpy().tobytes() for part in parts)


def unpacked(record, packed, layout):
    parts = empty_parts(layout)
    unpack_parts(torch.frombuffer(bytearray(record), dtype=torch.uint8), packed, parts)
    return parts


@settings(max_examples=60, deadline=None)
@given(st.data(), PRECISION, DTYPE, KIND, st.sampled_from([32, 96]), st.sampled_from([32, 64]))
def test_a_weight_comes_back_within_half_a_scale(data, precision, dtype, kind, hidden, ffn):
    layout = layout_of(hidden=hidden, ffn=ffn, dtype=dtype, kind=kind)
    packed, given_weights = packed_layout(layout, precision), data.draw(weights(layout))
    record = pack_record(record_of(given_weights), packed)
    assert len(record) == packed.bytes
    for part, was, now in zip(packed.parts, given_weights, unpacked(record, packed, layout), strict=True):
        if part.group is None:
            assert torch.equal(was, now)  # biases
            continue
        assert torch.equal(now, rounded(was, name=part.name, axis=part.axis, precision=precision))
        _, scale, *minimum = quantise(was, part, precision)
        size = was.float().abs().max() + sum(float(each.float().abs().max()) for each in minimum)
        off = (now.float() - was.float()).reshape(part.grouped()).abs()
        assert (off <= scale.float() / 2 + size * (ROUNDING[dtype] + 2**-20)).all()


@settings(max_examples=30, deadline=None)
@given(st.data(), PRECISION, DTYPE, KIND)
def test_codes_are_the_same_however_they_are_unpacked(data, precision, dtype, kind):
    """Into memory of their own, or into a slot's; at any offset of a record."""
    layout = layout_of(dtype=dtype, kind=kind)
    packed = packed_layout(layout, precision)
    record = pack_record(record_of(data.draw(weights(layout))), packed)
    want = unpacked(record, packed, layout)
    slot = [memoryview(bytearray(part.elements * DTYPE_ITEMSIZE[dtype])) for part in layout.parts]
    shifted = torch.frombuffer(bytearray(b"\0" + record), dtype=torch.uint8)[1:]
    unpack_parts(shifted, packed, views_of(layout, slot))
    assert record_of(want) == b"".join(slot)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8 + 32 / 64), ("int4", 4 + 32 / GROUP)])
def test_sizes(precision, bits):
    layout = layout_of(hidden=64, ffn=64)
    elements = sum(part.elements for part in layout.parts)
    assert packed_layout(layout, precision).bytes * 8 == elements * bits


def test_groups_that_do_not_divide_the_axis_are_refused():
    layout = layout_of(hidden=64, ffn=48)
    with pytest.raises(
        UnfitPrecision, match=r"int4 does not fit .*down_proj \[64, 48\] has an input axis of 48.*32"
    ) as caught:
        packed_layout(layout, "int4")
    assert (caught.value.exit_code, caught.value.size, caught.value.group) == (2, 48, 32)
    assert packed_layout(layout, "int8").bytes < layout.bytes


def test_a_layout_that_does_not_add_up_is_refused():
    document = packed_layout(layout_of(), "int4").model_dump()
    for path, value in ((("bytes",), 17), (("parts", 1, "offset"), 1), (("parts", 0, "group"), 17)):
        changed = packed_layout(layout_of(), "int4").model_dump()
        place = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(ValidationError):
            PackedLayout.model_validate(changed)
    assert PackedLayout.model_validate(document) == packed_layout(layout_of(), "int4")
