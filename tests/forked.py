"""Real processes that start in no time: forked from one that has imported what agents and commands import.

A forked process differs from one that a shell starts in nothing but the seconds that imports take; tests that are about
starting use a process of the usual kind.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

_PR_SET_PDEATHSIG = 1
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


class Forked:
    """A process running Python source as `python -c SOURCE ARGUMENTS` does; its methods are those of `Popen`."""

    def __init__(self, command: tuple[str, ...], *, output: Path, errors: Path, ends_with_us: bool = False) -> None:
        self.args = command
        arguments = (command, str(output), str(errors), {**os.environ, **ENVIRONMENT}, str(Path.cwd()))
        self._process: Any = context().Process(target=_main, args=arguments, daemon=ends_with_us)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(command: tuple[str, ...], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Do what `subprocess.run` does."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-test-") as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = Forked(command, output=output, errors=errors)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, code, output.read_text(), errors.read_text())


def context() -> Any:
    """Return what `multiprocessing.get_context` does, for processes that start in no time."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.preloaded"])
    with mock.patch.dict(os.environ, ENVIRONMENT):  # torch and BLAS read it when they are imported
        forkserver.ensure_running()
    return forks


def _main(command: tuple[str, ...], output: str, errors: str, environment: dict[str, str], folder: str) -> None:
    """Be `python` with these arguments, and end with whoever forked it, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    flag, source, *arguments = command
    assert flag == "-c", command
    for stream, path in ((sys.stdout, output), (sys.stderr, errors)):
        with Path(path).open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [flag, *arguments]
    exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
