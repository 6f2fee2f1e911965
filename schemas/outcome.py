"""Exit codes of every command, the same for `planner` and `agent`."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status says."""

    DONE = 0
    FAILED = 1
    INVALID = 2  # usage, or a file that says something wrong
    INFEASIBLE = 3  # what was asked for does not fit; the message says by how much
    REFUSED = 4  # a stale, altered or unsafe plan
    INTERRUPTED = 130  # by Ctrl-C, as shells tell it
