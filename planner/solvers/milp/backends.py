"""Runs a PuLP model with HiGHS (through highspy, which tells its bound) or CBC (whose log tells it)."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import highspy
import numpy as np
import pulp
from numpy.typing import NDArray

from planner.problem import Bools
from planner.solvers.base import Bound, Incumbent, Report, SolveLimits, StopReason
from planner.solvers.milp.model import Model

_CBC_BOUND: Final = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)
_INTEGRALITY: Final = 1e-4


@dataclass(frozen=True)
class Answer:
    """What a backend proved; `bound` in the model's scaled objective, None where the backend told none."""

    stop_reason: StopReason
    has_placement: bool = False
    infeasible: bool = False
    bound: float | None = None
    detail: str = ""


def run_highs(model: Model, limits: SolveLimits, report: Report) -> Answer:
    """Run HiGHS; reports incumbents and bounds as it finds them."""
    kinds = highspy.cb.HighsCallbackType
    solver = pulp.HiGHS(
        msg=False,
        gapRel=limits.gap,
        gapAbs=0.0,
        timeLimit=limits.time_s,
        random_seed=limits.seed,
        callbackTuple=(_listener(model, report), None),
        callbacksToActivate=[kinds.kCallbackMipImprovingSolution, kinds.kCallbackMipLogging],
    )
    model.lp.solve(solver)
    highs = model.lp.solverModel
    status = highs.getModelStatus()
    statuses = highspy.HighsModelStatus
    if status in {statuses.kInfeasible, statuses.kUnboundedOrInfeasible}:
        return Answer(StopReason.FINISHED, infeasible=True)
    info = highs.getInfo()
    found = np.isfinite(info.objective_function_value) and info.primal_solution_status == _FEASIBLE
    return Answer(
        stop_reason=StopReason.TIME if status == statuses.kTimeLimit else StopReason.FINISHED,
        has_placement=bool(found),
        bound=float(info.mip_dual_bound) if np.isfinite(info.mip_dual_bound) else None,
        detail=highs.modelStatusToString(status),
    )


_FEASIBLE: Final = 2  # highspy's SolutionStatus kSolutionStatusFeasible


def _listener(model: Model, report: Report) -> Any:
    kinds = highspy.cb.HighsCallbackType
    best = -np.inf

    def listen(kind: Any, _message: str, out: Any, _into: Any, _user: Any) -> None:
        nonlocal best
        if kind == kinds.kCallbackMipImprovingSolution:
            placed = _placement_of(model, np.asarray(out.mip_solution))
            report(Incumbent(placed, out.objective_function_value / model.scale))
        elif kind == kinds.kCallbackMipLogging and np.isfinite(out.mip_dual_bound) and out.mip_dual_bound > best:
            best = out.mip_dual_bound
            report(Bound(best / model.scale))

    return listen


def _placement_of(model: Model, values: NDArray[np.float64]) -> Bools:
    """Read a placement from HiGHS's columns, which PuLP has numbered."""
    placed = np.zeros((model.shape[0], len(model.variables.x)), dtype=bool)
    for expert, places in enumerate(model.variables.x):
        for place, variable in places.items():
            placed[place, expert] = values[variable.index] > 0.5
    return placed.reshape(model.shape)


def run_cbc(model: Model, limits: SolveLimits, report: Report) -> Answer:  # noqa: ARG001 - CBC tells nothing until it ends
    """Run CBC; its bound is what its log says, and nothing where the log is silent."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-cbc-") as folder:
        log = Path(folder) / "cbc.log"
        solver = pulp.PULP_CBC_CMD(
            msg=False, gapRel=limits.gap / 2, timeLimit=limits.time_s, logPath=str(log),
            options=[f"randomCbcSeed {limits.seed}"],
        )  # fmt: skip
        solver.tmpDir = folder
        status = model.lp.solve(solver)
        text = log.read_text(errors="replace") if log.exists() else ""
    if status == pulp.LpStatusInfeasible:
        return Answer(StopReason.FINISHED, infeasible=True)
    optimal = model.lp.sol_status == pulp.LpSolutionOptimal
    found = optimal or model.lp.sol_status == pulp.LpSolutionIntegerFeasible
    told = _CBC_BOUND.findall(text)
    bound = float(told[-1]) if told else None
    if bound is None and optimal:
        bound = pulp.value(model.lp.objective) * (1 - limits.gap / 2)
    # On a time limit PuLP may hand over the values of the LP relaxation, which are no placement.
    return Answer(
        stop_reason=StopReason.FINISHED if optimal else StopReason.TIME,
        has_placement=found and _is_integral(model),
        bound=bound,
        detail=pulp.LpSolution[model.lp.sol_status],
    )


def _is_integral(model: Model) -> bool:
    values = np.array([v.varValue or 0.0 for places in model.variables.x for v in places.values()])
    return bool((np.abs(values - values.round()) < _INTEGRALITY).all())
