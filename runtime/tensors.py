"""Tensors as bytes: read from a checkpoint's files, packed into a record, and unpacked from one.

Decides that every tensor is copied into memory of torch's own, so that its alignment (and with it the bits of a
product) does not depend on where its bytes lay. Must not know what the tensors are for.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from schemas.checkpoint import InvalidCheckpoint, TensorEntry

_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BY_NAME: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES: Final = {dtype: name for name, dtype in _BY_NAME.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a schema's dtype name."""
    return _BY_NAME[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a schema's name of torch's dtype.

    >>> dtype_name(torch_dtype("bfloat16"))
    'bfloat16'
    """
    return _NAMES[dtype]


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor of a checkpoint, in its own shape and dtype."""
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise InvalidCheckpoint(f"{entry.file}: holds weights as {entry.dtype}; one of {', '.join(_DTYPES)} is needed")
    data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    buffer: Any = data.numpy()
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        if stream.readinto(buffer) != entry.num_bytes:
            raise InvalidCheckpoint(f"{entry.file}: truncated while it was read; fetch it again")
    return data.view(dtype).view(entry.shape)


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the safetensors file of some tensors; the same tensors always give the same bytes."""
    from safetensors.torch import save

    packed: bytes = save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())})
    return packed


def unpack(record: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; raises ValueError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return {name: tensor.clone() for name, tensor in load(bytes(record)).items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"no safetensors file: {error}") from error
