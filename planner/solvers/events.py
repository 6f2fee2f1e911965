"""Recorded events as rows of an exact model: merged where they are equal, refused where they are too many.

Decides the sample-average form of `latency`: with z_m what pattern m waits, ``z_m >= c[n,p] a[n,k,p]`` summed over p,
for each expert k of the pattern, and ``minimise sum_m w_m z_m``. Must not know any solver library.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.errors import PlannerError
from planner.problem import Floats, Ints, Problem
from planner.solvers.terms import exact_terms
from schemas.outcome import ExitCode

MOST_ROWS: Final = 20_000  # HiGHS needs about a minute for as many


class UnsuitedSolver(PlannerError):
    """A solver was asked for what its model cannot hold, or not at this size."""

    exit_code = ExitCode.INVALID


@dataclass(frozen=True, eq=False)
class Patterns:
    """Sets of experts that tokens chose together.

    Attributes
    ----------
    caller
        Node where the trunk runs, int64 ``[M]``.
    experts
        Flat indices, int64 ``[M, K]``.
    weight
        Tokens per second that meet the pattern, float64 ``[M]``.
    """

    caller: Ints
    experts: Ints
    weight: Floats

    @property
    def num_rows(self) -> int:
        """Rows that a model needs, M x K."""
        return self.experts.size


def event_patterns(problem: Problem) -> Patterns:
    """Merge the events of all ingresses and layers; those of an ingress without tokens are left out."""
    parts = []
    for trunk, rate, events in zip(problem.trunk_node, problem.tokens_per_s, problem.events, strict=True):
        if rate > 0:
            flat = np.sort(events, axis=2).astype(np.int64) + np.arange(problem.layers)[None, :, None] * problem.experts
            caller = np.broadcast_to(trunk[None, :, None], (*flat.shape[:2], 1))
            rows = np.concatenate([caller, flat], axis=2).reshape(-1, 1 + flat.shape[2])
            merged, count = np.unique(rows, axis=0, return_counts=True)
            parts.append((merged, count * (float(rate) / len(events))))
    rows = np.concatenate([merged for merged, _ in parts])
    return Patterns(rows[:, 0], rows[:, 1:], np.concatenate([weight for _, weight in parts]))


def refuse_large(problem: Problem, solver: str) -> None:
    """Raise `UnsuitedSolver` where an exact solver should not be asked for the latency objective."""
    rows = event_patterns(problem).num_rows
    if rows > MOST_ROWS:
        raise UnsuitedSolver(
            f"{solver}: the recorded events make {rows} rows of the latency objective, above the limit of {MOST_ROWS} "
            "of an exact model; use --solver decomposition, shorter traces or --objective additive-latency"
        )
    if solver == "cpsat" and exact_terms(problem, "latency").coupled:
        raise UnsuitedSolver(
            "cpsat: compute or links may bind here, and split calls have no exact latency in its integers; use "
            "--solver milp or --objective additive-latency"
        )
