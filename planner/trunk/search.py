"""Paths and placement together: trunks worth trying, each with a placement of its own, improved in turn.

Decides which trunks are tried, how long, and which is the best: the one on which a token takes least, all on the same
figures. For the paths that are decided the placement is a problem for any solver; for a placement the best paths are
found exactly (`viterbi`). Must not know solvers: it is given tools. Flow: starts → quick placements → the most
promising improved in turn → the asked solver on those that may still win → `Solved`, under the joint bound.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Final

import numpy as np

from planner.assemble import Solved
from planner.errors import InfeasibleProblem, PlannerError, UnsafePlan
from planner.feasibility import impossible
from planner.objective import ObjectiveName
from planner.problem import Ints, Problem
from planner.solvers.base import SolveLimits, StopReason, with_status
from planner.trunk.bound import blame_of, joint_bound, trunk_bound
from planner.trunk.neighbours import neighbours, single_layers
from planner.trunk.starts import find_starts
from planner.trunk.tools import Report, Tools
from planner.trunk.trials import STAY, Trial, why_nothing
from planner.trunk.viterbi import better_paths

STARTS: Final = 10  # trunks that are tried by estimate, beside the one at the ingress and the pipelines
_QUICK: Final = ("packed", "additive")
_ONWARD: Final = "from "
_PIPELINES: Final = ("pipeline", "pipeline-speed")
_LEAST_STARTS: Final = 3  # of these, that are tried however late it is
_QUICK_SHARE: Final = 0.3  # of the time, to try starts
_EXPLORE_SHARE: Final = 0.4  # of the time, until which trunks nearby are looked at
_TURN_SHARE: Final = 0.6  # of the time, until which paths and placements are improved in turn
_WEIGH_SHARE: Final = 0.1  # of the time, to improve the placement for staying where that cannot win
_WEIGH_S: Final = 5.0  # seconds of it at most
_IMPROVED: Final = 4  # trunks that are improved in turn
_FINALISTS: Final = 3  # trunks on which the asked solver has its say
_FEW_LAYERS: Final = 64  # layers of all ingresses × nodes up to which a search moves layers one by one
_SAME: Final = 1e-9
_OUT_OF_REACH: Final = "does not fit beside the trunk in force"


@dataclass(eq=False)
class _Entry:
    """A trunk with the best placement so far; `proven` where no placement of that trunk is better.

    `floor_s` is what a token takes at least with this trunk; `improved` once a solver has placed for it.
    """

    name: str
    solved: Solved
    floor_s: float
    proven: bool = False
    improved: bool = False

    @property
    def mean_s(self) -> float:
        return self.solved.judgement.predicted_latency_s

    def least_s(self) -> float:
        """Seconds that a token takes at least with this trunk, as far as it is known."""
        bound = self.solved.result.bound
        if bound is None or self.solved.objective_name != "latency":
            return self.floor_s
        return max(self.floor_s, bound / float(self.solved.problem.tokens_per_s.sum()))


def search_paths(
    problem: Problem,
    tools: Tools,
    *,
    objective: ObjectiveName,
    limits: SolveLimits,
    report: Report,
    clock: Callable[[], float] = time.monotonic,
) -> Solved:
    """Find paths and a placement; the result's problem has the trunk where it is to run.

    Parameters
    ----------
    limits
        `start` is a placement for the trunk that the problem has.
    report
        Hears of seconds, objective and bound on the way.

    Raises
    ------
    InfeasibleProblem
        Where no trunk that was tried leaves room for all experts.
    """
    search = _Search(problem, tools, objective=objective, limits=limits, report=report, clock=clock)
    return search.run()


class _Search:
    """State of one search. Every method modifies it."""

    def __init__(
        self,
        problem: Problem,
        tools: Tools,
        *,
        objective: ObjectiveName,
        limits: SolveLimits,
        report: Report,
        clock: Callable[[], float],
    ) -> None:
        self.problem, self.tools, self.objective, self.limits = replace(problem, moves=False), tools, objective, limits
        self.report, self.clock, self.began = report, clock, clock()
        self.blame = blame_of(problem, "latency")
        self.bound = joint_bound(problem, objective, self.blame if objective == "latency" else None)
        self.entries: list[_Entry] = []
        self.in_force: list[Solved] = []
        self.failed: dict[str, PlannerError] = {}

    def run(self) -> Solved:
        self._begin()
        if not self.entries:
            self._make_room()
        if not self.entries:
            raise why_nothing({n: e for n, e in self.failed.items() if n not in _PIPELINES} or self.failed)
        for entry in self._ranked()[:_IMPROVED]:
            self._explore(entry)
        for entry in self._ranked()[:_IMPROVED]:
            self._alternate(entry)
        self._ask()
        self._weigh_staying()
        return self._outcome()

    def _begin(self) -> None:
        """Give every start a quick placement."""
        for name in _PIPELINES:
            self._try(name, partial(self.tools.quick, self.problem, name))
        if (placed := self.limits.start) is not None:
            entry = self._try("the plan in force", lambda: self.tools.keep(self.problem, placed))
            self.in_force = [] if entry is None else [entry.solved]
        for number, start in enumerate(
            find_starts(self.problem, STARTS, self.blame, partial(self._over, _QUICK_SHARE / 2))
        ):
            if number and self.entries and (self._closed() or (number > _LEAST_STARTS and self._over(_QUICK_SHARE))):
                break
            self._place(start.name, start.trunk_node)
        if STAY not in self._names() and not self.problem.room.fits(self.problem.stay_node):
            self._try(STAY, lambda: self.tools.quick(self.problem.with_trunk(self.problem.stay_node), "packed"))

    def _make_room(self) -> None:
        """Where no start leaves room for all experts, go from trunk to trunk as long as more of them fit."""
        starts = [
            self.problem.trunk_node,
            *(start.trunk_node for start in find_starts(self.problem, STARTS, self.blame)),
        ]
        here = max(starts, key=self._slots)
        paths, climbing = list(np.unique(np.concatenate(starts), axis=0)), True
        while climbing and not self.entries and not self._over(_EXPLORE_SHARE):
            climbing = False
            near = (neighbours(here, paths, self.problem.num_nodes), single_layers(here, self.problem.num_nodes))
            for trunk in chain(*near):
                if self._over(_EXPLORE_SHARE):
                    return
                if self._slots(trunk) > self._slots(here):
                    here, climbing = trunk, True
                    self._place("more room", here)
                    break

    def _slots(self, trunk: Ints) -> int:
        """Experts that fit beside a trunk; -1 where it does not fit itself."""
        return int(self.problem.with_trunk(trunk).node_slots.sum()) if self._fits(trunk) else -1

    def _fits(self, trunk: Ints) -> bool:
        """Whether a trunk fits, and beside the one that is in force."""
        return self.problem.room.fits(trunk) and self.tools.allows(trunk)

    def _names(self) -> set[str]:
        return {entry.name for entry in self.entries} | self.failed.keys()

    def _place(self, name: str, trunk_node: Ints) -> None:
        """Try a trunk with each quick heuristic; where calls wait for others, both are of use."""
        moved = self.problem.with_trunk(trunk_node)
        if name != STAY and self.entries and trunk_bound(moved, self.blame) >= self._ranked()[0].mean_s:
            return
        if missing := impossible(moved):
            self.failed[name] = InfeasibleProblem(missing)
            return
        if not self.tools.allows(trunk_node):
            self.failed[name] = UnsafePlan([_OUT_OF_REACH])
            return
        for heuristic in (*_QUICK, "dancemoe") if name == STAY else _QUICK:
            entry = self._try(name, partial(self.tools.quick, moved, heuristic))
            if entry is not None and not entry.solved.judgement.wait_s.any():
                entry.proven = True
                return
        if name not in {entry.name for entry in self.entries} and not self._over(_QUICK_SHARE):
            self._try(name, partial(self.tools.improve, moved, None, 0.1 * self.limits.time_s))

    def _try(self, name: str, make: Callable[[], Solved]) -> _Entry | None:
        """Enter what is made under a name, where it is better than what has that name."""
        try:
            solved = make()
            if not self.tools.allows(solved.problem.trunk_node):
                raise UnsafePlan([_OUT_OF_REACH])
        except PlannerError as error:
            self.failed.setdefault(name, error)
            return None
        return self._enter(name, solved)

    def _enter(self, name: str, solved: Solved) -> _Entry:
        known = next((entry for entry in self.entries if entry.name == name), None)
        if known is None:
            known = _Entry(name, solved, trunk_bound(solved.problem, self.blame))
            self.entries.append(known)
        elif solved.judgement.predicted_latency_s < known.mean_s:
            known.solved = solved
        self._tell(solved)
        return known

    def _tell(self, solved: Solved) -> None:
        """Report what is now the best."""
        best = self._ranked()[0].solved
        if best is solved and best.result.objective is not None:
            self.report(self.clock() - self.began, best.result.objective, self.bound)

    def _ranked(self) -> list[_Entry]:
        return sorted(self.entries, key=lambda entry: entry.mean_s)

    def _explore(self, entry: _Entry) -> None:
        """Go from trunk to trunk nearby as long as a quick placement gets better."""
        here, best, paths = entry.solved.problem.trunk_node, entry.mean_s, self._paths()
        seen = {here.tobytes()}
        found = True
        while found:
            found = False
            for trunk in self._near(here, paths):
                if self._over(_EXPLORE_SHARE) or self._closed():
                    return
                if trunk.tobytes() in seen or not self._fits(trunk):
                    continue
                seen.add(trunk.tobytes())
                solved = self._quick(trunk, best)
                if solved is not None and solved.judgement.predicted_latency_s < best * (1 - _SAME):
                    here, best, found = trunk, solved.judgement.predicted_latency_s, True
                    self._follow_to(entry, solved)
                    break

    def _near(self, here: Ints, paths: list[Ints]) -> Iterator[Ints]:
        """Trunks nearby; where they are few, those too in which one layer alone goes elsewhere."""
        yield from neighbours(here, paths, self.problem.num_nodes)
        if here.size * self.problem.num_nodes <= _FEW_LAYERS:
            yield from single_layers(here, self.problem.num_nodes)

    def _paths(self) -> list[Ints]:
        """Paths that the best trunks have, and those of the ingresses that stay."""
        rows = np.concatenate([entry.solved.problem.trunk_node for entry in self._ranked()[: 2 * _IMPROVED]])
        return list(np.unique(rows, axis=0))

    def _quick(self, trunk: Ints, limit_s: float) -> Solved | None:
        """Return the better quick placement; None where there is none, or none can be better than the limit."""
        moved = self.problem.with_trunk(trunk)
        if trunk_bound(moved, self.blame) >= limit_s or impossible(moved):
            return None
        found = []
        for heuristic in _QUICK:
            try:
                found.append(self.tools.quick(moved, heuristic))
            except PlannerError:
                continue
        return min(found, key=lambda solved: solved.judgement.predicted_latency_s, default=None)

    def _alternate(self, entry: _Entry) -> None:
        """Improve the placement for the paths, then the paths for the placement, until neither gets better."""
        while not self._over(_TURN_SHARE) and not self._closed():
            before = entry.mean_s
            if not entry.proven and self._may_win(entry):
                left = _TURN_SHARE * self.limits.time_s - (self.clock() - self.began)
                self._improve(entry, max(left / _IMPROVED, 0.02 * self.limits.time_s))
            self._follow(entry)
            if entry.mean_s > before * (1 - _SAME):
                return

    def _improve(self, entry: _Entry, given: float) -> None:
        try:
            better = self.tools.improve(entry.solved.problem, entry.solved.placed, given)
        except PlannerError:
            return
        self._take(entry, better)

    def _take(self, entry: _Entry, better: Solved) -> None:
        """Keep what is better, or what is as good and has a bound of its own."""
        entry.improved = True
        if better.judgement.predicted_latency_s < entry.mean_s * (1 + _SAME) or entry.solved.result.bound is None:
            worse = better.judgement.predicted_latency_s > entry.mean_s
            bound = better.result.bound
            entry.solved = replace(entry.solved, result=replace(entry.solved.result, bound=bound)) if worse else better
            gap = better.result.gap
            entry.proven = not worse and gap is not None and gap <= self.limits.gap
            self._enter(entry.name, entry.solved)

    def _follow(self, entry: _Entry) -> None:
        """Move the trunk to where the placement wants it: within the memory it leaves, else with a new placement."""
        solved = entry.solved
        for within_memory in (True, False):
            trunk = better_paths(solved.problem, solved.placed, within_memory=within_memory)
            if (trunk == solved.problem.trunk_node).all() or not self._fits(trunk):
                continue
            found = self._moved(solved, trunk, within_memory=within_memory)
            if found is not None and found.judgement.predicted_latency_s < entry.mean_s * (1 - _SAME):
                self._follow_to(entry, found)
                return

    def _follow_to(self, entry: _Entry, found: Solved) -> None:
        """Go on from what was found; the start stays as it was tried."""
        if not entry.name.startswith(_ONWARD):
            name = _ONWARD + entry.name
            self.entries = [other for other in self.entries if other.name != name]
            self.entries.append(replace(entry))
            entry.name = name
        entry.solved, entry.proven, entry.improved = found, not found.judgement.wait_s.any(), False
        entry.floor_s = trunk_bound(found.problem, self.blame)
        self._tell(found)

    def _moved(self, solved: Solved, trunk: Ints, *, within_memory: bool) -> Solved | None:
        moved = self.problem.with_trunk(trunk)
        if impossible(moved):
            return None
        try:
            return self.tools.keep(moved, solved.placed) if within_memory else self.tools.quick(moved, "packed")
        except PlannerError:
            return None

    def _ask(self) -> None:
        """Let the asked solver place for the trunks that may still win, the best first."""
        open_ = [entry for entry in self._ranked() if not entry.proven and self._may_win(entry)]
        finalists = [entry for number, entry in enumerate(open_) if number < _FINALISTS or entry.name == STAY]
        for number, entry in enumerate(finalists):
            left = (1 - _WEIGH_SHARE) * self.limits.time_s - (self.clock() - self.began)
            if self._closed() or left < 0.02 * self.limits.time_s or not self._may_win(entry):
                continue
            given = left if number == len(finalists) - 1 else left / 2
            try:
                better = self.tools.ask(
                    entry.solved.problem, replace(self.limits, time_s=given, start=entry.solved.placed, tail=0.0)
                )
            except PlannerError:
                continue
            self._take(entry, better)

    def _weigh_staying(self) -> None:
        """Improve the placement for the trunk at the ingress, so that readers see what staying would really cost."""
        for entry in self.entries:
            if entry.name == STAY and not entry.improved and not entry.proven:
                self._improve(entry, min(_WEIGH_SHARE * self.limits.time_s, _WEIGH_S))

    def _may_win(self, entry: _Entry) -> bool:
        return entry is self._ranked()[0] or entry.least_s() < self._ranked()[0].mean_s * (1 - _SAME)

    def _closed(self) -> bool:
        """Whether the best is proven to be the best, or as near as was asked for."""
        best = self._ranked()[0].solved.result.objective
        return self.bound is not None and best is not None and best - self.bound <= self.limits.gap * best

    def _over(self, share: float) -> bool:
        return self.clock() - self.began > share * self.limits.time_s

    def _outcome(self) -> Solved:
        solved = self._with_tail(self._best())
        late = self._over(1.0)
        result = replace(
            solved.result,
            solver="paths" if solved.result.solver == "paths" else f"paths, {solved.result.solver}",
            bound=self.bound,
            seconds=self.clock() - self.began,
            stop_reason=StopReason.TIME if late else StopReason.FINISHED,
            trunk_node=solved.problem.trunk_node,
        )
        return replace(
            solved, result=with_status(result, self.limits.gap), asked_gap=self.limits.gap, trials=tuple(self._trials())
        )

    def _best(self) -> Solved:
        """Return the best that can be come to, else what is in force; where that is nothing, the best of all."""
        found = [*(entry.solved for entry in self._ranked()), *self.in_force]
        return next((solved for solved in found if self.tools.reaches(solved)), found[0])

    def _with_tail(self, solved: Solved) -> Solved:
        """Shorten the longest waits on the chosen paths, where that was asked for."""
        if not self.limits.tail or not solved.judgement.wait_s.any():
            return solved
        given = max(self.limits.time_s - (self.clock() - self.began), 0.1 * self.limits.time_s)
        return self.tools.ask(solved.problem, replace(self.limits, time_s=given, start=solved.placed))

    def _trials(self) -> Iterator[Trial]:
        for entry in self._ranked():
            seen = entry.solved.judgement
            yield Trial(entry.name, seen.latency_s, seen.predicted_latency_s)
        placed = {entry.name for entry in self.entries}
        for name, error in self.failed.items():
            if name not in placed:
                yield Trial(name, note=str(error))
