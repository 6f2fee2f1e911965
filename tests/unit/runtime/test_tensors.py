"""Tensors packed into a record come out as they went in; anything else is refused."""

import pytest
import torch

from runtime.tensors import pack, unpack


def test_a_record_gives_its_tensors_back():
    tensors = {
        "b": torch.randn(3, 5).t(),
        "a": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2, 2).half(),
    }
    record = pack(tensors)
    assert record == pack(dict(reversed(tensors.items())))
    found = unpack(record)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert found.keys() == tensors.keys()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


@pytest.mark.parametrize("damage", [lambda r: b"", lambda r: r[:20], lambda r: r[:-1], lambda r: b"\xff" * len(r)])
def test_what_is_no_record_is_refused(damage):
    with pytest.raises(ValueError, match="no safetensors file"):
        unpack(damage(pack({"a": torch.zeros(4)})))
