"""What it costs in quality that nodes hold experts in low precisions, and what of a budget that leaves.

Decides how losses add up: each (token, expert) that a node computes in a low precision costs what calibration measured
for one in that layer, nats of negative log-likelihood (`schemas.calibration.PrecisionCost.nll_per_row`); what those of
a token cost together makes the rise of perplexity at its ingress. Must not know who chooses precisions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.errors import Violation
from planner.objective import Routing
from planner.problem import Floats, Problem
from schemas.calibration import Calibration, load_calibration
from schemas.files import Fault, InvalidFile
from schemas.model import ModelSpec
from schemas.precision import Precision
from schemas.units import format_share

_SLACK = 1e-9  # relative; sums are rounded


@dataclass(frozen=True, eq=False)
class PrecisionCosts:
    """What one (token, expert) in a precision costs, float64 ``[L]`` by precision; nats, upper ends of intervals."""

    nll_per_row: Mapping[Precision, Floats]

    def knows(self, precisions: Sequence[Precision]) -> bool:
        """Whether all of these were measured."""
        return all(each in self.nll_per_row for each in precisions)


def costs_of(calibration: Calibration) -> PrecisionCosts:
    """Return what a calibration says of precisions; the checkpoint's own costs nothing."""
    found: dict[Precision, Floats] = {"checkpoint": np.zeros(calibration.layers)}
    for cost in calibration.precisions:
        found[cost.precision] = np.array(cost.nll_per_row, dtype=np.float64)
    return PrecisionCosts(found)


def read_costs(file: Path, model: ModelSpec) -> PrecisionCosts:
    """Read what precisions cost from a calibration; raises `InvalidFile` where it is none, or of another model."""
    calibration = load_calibration(file)
    theirs, ours = ((m.layers, m.experts, m.top_k) for m in (calibration, model))
    if theirs != ours:
        text = f"is of {calibration.model}, {theirs[0]} layers × {theirs[1]} experts, top-{theirs[2]}; {model.id} has "
        raise InvalidFile(file, [Fault("model", f"{text}{ours[0]} × {ours[1]}, top-{ours[2]}: calibrate that")])
    return costs_of(calibration)


def expected_rise(
    problem: Problem, routing: Routing, precisions: Sequence[Precision], costs: PrecisionCosts
) -> Floats | None:
    """Rise of perplexity for tokens of each ingress, relative, float64 ``[I]``; None where a precision is not measured.

    ``exp(Σ_{l,e,p} share[i,l,e] · a[trunk(i,l),p,l,e] · nll[precision(p), l]) − 1``, a as in `Routing`.

    Parameters
    ----------
    precisions
        Of each node.
    """
    if not costs.knows(precisions):
        return None
    nll = np.stack([costs.nll_per_row[each] for each in precisions])[problem.place_node]  # [P, L]
    layers = np.arange(problem.layers)
    if routing.share is None:
        per_call = nll[routing.holder, layers[None, :, None]]  # [N, L, E]
    else:
        per_call = np.einsum("nple,pl->nle", routing.share, nll)
    callers = per_call[problem.trunk_node, layers]  # [I, L, E]
    return np.asarray(np.expm1((problem.share * callers).sum(axis=(1, 2))))


def left_of(budget: float, rise: float) -> float:
    """Return what a rise of perplexity leaves of a budget, relative; 0 where it takes all.

    >>> round(left_of(0.01, 0.002), 5)
    0.00798
    """
    return max((1 + budget) / (1 + rise) - 1, 0.0)


def is_within(rise: float, budget: float) -> bool:
    """Whether a rise keeps a budget."""
    return rise <= budget * (1 + _SLACK)


def over_budget(problem: Problem, rise: Floats, budget: float) -> Iterator[Violation]:
    """Yield each ingress whose tokens would lose more than the budget allows."""
    for row in np.flatnonzero(rise > budget * (1 + _SLACK)).tolist():
        name, value = problem.node_ids[problem.ingress_node[row]], float(rise[row])
        message = (
            f"tokens of {name} are computed in precisions that raise perplexity by up to {format_share(value)}, above "
            f"the budget of {format_share(budget)}; let nodes hold experts in more bits, raise quality.budget, or let "
            "--precision auto choose"
        )
        yield Violation("quality", name, value, budget, "perplexity", message)


def rise_text(rise: float) -> str:
    """Write a rise of perplexity.

    >>> rise_text(0.00187)
    '+0.187 %'
    """
    return "no loss" if math.isclose(rise, 0.0, abs_tol=1e-12) else f"+{format_share(rise)}"
