"""How the `agent` command ends where it cannot go on: one line, an exit code, nothing left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import MODEL, environment

# what a signal meets in extension modules and in libraries that import lazily: an exception is dropped, or another made
INTERRUPTED_IMPORT = """
import os, signal, sys
class Unlucky:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                if "{then}" == "goes on":
                    return
                raise ImportError("what is half imported cannot be") if "{then}" == "fails" else KeyboardInterrupt
sys.meta_path.insert(0, Unlucky())
sys.argv = {arguments!r}
from {package}.__main__ import main
main()
"""


def interrupted(package: str, module: str, *arguments: str, then: str = "ends") -> subprocess.CompletedProcess[str]:
    """Run a command that Ctrl-C meets while it imports a module."""
    code = INTERRUPTED_IMPORT.format(package=package, module=module, then=then, arguments=[package, *arguments])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=20, check=False
    )


@pytest.mark.parametrize(("package", "module"), [("agent", "pydantic"), ("planner", "numpy")])
def test_interrupted_before_it_has_begun(package: str, module: str) -> None:
    done = interrupted(package, module, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_agent_that_is_stopped_while_it_imports_does_not_start(tmp_path: Path) -> None:
    config = tmp_path / "n0.yaml"
    config.write_text(
        f"{{node: n0, coordinator: '127.0.0.1:1', model: {MODEL}, data: {tmp_path / 'data'}, "
        "memory: {device: 1 MiB, host: 0 B, disk: 0 B}}"
    )
    done = interrupted("agent", "torch", "run", "--config", str(config), then="goes on")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "data").exists()


def test_what_fails_since_it_was_interrupted_is_no_fault() -> None:
    done = interrupted("agent", "torch", "generate", "--local", str(MODEL), "--prompt", "x", then="fails")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_command_that_a_script_has_in_the_background_is_not_interrupted(tmp_path: Path) -> None:
    was = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells start it, and children inherit it
    try:
        no_trace = tmp_path / "empty.safetensors"
        no_trace.touch()
        done = interrupted("agent", "numpy", "learn", str(no_trace), "-o", str(tmp_path / "uses"))
    finally:
        signal.signal(signal.SIGINT, was)
    assert (done.returncode, str(no_trace) in done.stderr) == (2, True), done.stderr


def test_a_full_disk_is_told_in_a_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "agent", "prepare", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1
