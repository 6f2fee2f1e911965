"""Experts computed together where they lie, against one after the other; torch's grouped product runs on processors too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.cuda.grouped import grouped_answers
from runtime.experts import expert_math
from runtime.models import open_model
from runtime.slots import Caching, Residency
from tests.families import make_checkpoint


def held(path: Path, order: list[int]) -> Residency:
    """Hold experts of layer 0 in slots of that order."""
    from runtime.alone import expert_sources

    model = open_model(path, "bfloat16")
    residency = Residency(model.layout, {"device": 8 * model.layout.bytes}, caching=Caching(4, 8))
    for key, source in expert_sources(path, model).items():
        residency.place(key, source)
    for expert in order:
        list(residency.lend(0, [expert]))
    return residency


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 5], [5, 2, 7, 0, 3, 1]])
def test_all_at_once_is_what_each_makes(tmp_path: Path, order: list[int]) -> None:
    residency = held(make_checkpoint("qwen3_moe", tmp_path), order)
    experts, sizes = [0, 2, 5], [3, 1, 6]
    bounds = [0, *np.cumsum(sizes).tolist()]
    rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = grouped_answers(residency, 0, experts, bounds, rows)
    assert got is not None
    math: Any = expert_math(residency.layout.form)
    for index, expert in enumerate(experts):
        start, end = bounds[index : index + 2]
        torch.testing.assert_close(got[start:end], math(residency.acquire((0, expert)), rows[start:end]))
    assert all(not copy.users for copy in residency.inside.shelf.ready.values())


def test_one_that_is_missing_leaves_all_to_others(tmp_path: Path) -> None:
    residency = held(make_checkpoint("qwen3_moe", tmp_path), [0, 1])
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert grouped_answers(residency, 0, [0, 4], [0, 2, 4], rows) is None
    assert grouped_answers(residency, 0, [0, 1], [0, 2, 4], rows.float()) is None
