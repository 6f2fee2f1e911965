"""Reads what a simulation needs and runs it: plan, topology, traces.

Decides that they belong together. Must not know how figures are shown.
"""

from collections.abc import Mapping
from pathlib import Path

from planner.demand import read_trace
from planner.inputs import load_inputs
from planner.simulate.arrivals import Arrivals
from planner.simulate.network import build_network
from planner.simulate.outcome import Simulation, simulate
from planner.simulate.placement import require_cluster, routing_by, with_trunk_of
from schemas.files import Fault, InvalidFile
from schemas.plan import load_plan


def simulate_plan(plan_file: Path, topology: Path, traces: Mapping[str, Path], arrivals: Arrivals) -> Simulation:
    """Simulate a plan file on a topology file.

    Parameters
    ----------
    traces
        Replayed in place of the topology's, by workload.

    Raises
    ------
    InvalidFile, UnlikePlan
        Files that are wrong or do not belong together.
    """
    plan = load_plan(plan_file)
    inputs = load_inputs(topology).as_planned(plan)
    require_cluster(plan, inputs.topology.cluster)
    if unknown := sorted(set(traces) - set(inputs.traces)):
        known = ", ".join(sorted(inputs.traces))
        fault = Fault("workload", f"{unknown[0]!r} enters at no node; workloads are {known}")
        raise InvalidFile(traces[unknown[0]], [fault])
    replayed = {**inputs.traces, **{name: read_trace(path, inputs.model) for name, path in traces.items()}}
    problem = with_trunk_of(plan, inputs.problem(replayed))
    return simulate(problem, routing_by(plan, problem), build_network(inputs.topology), arrivals)
