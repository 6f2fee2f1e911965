"""How the products of a prompt's experts are cut into the parts that a device's programs compute.

Decides sizes, from how many rows an expert has on average and how much memory a program may share among its threads:
on small devices less than half of what there is on large ones. Pure: no device.
"""

from typing import Final, NamedTuple

_SHARE: Final = 0.95  # of a program's memory; the rest is the compiler's


class Tiles(NamedTuple):
    """Rows, columns and depth of a program's part, its warps, and how many loads it is ahead of computing."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def gate_up_tiles(rows: int, experts: int, *, itemsize: int, memory: int) -> Tiles:
    """Return how gate and up are cut, whose columns are two each.

    >>> gate_up_tiles(4096, 128, itemsize=2, memory=232_448)
    Tiles(rows=64, columns=64, depth=64, warps=4, stages=4)
    >>> gate_up_tiles(16_384, 128, itemsize=2, memory=101_376)
    Tiles(rows=128, columns=64, depth=64, warps=8, stages=3)
    """
    each = rows // experts
    if each <= 16:
        return _fitted(Tiles(16, 64, 128, 4, 4), 2, itemsize, memory)
    if each <= 64:
        return _fitted(Tiles(64, 64, 64, 4, 4), 2, itemsize, memory)
    return _fitted(Tiles(128, 64, 64, 8, 4), 2, itemsize, memory)


def down_tiles(rows: int, experts: int, *, itemsize: int, memory: int) -> Tiles:
    """Return how down is cut.

    >>> down_tiles(4096, 128, itemsize=4, memory=65_536)
    Tiles(rows=64, columns=128, depth=64, warps=4, stages=2)
    """
    each = rows // experts
    if each <= 16:
        return _fitted(Tiles(16, 64, 128, 4, 4), 1, itemsize, memory)
    if each <= 64:
        return _fitted(Tiles(64, 128, 64, 4, 4), 1, itemsize, memory)
    return _fitted(Tiles(128, 128, 64, 8, 4), 1, itemsize, memory)


def _fitted(tiles: Tiles, weights: int, itemsize: int, memory: int) -> Tiles:
    """Return tiles whose loads fit: of rows, and of so many weights; each stage but one has a buffer of its own."""
    loaded = (tiles.rows + weights * tiles.columns) * tiles.depth * itemsize
    stages = 1 + int(_SHARE * memory) // loaded
    if stages > 1 or tiles.depth <= 16:
        return tiles._replace(stages=max(1, min(tiles.stages, stages)))
    return _fitted(tiles._replace(depth=tiles.depth // 2), weights, itemsize, memory)
