"""The joint model: paths and placement in one MILP, for problems small enough to be solved exactly.

Decides both at once, as the check of the search and for who asks for it. Ingress i, layer l, nodes n and m, expert k of
a layer, place p, event e; beside x[k,p] (a replica):

    r[i,n,l] binary    the trunk of l runs at n for i              sum_n r = 1
    f[i,l,n,m] >= 0    the hop behind l, from the last to the first  sum_m f = r[i,n,l],  sum_n f = r[i,m,l+1]
    t[n,l] >= r[i,n,l] trunk weights of l at n, whoever runs it
    a[i,k,n,p] >= 0    calls of i from n for k that p serves        sum_p a = r[i,n,l],  sum_n a <= x[k,p]
    z[i,e] >= sum_{n,p} c[n,p] a[i,k,n,p] for each chosen k         what the event waits

    minimise  sum_i T_i (sum compute r + sum hop f + sum_e w_e z)
"""

import time
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import pulp

from planner.objective import ObjectiveName
from planner.problem import Bools, Ints, Problem
from planner.solvers.base import Bound, Progress, Report, Result, SolveLimits, SolveStatus, with_status
from planner.solvers.events import UnsuitedSolver
from planner.solvers.milp.backends import run_highs
from planner.solvers.milp.constraints import coverage, one_tier, pins
from planner.solvers.milp.model import Model
from planner.solvers.milp.variables import Variables
from planner.solvers.terms import exact_terms, nodes_that_may_bind

MOST_CALLS: Final = 60_000  # shares of calls up to which the model is written
MOST_WAITS: Final = 20_000  # rows of waits
TINY_CALLS: Final = 1_500
TINY_WAITS: Final = 1_000

_Terms = list[tuple[pulp.LpVariable, float]]


@dataclass(eq=False)
class _Draft:
    """The model as it is written. Every method modifies it."""

    problem: Problem
    x: list[dict[int, pulp.LpVariable]]
    lp: pulp.LpProblem = field(default_factory=lambda: pulp.LpProblem("joint", pulp.LpMinimize))
    r: dict[tuple[int, int, int], pulp.LpVariable] = field(default_factory=dict)
    f: dict[tuple[int, int, int, int], pulp.LpVariable] = field(default_factory=dict)
    a: dict[tuple[int, int, int], dict[int, pulp.LpVariable]] = field(default_factory=dict)
    cost: _Terms = field(default_factory=list)

    @property
    def ingresses(self) -> range:
        """All of them: one without tokens has its KV cache somewhere all the same."""
        return range(len(self.problem.ingress_node))

    @property
    def nodes(self) -> range:
        return range(self.problem.num_nodes)

    def row(self, terms: _Terms, sense: int, limit: float, name: str) -> None:
        self.lp.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), sense, name, limit), name)


def solve_joint(problem: Problem, *, objective: ObjectiveName, limits: SolveLimits, report: Report) -> Result:
    """Solve for paths and placement; raises `UnsuitedSolver` where the model would be too large."""
    refuse_large_joint(problem, objective)
    start = time.monotonic()
    draft = _write(problem)
    scale = 1e6 / max(sum(weight for _, weight in draft.cost), 1e-30)
    draft.lp.setObjective(pulp.LpAffineExpression([(variable, scale * weight) for variable, weight in draft.cost]))
    shape = (problem.num_places, problem.layers, problem.experts)
    model = Model(draft.lp, Variables(draft.x, {}), scale, shape)
    left = max(limits.time_s - (time.monotonic() - start), 0.1)
    answer = run_highs(model, replace(limits, time_s=left), _only_bounds(report))
    result = Result(
        solver="milp",
        status=SolveStatus.INFEASIBLE if answer.infeasible else SolveStatus.UNKNOWN,
        stop_reason=answer.stop_reason,
        seconds=time.monotonic() - start,
        placed=model.placement() if answer.has_placement else None,
        objective=float(pulp.value(draft.lp.objective)) / scale if answer.has_placement else None,
        bound=None if answer.bound is None else answer.bound / scale,
        detail=answer.detail,
        trunk_node=_trunk_of(draft) if answer.has_placement else None,
    )
    return with_status(result, limits.gap)


def refuse_large_joint(problem: Problem, objective: ObjectiveName) -> None:
    """Raise `UnsuitedSolver` where the joint model does not hold what is asked, or should not be written."""
    if objective != "latency":
        raise UnsuitedSolver(
            "milp: paths and placement together minimise latency; use --objective latency or --solver auto"
        )
    calls, rows = _size(problem)
    if calls > MOST_CALLS or rows > MOST_WAITS:
        raise UnsuitedSolver(
            f"milp: paths and placement together need {calls} shares of calls and {rows} rows of waits, above the "
            f"limits of {MOST_CALLS} and {MOST_WAITS} of an exact model; use --solver auto, or shorter traces"
        )


def is_tiny(problem: Problem) -> bool:
    """Whether the model is solved in seconds, so that it is worth a try beside any search."""
    calls, rows = _size(problem)
    return calls <= TINY_CALLS and rows <= TINY_WAITS


def _size(problem: Problem) -> tuple[int, int]:
    """Shares of calls and rows of waits that the model needs at most."""
    calls = problem.layers * problem.experts * problem.num_nodes * problem.num_places * len(problem.ingress_node)
    return calls, problem.top_k * sum(len(events) for _, _, events, _ in _events(problem))


def _only_bounds(report: Report) -> Report:
    """Pass bounds on: a placement without its paths is no use to anybody."""

    def told(progress: Progress) -> None:
        if isinstance(progress, Bound):
            report(progress)

    return told


def _events(problem: Problem) -> list[tuple[int, int, Ints, Ints]]:
    """Return sets of experts chosen together: ingress, layer, experts ``[M, K]`` and how often each ``[M]``."""
    found = []
    for i, events in enumerate(problem.events):
        for layer in range(problem.layers):
            chosen, count = np.unique(np.sort(events[:, layer].astype(np.int64), axis=1), axis=0, return_counts=True)
            found.append((i, layer, chosen, count))
    return found


def _write(problem: Problem) -> _Draft:
    whole = problem.room.room_bytes[problem.place_node, problem.place_tier]
    terms = exact_terms(replace(problem, capacity_bytes=whole), "latency")
    x = [
        {int(p): pulp.LpVariable(f"x_{p}_{k}", cat=pulp.LpBinary) for p in np.flatnonzero(terms.allowed[:, k])}
        for k in range(terms.num_experts)
    ]
    draft = _Draft(problem, x)
    for family in (coverage, one_tier, pins):
        for row, name in family(terms, Variables(x, {})):
            draft.lp.addConstraint(row, name)
    for i in draft.ingresses:
        _paths(draft, i)
    for n in draft.nodes:
        _memory(draft, n)
    _calls(draft)
    _waits(draft)
    _load(draft)
    _links(draft)
    return draft


def _paths(draft: _Draft, i: int) -> None:
    """Run each layer at one node, and hop from each layer's node to the next one's: a ring."""
    problem, rate = draft.problem, float(draft.problem.tokens_per_s[i])
    for layer in range(problem.layers):
        for n in draft.nodes:
            draft.r[i, n, layer] = pulp.LpVariable(f"r_{i}_{n}_{layer}", cat=pulp.LpBinary)
            draft.cost.append((draft.r[i, n, layer], rate * float(problem.compute_s[n, layer])))
            for m in draft.nodes:
                draft.f[i, layer, n, m] = pulp.LpVariable(f"f_{i}_{layer}_{n}_{m}", 0, 1)
                draft.cost.append((draft.f[i, layer, n, m], rate * float(problem.hop_s[n, m])))
        draft.row([(draft.r[i, n, layer], 1.0) for n in draft.nodes], pulp.LpConstraintEQ, 1, f"run_{i}_{layer}")
    for layer in range(problem.layers):
        onward = (layer + 1) % problem.layers
        for n in draft.nodes:
            leaving = [(draft.f[i, layer, n, m], 1.0) for m in draft.nodes]
            coming = [(draft.f[i, layer, m, n], 1.0) for m in draft.nodes]
            here, there = draft.r[i, n, layer], draft.r[i, n, onward]
            draft.row([*leaving, (here, -1.0)], pulp.LpConstraintEQ, 0, f"leave_{i}_{layer}_{n}")
            draft.row([*coming, (there, -1.0)], pulp.LpConstraintEQ, 0, f"come_{i}_{layer}_{n}")


def _memory(draft: _Draft, n: int) -> None:
    """Fit experts, trunk weights once, and each ingress's KV cache into the tiers of a node."""
    problem, room = draft.problem, draft.problem.room
    for place in np.flatnonzero(problem.place_node == n).tolist():
        tier, unit = int(problem.place_tier[place]), int(problem.place_bytes[place])
        taken = [(here[place], 1.0) for here in draft.x if place in here]
        if tier == room.trunk_tier[n]:
            taken += [(variable, bytes_ / unit) for variable, bytes_ in _trunk(draft, n)]
        draft.row(taken, pulp.LpConstraintLE, float(room.room_bytes[n, tier]) / unit, f"memory_{place}")
    if room.own_bytes[n] == 0:
        need = [(variable, bytes_ / problem.expert_bytes) for variable, bytes_ in _trunk(draft, n)]
        draft.row(need, pulp.LpConstraintLE, 0.0, f"nothing_{n}")


def _trunk(draft: _Draft, n: int) -> _Terms:
    """Return the bytes of trunk and KV cache at a node: with both ends it has embedding and head together."""
    problem, room, last = draft.problem, draft.problem.room, draft.problem.layers - 1
    t = [pulp.LpVariable(f"t_{n}_{layer}", 0, 1) for layer in range(problem.layers)]
    both = pulp.LpVariable(f"both_{n}", 0, 1)
    for layer in range(problem.layers):
        for i in draft.ingresses:
            running = draft.r[i, n, layer]
            draft.row([(t[layer], 1.0), (running, -1.0)], pulp.LpConstraintGE, 0, f"weights_{i}_{n}_{layer}")
    ends = {t[0]: 1.0, t[last]: 1.0} if last else {t[0]: 2.0}
    draft.row([(both, 1.0), *((v, -c) for v, c in ends.items())], pulp.LpConstraintGE, -1, f"ends_{n}")
    for name, end in (("first", t[0]), ("last", t[last])):
        draft.row([(end, 1.0), (both, -1.0)], pulp.LpConstraintGE, 0, f"{name}_{n}")
    weights = room.layer_bytes.astype(np.float64)
    weights[0] += room.input_bytes
    weights[last] += room.head_bytes
    kv = [(draft.r[i, n, layer], float(room.kv_bytes[layer])) for i in draft.ingresses for layer in range(len(t))]
    together = float(room.both_bytes - room.input_bytes - room.head_bytes)
    return [*zip(t, weights.tolist(), strict=True), *kv, (both, together)]


def _calls(draft: _Draft) -> None:
    """Serve calls from where the layer's trunk runs, only by holders: sum_p a = r, sum_n a <= x."""
    problem = draft.problem
    for i, layer, chosen, _ in _events(problem):
        for expert in np.unique(chosen).tolist():
            k = layer * problem.experts + expert
            for n in draft.nodes:
                shares = {p: pulp.LpVariable(f"a_{i}_{k}_{n}_{p}", 0, 1) for p in draft.x[k]}
                draft.a[i, k, n] = shares
                served = [(a, 1.0) for a in shares.values()]
                draft.row([*served, (draft.r[i, n, layer], -1.0)], pulp.LpConstraintEQ, 0, f"serve_{i}_{k}_{n}")
            for p, x in draft.x[k].items():
                given = [(draft.a[i, k, n][p], 1.0) for n in draft.nodes]
                draft.row([*given, (x, -1.0)], pulp.LpConstraintLE, 0, f"holder_{i}_{k}_{p}")


def _waits(draft: _Draft) -> None:
    """Let an event wait for the slowest of its calls: z >= sum_{n,p} c[n,p] a[i,k,n,p] for each chosen k."""
    problem = draft.problem
    unit = 1 / max(float(problem.cost_s.max(initial=0.0)), 1e-30)  # z in units of the dearest call, so rows are near 1
    for i, layer, chosen, count in _events(problem):
        weight = float(problem.tokens_per_s[i]) / max(len(problem.events[i]), 1) / unit
        for number, (experts, times) in enumerate(zip(chosen.tolist(), count.tolist(), strict=True)):
            z = pulp.LpVariable(f"z_{i}_{layer}_{number}", 0)
            draft.cost.append((z, weight * times))
            for expert in experts:
                k = layer * problem.experts + expert
                served = [
                    (a, -unit * float(problem.cost_s[n, p])) for n in draft.nodes for p, a in draft.a[i, k, n].items()
                ]
                draft.row([(z, 1.0), *served], pulp.LpConstraintGE, 0, f"wait_{i}_{layer}_{number}_{expert}")


def _load(draft: _Draft) -> None:
    """Keep the calls that a node serves within its compute."""
    problem = draft.problem
    rate = problem.demand.reshape(len(problem.demand), -1)
    for m in nodes_that_may_bind(problem).tolist():
        here = [
            (a, float(rate[i, k] * problem.service_s[p]))
            for (i, k, _), shares in draft.a.items()
            for p, a in shares.items()
            if problem.place_node[p] == m
        ]
        draft.row(here, pulp.LpConstraintLE, float(problem.compute_limit[m]), f"load_{m}")


def _links(draft: _Draft) -> None:
    """Keep calls and hops over a link within its bandwidth."""
    problem = draft.problem
    rate = problem.demand.reshape(len(problem.demand), -1)
    crosses = _crossing(problem)
    most = float(rate.sum()) * problem.call_bytes + problem.layers * problem.hop_bytes * problem.tokens_per_s.sum()
    for u, limit in enumerate((problem.link_limit + problem.hop_load).tolist()):
        if most <= limit:
            continue
        calls = [
            (a, float(rate[i, k] * problem.call_bytes / limit))
            for (i, k, n), shares in draft.a.items()
            for p, a in shares.items()
            if crosses[u, n, problem.place_node[p]]
        ]
        hops = [
            (f, float(problem.tokens_per_s[i] * problem.hop_bytes / limit))
            for (i, _, n, m), f in draft.f.items()
            if crosses[u, n, m]
        ]
        draft.row([*calls, *hops], pulp.LpConstraintLE, 1, f"link_{u}")


def _crossing(problem: Problem) -> Bools:
    """Whether the way from one node to another crosses a link, bool ``[U, N, N]``."""
    crosses = np.zeros((len(problem.link_limit), problem.num_nodes, problem.num_nodes), dtype=bool)
    crosses[problem.hop_link, problem.hop_caller, problem.hop_holder] = True
    return crosses


def _trunk_of(draft: _Draft) -> Ints:
    """Read the solved paths, int64 ``[I, L]``."""
    shape = (len(draft.ingresses), len(draft.nodes), draft.problem.layers)
    values = np.zeros(shape)
    for index, variable in draft.r.items():
        values[index] = variable.varValue or 0.0
    return np.asarray(values.argmax(axis=1).astype(np.int64))
