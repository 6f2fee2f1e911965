"""A solver's process: streamed progress, our own time limit, and nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from planner.child import Job, solve_in_child
from planner.objective import path_cost
from planner.solve import recheck
from planner.solvers.base import SolveLimits, SolveStatus, StopReason
from tests.planning import line, model_spec, node, problem_of, topology_of, write_trace


@pytest.fixture(scope="module")
def problem():
    """Too much for CP-SAT within a few seconds."""
    model = model_spec(layers=12, experts=24, top_k=2)
    nodes = [node(name, device=70, host=20, rate=10) for name in "abcdef"]
    return problem_of(topology_of(nodes, line(*"abcdef")), model, seed=3)


def test_progress_is_streamed_and_the_result_handed_over():
    model = model_spec(layers=4, experts=8)
    small = problem_of(topology_of([node("a", device=20, rate=5), node("b", device=20)], line("a", "b")), model)
    seen = []
    result = solve_in_child(Job(small, "cpsat", "additive-latency", SolveLimits()), seen.append)
    assert result.status is SolveStatus.OPTIMAL
    assert seen
    assert seen[-1].incumbent == pytest.approx(result.objective)
    bounds = [standing.bound for standing in seen if standing.bound is not None]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= result.objective * (1 + 1e-9)


@pytest.mark.parametrize("solver", ["cpsat", "milp"])
def test_time_is_kept_and_the_last_incumbent_stays(problem, solver):
    start, before = time.monotonic(), multiprocessing.active_children()  # clusters of other tests may be running
    result = solve_in_child(Job(problem, solver, "additive-latency", SolveLimits(time_s=2.0)))
    assert time.monotonic() - start < 8
    assert set(multiprocessing.active_children()) <= set(before)
    if result.placed is None:
        assert result.objective is None
        assert result.gap is None
    else:
        solved = recheck(problem, result, objective="additive-latency", gap=1e-7)
        path = path_cost(problem, "additive-latency")
        assert solved.result.objective == pytest.approx(result.objective + path)
        assert solved.result.status in {SolveStatus.OPTIMAL, SolveStatus.FEASIBLE}


def test_a_child_that_dies_is_a_result_not_a_hang(problem):
    before = multiprocessing.active_children()

    def stop(_):
        for process in set(multiprocessing.active_children()).difference(before):
            process.kill()

    result = solve_in_child(Job(problem, "cpsat", "additive-latency", SolveLimits(time_s=30)), stop)
    assert result.stop_reason is StopReason.FAILED
    assert result.detail == "its process died"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_interrupting_the_command_kills_the_solver_and_writes_nothing(workspace, tmp_path):
    workspace.model = model_spec(layers=12, experts=24, top_k=2)
    workspace.document["nodes"] = [node(name, device=140, host=20, rate=10) for name in "abc"]
    for name in "abc":
        write_trace(tmp_path / f"{name}.safetensors", workspace.model, workload=name)
    command = [sys.executable, "-m", "planner", "solve", str(workspace.write()), "--solver", "cpsat"]
    process = subprocess.Popen(
        [*command, "--gap", "0", "--time-limit", "60"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        child = _wait_for_child(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the child gets it too, still importing
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == "interrupted"
    assert "Traceback" not in told
    assert not (tmp_path / "plan.json").exists()
    assert not _alive(child)


def _wait_for_child(parent):
    for _ in range(200):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ids = (folder / "stat").read_text().rpartition(")")[2].split()
                arguments = (folder / "cmdline").read_text()
            except OSError:
                continue
            if int(ids[1]) == parent and "spawn_main" in arguments:
                return int(folder.name)
        time.sleep(0.05)
    raise AssertionError("the solver's process never started")


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_placements_survive_the_trip(problem):
    """What a child hands over is a placement of the problem's own shape."""
    result = solve_in_child(Job(problem, "uniform", "additive-latency", SolveLimits()))
    assert result.placed is not None
    assert result.placed.shape == (problem.num_places, problem.layers, problem.experts)
    assert result.placed.dtype == np.bool_
