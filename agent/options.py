"""What several `agent` commands share: options that are spelled alike, a progress bar, where files may be written.

Decides how these are told. Must not import what a command without them does without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, get_args

import click

from runtime.errors import InvalidInput
from schemas.model import HeldDtype
from schemas.topology import DEFAULT_COORDINATOR_PORT

DTYPES: Final[tuple[str, ...]] = get_args(HeldDtype)

coordinator_option = click.option(
    "--coordinator",
    envvar="EXPERTMESH_COORDINATOR",
    default=f"127.0.0.1:{DEFAULT_COORDINATOR_PORT}",
    show_default=True,
    metavar="HOST:PORT",
    help="Where planner serve listens.",
)

Progress = Callable[[int, int], None]


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Progress]:
    """Show a progress bar on stderr where that is a terminal; yields what to call with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def require_directory(output: Path) -> None:
    """Raise where the directory of a file to write is not there, before the work is done for nothing."""
    if not output.absolute().parent.is_dir():
        raise InvalidInput(f"{output.parent}: no such directory to write {output.name} into; make it first")
