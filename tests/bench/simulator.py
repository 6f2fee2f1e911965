"""How many (token, layer) events per second the simulator replays: ``python -m tests.bench.simulator``.

48 layers, 64 experts, top-6, four uneven nodes, a generated workload at each, links of 5 ms and 500 Mbit/s.
"""

import time

from planner.objective import nearest
from planner.simulate import Arrivals, build_network, simulate
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.strategies.dancemoe import solve_dancemoe
from tests.small_clusters import make_model, make_problem, make_topology

EVENTS = 1_000_000


def main() -> None:
    topology = make_topology([740, 980, 1230, 1970], [20.0, 10.0, 30.0, 10.0])
    problem = make_problem(topology, make_model(layers=48, experts=64, top_k=6), tokens=2000)
    placed = solve_dancemoe(problem, objective="additive-latency", limits=SolveLimits(), report=ignore).placed
    routing = nearest(problem, placed, "additive-latency")
    for pattern in ("requests", "tokens"):
        start = time.perf_counter()
        arrivals = Arrivals(tokens=EVENTS // problem.layers, pattern=pattern)
        found = simulate(problem, routing, build_network(topology), arrivals)
        seconds = time.perf_counter() - start
        print(f"{pattern}: {found.events} events in {seconds:.1f} s, {found.events / seconds:,.0f} per second")


if __name__ == "__main__":
    main()
