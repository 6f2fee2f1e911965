"""Time, memory and gap of the solver by regions as clusters grow: ``python -m tests.bench.regions``.

Generated clusters of 25 … 200 nodes (`tests.bench.regional_clusters`), through the whole chain from topology to the
re-checked plan, objective `additive-latency`, on one thread, each in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from planner.cost import find_paths
from planner.solve import recheck
from planner.solvers.base import Result, SolveStatus, StopReason
from planner.solvers.decomposition.arrays import Incumbent, Progress, Settings
from planner.solvers.regions.of_problem import arrays_without_rows, problem_rows
from planner.solvers.regions.partition import find_regions
from planner.solvers.regions.solve import solve_regions
from tests.bench.regional_clusters import make_model, make_problem, make_topology

NODES = (25, 50, 100, 200)
FILLS = (1.3, 2.0, 4.0)
CLOSE = 0.01  # gap whose time is told
HEAD = ("nodes", "layers", "experts", "fill", "regions", "rows", "build s", "paths s", "first s", "1 % s", "wall s")
HEAD += ("cpu s", "gap %", "plan s", "MiB")


def measure(nodes: int, layers: int, experts: int, fill: float, limit_s: float, seed: int) -> dict[str, float]:
    begun = time.process_time()
    topology = make_topology(nodes, make_model(layers, experts), fill=fill, seed=seed)
    find_paths(topology)
    paths_s = time.process_time() - begun
    begun = time.process_time()
    problem = make_problem(nodes, layers=layers, experts=experts, fill=fill, seed=seed)
    build_s = time.process_time() - begun
    told: list[Progress] = []

    def on_progress(progress: Progress, _: Incumbent | None) -> bool:
        told.append(progress)
        return True

    wall, cpu = time.monotonic(), time.process_time()
    arrays, rows = arrays_without_rows(problem, "additive-latency"), problem_rows(problem)
    settings = Settings(gap=1e-5, time_limit_s=limit_s, seed=seed, threads=1, on_progress=on_progress)
    outcome = solve_regions(arrays, settings, rows=rows)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"paths s": paths_s, "build s": build_s, "wall s": wall, "cpu s": cpu, "MiB": peak}
    found |= {"regions": find_regions(arrays).count, "rows": 0 if rows is None else len(rows.limit)}
    if outcome.incumbent is None:
        return found | {"gap %": np.inf}
    begun = time.process_time()
    placed = np.ascontiguousarray(outcome.incumbent.holders.T).reshape(-1, layers, experts)
    result = Result(
        solver="regions",
        status=SolveStatus.FEASIBLE,
        stop_reason=StopReason.FINISHED,
        seconds=wall,
        placed=placed,
        objective=outcome.incumbent.objective,
        bound=outcome.bound,
    )
    checked = recheck(problem, result, objective="additive-latency", gap=1e-5).result
    close = [step.seconds for step in told if step.gap is not None and step.gap <= CLOSE]
    return found | {
        "plan s": time.process_time() - begun,
        "first s": next(step.seconds for step in told if step.objective is not None),
        "1 % s": close[0] if close else np.inf,
        "gap %": 100 * float(checked.gap or 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--fill", type=float, nargs="+", default=FILLS)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help="measure the first case here, and print it as JSON")
    args = parser.parse_args()
    if args.one:
        found = measure(args.nodes[0], args.layers, args.experts, args.fill[0], args.limit, args.seed)
        print(json.dumps(found))
        return
    print("  ".join(f"{name:>7}" for name in HEAD))
    same = ["--layers", str(args.layers), "--experts", str(args.experts), "--limit", str(args.limit)]
    for nodes in args.nodes:
        for fill in args.fill:
            case = ["--one", "--nodes", str(nodes), "--fill", str(fill), "--seed", str(args.seed), *same]
            child = [sys.executable, "-m", "tests.bench.regions", *case]
            found = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
            found |= {"nodes": nodes, "fill": fill, "layers": args.layers, "experts": args.experts}
            print("  ".join(f"{found.get(name, float('nan')):7.4g}" for name in HEAD), flush=True)


if __name__ == "__main__":
    main()
