"""The planner at full size, against an exact solver and published strategies: ``python -m tests.bench.planner``.

Prints three tables. The first is generated from seeds: gap and time of the decomposition, beside HiGHS on the whole
model with a time limit. The other two need recorded routing of a real model (`--esft DIR`, one trace per task): share
of token-layers with any remote expert, placed on the first 70 % of each trace and judged on the rest, and simulated
latency at 500 Mbit/s and 5 ms. Without the traces they are left out.
"""

import argparse
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, vstack

from planner.demand import Trace, read_trace
from planner.objective import judge
from planner.problem import build_problem
from planner.simulate import Arrivals, build_network, simulate
from planner.simulate.outcome import Latency
from planner.solve import solve
from planner.solvers.base import SolveLimits
from planner.solvers.decomposition.arrays import PlacementArrays, Settings
from planner.solvers.decomposition.solve import solve_arrays
from schemas.model import ModelSpec
from schemas.topology import Topology
from tests.bench.given import TRACES
from tests.bench.planner_instances import generate, with_load, with_makespan

TASKS = ("intent", "law", "summary", "translation")
MEMORY_SHARES = (0.15, 0.20, 0.25, 0.40)
FILLS = (1.3, 1.6, 2.0)
TARGETS = {1.3: 22, 1.6: 26, 2.0: 30}  # per cent below DanceMoE
MODEL = ModelSpec(
    id="deepseek-v2-lite",
    layers=26,
    experts=64,
    top_k=6,
    hidden_size=2048,
    itemsize=2,
    expert_bytes=3 * 2048 * 1408 * 2,
)
DEFAULT_TRACES = TRACES / "esft"


@dataclass(frozen=True)
class Size:
    """One generated problem and what is asked of it."""

    name: str
    arrays: PlacementArrays
    gap: float
    time_s: float
    is_plain: bool


def sizes(*, large: bool) -> list[Size]:
    """Problems of growing size; the largest only where asked for."""
    middle = generate(48, 128, 8)
    found = [
        Size("24 x 64 x 4", generate(24, 64, 4), 1e-4, 5, True),
        Size("48 x 128 x 8", middle, 1e-4, 5, True),
        Size("48 x 128 x 8 with load rows", with_load(middle), 3e-3, 30, False),
        Size("48 x 128 x 8 with makespan", with_makespan(middle), 3e-3, 30, False),
    ]
    return [*found, Size("58 x 256 x 16", generate(58, 256, 16), 1e-3, 60, False)] if large else found


def exact(arrays: PlacementArrays, time_s: float) -> tuple[float, float | None]:
    """Seconds and gap of HiGHS on the whole model: x[k,p] binary, a[i,k,p] <= x[k,p]; gap None without incumbent."""
    begun = time.monotonic()
    (ingresses, experts), places = arrays.demand.shape, arrays.num_places
    num_x, num_a = experts * places, ingresses * experts * places
    cost = np.concatenate([np.zeros(num_x), (arrays.demand[:, :, None] * arrays.cost[:, None, :]).ravel()])
    x = np.arange(num_x).reshape(experts, places)
    a = num_x + np.arange(num_a).reshape(ingresses, experts, places)
    columns = num_x + num_a

    def rows(groups: np.ndarray) -> csr_array:
        row = np.repeat(np.arange(len(groups)), groups.shape[1])
        return csr_array((np.ones(groups.size), (row, groups.ravel())), shape=(len(groups), columns))

    row = np.arange(num_a)
    held = np.broadcast_to(x, a.shape).ravel()
    values = np.concatenate([np.ones(num_a), -np.ones(num_a)])
    holder = coo_array((values, (np.tile(row, 2), np.concatenate([a.ravel(), held]))), shape=(num_a, columns)).tocsr()
    matrix = vstack([rows(x), rows(x.T), rows(a.reshape(-1, places)), holder]).tocsr()
    low = np.concatenate(
        [np.ones(experts), np.full(places, -np.inf), np.ones(ingresses * experts), np.full(num_a, -np.inf)]
    )
    high = np.concatenate([np.full(experts, np.inf), arrays.slots, np.ones(ingresses * experts), np.zeros(num_a)])
    integer = np.concatenate([np.ones(num_x), np.zeros(num_a)])
    found = milp(
        cost,
        constraints=LinearConstraint(matrix, low, high),
        bounds=Bounds(0, 1),
        integrality=integer,
        options={"time_limit": time_s, "mip_rel_gap": 1e-4},
    )
    return time.monotonic() - begun, None if found.x is None else float(found.mip_gap)


def synthetic_table(highs_s: float, *, large: bool) -> None:
    """Print gap, seconds and memory for every size."""
    print(f"{'instance':32} {'gap':>10} {'asked':>8} {'seconds':>8} {'peak GiB':>8}   HiGHS on the whole model")
    for size in sizes(large=large):
        begun = time.monotonic()
        outcome = solve_arrays(size.arrays, Settings(gap=size.gap, time_limit_s=size.time_s, threads=0))
        seconds = time.monotonic() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        told = "-"
        if size.is_plain and highs_s:
            taken, gap = exact(size.arrays, highs_s)
            reached = "no placement" if gap is None else f"gap {gap:.2%}"
            told = f"{reached} in {taken:.1f} s, {taken / seconds:.0f} x"
        gap_text = "-" if outcome.gap is None else f"{outcome.gap:.5%}"
        print(f"{size.name:32} {gap_text:>10} {size.gap:>8.2%} {seconds:8.2f} {peak:8.2f}   {told}", flush=True)


def esft_topology(fill: float) -> Topology:
    """Four nodes, one task each, equal links."""
    total = MODEL.layers * MODEL.experts * MODEL.expert_bytes * fill
    names = [f"n{index}" for index in range(len(TASKS))]
    nodes = [
        {
            "id": name,
            "memory": {"device": int(total * share)},
            "ingress": {"workload": task, "tokens_per_s": 1},
        }
        for name, task, share in zip(names, TASKS, MEMORY_SHARES, strict=True)
    ]
    links = [
        {"between": [first, second], "latency": "5 ms", "bandwidth": "500 Mbit/s"}
        for number, first in enumerate(names)
        for second in names[number + 1 :]
    ]
    document = {
        "cluster": "esft",
        "model": "model.yaml",
        "nodes": nodes,
        "links": links,
        "workloads": {task: f"{task}.safetensors" for task in TASKS},
    }
    return Topology.model_validate_json(json.dumps(document))


def esft_table(traces: dict[str, Trace], strategies: list[str], time_s: float, fills: list[float]) -> None:
    """Print any-remote shares, bounds and simulated latencies by fill and strategy."""
    parts = {task: trace.split(0.7) for task, trace in traces.items()}
    for fill in fills:
        rows: dict[str, Latency] = {}
        topology = esft_topology(fill)
        problem = build_problem(topology, MODEL, [parts[task][0].chosen for task in TASKS])
        judged = problem.judged_on([parts[task][1].chosen for task in TASKS])
        print(f"\nESFT, fill {fill}: target {TARGETS[fill]} % below dancemoe within 30 s")
        print(f"{'strategy':14} {'any remote':>10} {'below':>7} {'worst node':>10} {'calls':>7} {'gap':>7} {'seconds':>8}"
              f" {'mean':>9} {'p95':>9} {'below':>7}")  # fmt: skip
        base: tuple[float, np.ndarray, float] | None = None
        for name in strategies:
            solver, _, tail = name.partition("@")
            solved = solve(problem, solver, limits=SolveLimits(time_s=time_s, gap=1e-5, tail=float(tail or 0)))
            seen = judge(judged, solved.routing)
            found = simulate(judged, solved.routing, build_network(topology), Arrivals(tokens=8000))
            base = base or (seen.any_remote_share, seen.any_remote, found.total.mean_s)
            gap = "-" if solved.result.gap is None else f"{solved.result.gap:.2%}"
            print(
                f"{name:14} {seen.any_remote_share:10.3f} {1 - seen.any_remote_share / base[0]:7.1%} "
                f"{(seen.any_remote / base[1]).max():10.3f} {seen.remote_call_share:7.3f} {gap:>7} "
                f"{solved.result.seconds:8.1f} {found.total.mean_s * 1e3:6.1f} ms {found.total.p95_s * 1e3:6.1f} ms "
                f"{1 - found.total.mean_s / base[2]:7.1%}",
                flush=True,
            )  # fmt: skip
            rows[name] = found.total
        _simulated_table(rows)


def _simulated_table(rows: dict[str, Latency]) -> None:
    """Print by how much the last strategies wait less than the first two, mean and 95th percentile."""
    names = list(rows)
    for name, published in ((name, published) for name in names[2:] for published in names[:2]):
        mean, p95 = (
            1 - getattr(rows[name], f"{what}_s") / getattr(rows[published], f"{what}_s") for what in ("mean", "p95")
        )
        print(f"{name} simulated, below {published}: mean {mean:.1%}, p95 {p95:.1%}", flush=True)


def main() -> None:
    """Read options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--highs", type=float, default=120.0, metavar="S", help="time of HiGHS per model; 0 leaves it out"
    )
    parser.add_argument("--large", action="store_true", help="also 58 x 256 x 16")
    parser.add_argument("--no-synthetic", action="store_true", help="only the tables of recorded routing")
    parser.add_argument("--esft", type=Path, default=DEFAULT_TRACES, metavar="DIR", help="one trace per task")
    parser.add_argument("--fills", type=float, nargs="+", choices=FILLS, default=list(FILLS))
    parser.add_argument("--time-limit", type=float, default=30.0, help="of each solve on recorded routing")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["dancemoe", "eplb", "auto", "auto@0.05"],
        help="the first two are compared with; NAME@SHARE also shortens the wait of the slowest share of tokens",
    )
    options = parser.parse_args()
    if not options.no_synthetic:
        synthetic_table(options.highs, large=options.large)
    if missing := [task for task in TASKS if not (options.esft / f"{task}.safetensors").is_file()]:
        print(f"\nno trace of {', '.join(missing)} in {options.esft}: tables of recorded routing left out")
        return
    traces = {task: read_trace(options.esft / f"{task}.safetensors", MODEL) for task in TASKS}
    esft_table(traces, options.strategies, options.time_limit, options.fills)


if __name__ == "__main__":
    main()
