"""Why each node got what it got, what a token's path costs, and what more memory or faster links would bring.

Decides the figures: prices of memory from the duals of a solve, and what-ifs that are both estimated (from prices, or
from placement and paths as they are) and checked by solving again, paths included where they are the planner's to
choose. Must not know how they are shown.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from planner.assemble import Solved
from planner.inputs import Inputs
from planner.objective import ObjectiveName, judge, link_load, node_load, plan_cost
from planner.problem import Problem
from planner.simulate.placement import placed_by, require_cluster, routing_by, with_trunk_of
from planner.solvers.base import Result, SolveStatus, StopReason, default_gap
from planner.trunk.story import path_summaries
from schemas.plan import PathSummary, Plan
from schemas.topology import Topology

_BINDS: Final = 0.98  # of a limit
_MIB: Final = 1 << 20
_MORE: Final = 0.1  # share of a node's memory for experts that a what-if adds, whole experts, at least one
_FASTER: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class NodePrice:
    """What binds at a node: memory, compute, or nothing; `price` is ms that a token waits less per MiB more."""

    id: str
    binds: tuple[str, ...]
    price_ms_per_mib: float | None
    used_bytes: int
    room_bytes: int
    utilisation: float


@dataclass(frozen=True, kw_only=True)
class LinkPrice:
    """Expected use of a link, and whether its limit binds."""

    between: tuple[str, str]
    utilisation: float
    binds: bool


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """One change: seconds that a token would wait less.

    Attributes
    ----------
    estimate_s
        From prices, the most that it can bring with paths as they are (memory); with placement and paths as they are,
        the least (links). None unknown.
    checked_s
        After solving again; what search did not find is missing in it.
    """

    change: str
    estimate_s: float | None
    checked_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Figures of a solved problem."""

    nodes: tuple[NodePrice, ...]
    links: tuple[LinkPrice, ...]
    what_ifs: tuple[WhatIf, ...]
    paths: tuple[PathSummary, ...] = ()


Solve = Callable[[Problem], Solved]


def explain(inputs: Inputs, solved: Solved, solve: Solve) -> Explanation:
    """Explain a solve; `solve` is asked once per node and link."""
    return Explanation(
        nodes=tuple(_nodes(solved)),
        links=tuple(_links(solved)),
        what_ifs=(*_more_memory(inputs, solved, solve), *_faster_links(inputs, solved, solve)),
        paths=path_summaries(solved.problem, solved.routing, solved.trials),
    )


def as_planned(inputs: Inputs, plan: Plan, objective: ObjectiveName) -> Solved:
    """Return a plan's placement, routes and paths as they are, judged on the inputs; no prices are known of it.

    Raises
    ------
    UnlikePlan
        The plan is of another cluster, model or places.
    """
    require_cluster(plan, inputs.topology.cluster)
    problem = with_trunk_of(plan, inputs.problem())
    placed, routing = placed_by(plan, problem), routing_by(plan, problem)
    result = Result(
        solver=plan.summary.solver,
        status=SolveStatus.FEASIBLE,
        stop_reason=StopReason.FINISHED,
        seconds=plan.summary.seconds,
        placed=placed,
        objective=plan_cost(problem, routing, objective),
    )
    return Solved(problem, result, placed, routing, judge(problem, routing), objective, default_gap(objective))


def _rate(solved: Solved) -> float:
    return float(solved.problem.tokens_per_s.sum())


def _price(solved: Solved, node: int, *, per_byte: bool = False) -> float | None:
    """Seconds that a token waits less per slot (byte) more at a node, the dearest of its places."""
    price = solved.result.slot_price
    here = solved.problem.place_node == node
    if price is None or not here.any():
        return None
    size = solved.problem.place_bytes[here] if per_byte else 1
    return float((price[here] / size).max()) / _rate(solved)


def _nodes(solved: Solved) -> Iterator[NodePrice]:
    problem = solved.problem
    load = node_load(problem, solved.routing)
    for node, name in enumerate(problem.node_ids):
        here = problem.place_node == node
        used = int(solved.placed[here].sum())
        price = _price(solved, node, per_byte=True)
        binds = []
        if used >= problem.node_slots[node] and used < problem.layers * problem.experts:
            binds.append("memory")
        if load[node] >= _BINDS * problem.compute_limit[node]:
            binds.append("compute")
        yield NodePrice(
            id=name,
            binds=tuple(binds),
            price_ms_per_mib=None if price is None else 1e3 * price * _MIB,
            used_bytes=int((solved.placed[here].sum(axis=(1, 2)) * problem.place_bytes[here]).sum()),
            room_bytes=int(problem.capacity_bytes[here].sum()),
            utilisation=float(load[node]),
        )


def _links(solved: Solved) -> Iterator[LinkPrice]:
    problem = solved.problem
    load = link_load(problem, solved.routing)
    for link, ends in enumerate(problem.link_ends.tolist()):
        first, second = (problem.node_ids[end] for end in ends)
        yield LinkPrice(
            between=(first, second),
            utilisation=float(load[link] / problem.link_rate[link]),
            binds=bool(load[link] >= _BINDS * problem.link_limit[link]),
        )


def _more_memory(inputs: Inputs, solved: Solved, solve: Solve) -> Iterator[WhatIf]:
    problem = solved.problem
    count = problem.layers * problem.experts
    for node in range(problem.num_nodes):
        places = np.flatnonzero(problem.place_node == node)
        lacking = count - int(problem.node_slots[node])
        if not len(places) or lacking <= 0:
            continue
        slots = min(max(1, int(_MORE * problem.node_slots[node])), lacking)
        price = _price(solved, node)
        again = solve(_with_more_memory(inputs.problem(), int(places[0]), slots))
        yield WhatIf(
            change=f"{slots} more experts in {problem.place_name(int(places[0]))}",
            estimate_s=None if price is None else price * slots,
            checked_s=_takes(solved) - _takes(again),
        )


def _with_more_memory(problem: Problem, place: int, slots: int) -> Problem:
    memory = problem.room.room_bytes.copy()
    memory[problem.place_node[place], problem.place_tier[place]] += slots * problem.place_bytes[place]
    return replace(problem, room=replace(problem.room, room_bytes=memory)).with_trunk(problem.trunk_node)


def _faster_links(inputs: Inputs, solved: Solved, solve: Solve) -> Iterator[WhatIf]:
    for link in range(len(inputs.topology.links)):
        topology = _with_faster_link(inputs.topology, link)
        faster = replace(inputs, topology=topology).problem()
        kept = plan_cost(faster, solved.routing, solved.objective_name) / _rate(solved)
        again = solve(faster)
        yield WhatIf(
            change=f"link {solved.problem.link_name(link)} twice as fast",
            estimate_s=_takes(solved) - kept if solved.objective_name != "remote-calls" else None,
            checked_s=_takes(solved) - _takes(again),
        )


def _with_faster_link(topology: Topology, number: int) -> Topology:
    link = topology.links[number]
    update = {"latency": link.latency / _FASTER, "bandwidth": link.bandwidth * _FASTER}
    links = (*topology.links[:number], link.model_copy(update=update), *topology.links[number + 1 :])
    return topology.model_copy(update={"links": links})


def _takes(solved: Solved) -> float:
    """Objective per token: seconds, for the latency objectives."""
    if solved.result.objective is None:
        raise AssertionError("only a placement with an objective is explained")
    return solved.result.objective / _rate(solved)
