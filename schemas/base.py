"""The one base model of everything that crosses a boundary, and the digest of what it says.

Decides how strict all schemas are (frozen, no unknown keys, no NaN) and what their canonical JSON is.
Must not know any particular schema.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Base of every schema: immutable, strict, unknown keys refused, no NaN or infinity.

    Strict pydantic validates JSON text, not Python lists: use ``model_validate_json``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def canonical_json(document: Any) -> bytes:
    """Serialise plain JSON data to one byte string: sorted keys, no spaces, UTF-8.

    >>> canonical_json({"b": 1, "a": [1.5, "x"]})
    b'{"a":[1.5,"x"],"b":1}'
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(model: BaseModel, *, without: frozenset[str] = frozenset()) -> str:
    """Return the sha256 (hex) of a model's canonical JSON, leaving out the top level keys `without`."""
    document = model.model_dump(mode="json")
    return hashlib.sha256(canonical_json({k: v for k, v in document.items() if k not in without})).hexdigest()
