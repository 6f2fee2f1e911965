"""Session-wide checkpoints and stores of every family."""

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.forcing import Bench, Supply, cut_pieces
from runtime.loading import load_tokenizer, load_whole
from runtime.store import Store
from tests.demo import DEMO, TEXT
from tests.families import make_checkpoint, make_store


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a family's small checkpoint, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(family, root / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def store(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Store]:
    """Return the store of a family's small checkpoint, made once."""
    root, made = tmp_path_factory.mktemp("stores"), {}

    def get(family: str) -> Store:
        if family not in made:
            made[family] = make_store(checkpoint(family), root / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def packed_store(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Store]:
    """Return the store of a family's small checkpoint in every precision, made once."""
    root, made = tmp_path_factory.mktemp("packed"), {}

    def get(family: str) -> Store:
        if family not in made:
            made[family] = make_store(checkpoint(family), root / family, precisions=("int8", "int4"))
        return made[family]

    return get


@pytest.fixture(scope="session")
def bench() -> Bench:
    """Return the demo model with some text to force through it; whoever changes weights puts them back."""
    ids = load_tokenizer(DEMO)(TEXT.read_text(), verbose=False)["input_ids"]
    pieces = cut_pieces([ids], window=64, max_tokens=1024)
    return Bench(load_whole(DEMO, dtype="float32"), pieces, Supply(4, 16, 6), 2)
