"""Scenario files: what happens to a state machine, and under each event what it did. Rewritten only by --rewrite-scenarios.

A file is blocks of an event line (``> prepare 1 p1``) and the lines it led to; comments begin with ``#``.
"""

from collections.abc import Callable, Iterable
from pathlib import Path


def play(text: str, act: Callable[[list[str]], Iterable[str]]) -> str:
    """Run every event line through `act` and return the text with what it led to."""
    out: list[str] = []
    for line in text.splitlines():
        if line.startswith(">"):
            out.append(line)
            out += [f"  {told}" for told in act(line[1:].split())] or ["  -"]
        elif line.startswith("#") or not line.strip():
            out.append(line)
    return "\n".join(out) + "\n"


def check(file: Path, act: Callable[[list[str]], Iterable[str]], *, rewrite: bool) -> None:
    """Compare a file with what its events lead to now, or write that."""
    text = file.read_text()
    played = play(text, act)
    if rewrite:
        file.write_text(played)
        return
    assert played == text, f"{file.name} tells another story; look at it with --rewrite-scenarios and git diff"
