import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from planner.cli import main
from tests.forked import context
from tests.planning import Workspace


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def planner(capsys, monkeypatch, tmp_path):
    """Runs the command line as a user does, in a folder of its own."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["planner", *map(str, arguments)])
        monkeypatch.setattr("planner.child.multiprocessing", SimpleNamespace(get_context=lambda _: context()))
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Ran(int(exit_.value.code), captured.out, captured.err)

    return run


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)
