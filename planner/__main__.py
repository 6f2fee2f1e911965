"""The way into the `planner` command, quiet where Ctrl-C comes while that is imported. Must import little itself."""

import sys
from typing import NoReturn

from schemas.outcome import ExitCode


def main() -> NoReturn:
    """Import the command and run it."""
    try:
        from planner.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(ExitCode.INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
