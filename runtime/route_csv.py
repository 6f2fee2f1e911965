"""Reading ``*.route.csv`` files: routing as other recorders write it.

Decides what such a file must hold. Must not know what is made of it, nor torch.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InvalidInput
from schemas.activation import MOST_EXPERTS

_MOST_LAYERS: Final = 4096
COLUMNS: Final = ("turn", "phase", "step", "layer", "slot", "expert", "weight")


def read_route_table(path: Path) -> tuple[dict[str, str], NDArray[np.float64]]:
    """Return the ``key=value`` pairs of the header comments and the rows, columns as in `COLUMNS`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: is not a text file") from error
    comments = [line for line in lines if line.startswith("#")]
    header = dict(pair.split("=", 1) for line in comments for pair in line.split() if "=" in pair)
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
        raise InvalidInput(f"{path}: not a route trace: columns {', '.join(missing)} are missing")
    values: list[list[float]] = []
    for row in rows:
        try:
            values.append([float(row[column]) for column in COLUMNS])
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{path}: line {rows.line_num + len(comments)}: not a number in {row}") from error
    if not values:
        raise InvalidInput(f"{path}: holds no rows")
    return header, np.array(values)


def route_shape(path: Path, header: Mapping[str, str]) -> tuple[str, int, int, int]:
    """Return model, L, E and K of a route file's header; raises `InvalidInput`."""
    try:
        layers, experts, top_k = (int(header[name]) for name in ("n_layer", "n_expert", "n_expert_used"))
    except (KeyError, ValueError) as error:
        raise InvalidInput(f"{path}: its header comments must give n_layer, n_expert and n_expert_used") from error
    if not (1 <= layers <= _MOST_LAYERS and 1 <= top_k <= experts <= MOST_EXPERTS):
        raise InvalidInput(
            f"{path}: its header comments say n_layer={layers} n_expert={experts} n_expert_used={top_k}; there must be "
            f"1 … {_MOST_LAYERS} layers and 1 ≤ n_expert_used ≤ n_expert ≤ {MOST_EXPERTS}"
        )
    return Path(header.get("model", path.name)).stem, layers, experts, top_k
