"""A lower bound of the wait for clusters whose holder sets are too many to enumerate: calls added up, well weighed.

Decides bounds only. Must not know incumbents. The slowest of a layer's calls takes no less than any weighted mean of
them, so for weights a >= 0 of each event's experts that sum to 1::

    latency  >=  sum over events of w * sum_k a_k c[holder of expert k]

whose right side is `additive-latency` under another demand, which is solved and bounded for hundreds of nodes. Equal
weights are the first; then the weight of each event drifts to the calls that are slow in the answers so far
(fictitious play: Brown 1951, Robinson 1951), which raises the least possible right side.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from planner.problem import Bools, Floats, Problem
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.decomposition.solver import solve_decomposition

_GAP: Final = 5e-3  # to which each sum is solved
_SOFTNESS: Final = 0.25  # of "the slowest", in mean waits of a call
_GAIN: Final = 1e-3  # raised by less, the bound is as good as it gets
_MOST: Final = 40


def split_bound(
    problem: Problem,
    *,
    time_s: float,
    first: Bools | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[float, list[Bools]]:
    """Prove a lower bound of `latency`, in at most about `time_s`; also the placements that were met on the way.

    `first` is the answer to equal weights, where it is known. Limits of load and links are left out: they are about all
    calls, not their weighted mean.
    """
    free = replace(
        problem,
        balance=0.0,
        compute_limit=np.full_like(problem.compute_limit, np.inf),
        link_limit=np.full_like(problem.link_limit, np.inf),
    )
    weight = [np.full(chosen.shape, 1 / chosen.shape[2]) for chosen in problem.events]
    began, bound = clock(), 0.0
    met: list[Bools] = []
    if first is not None:
        weight = _drifted(problem, weight, first, 0)
    for step in range(0 if first is None else 1, _MOST):
        left, before = time_s - (clock() - began), bound
        if left <= 0:
            break
        weighted = replace(free, share=_share(problem, weight))
        limits = SolveLimits(time_s=left, gap=_GAP, seed=seed)
        found = solve_decomposition(weighted, objective="additive-latency", limits=limits, report=ignore)
        bound = max(bound, found.bound or 0.0)
        if found.placed is None or (before and bound < before * (1 + _GAIN)):
            break
        met.append(found.placed)
        weight = _drifted(problem, weight, found.placed, step)
    return bound, met


def _drifted(problem: Problem, weight: list[Floats], placed: Bools, step: int) -> list[Floats]:
    """Average the weights so far with those on the slowest calls of one more answer."""
    slow = _slowest(problem, placed)
    return [now + (then - now) / (step + 2) for now, then in zip(weight, slow, strict=True)]


def _share(problem: Problem, weight: list[Floats]) -> Floats:
    """Weight that falls on each expert, mean over the events of an ingress, float64 ``[I, L, E]``."""
    share = np.zeros((len(problem.events), problem.layers, problem.experts))
    for row, chosen, parts in zip(share, problem.events, weight, strict=True):
        for layer in range(problem.layers):
            carried = np.bincount(chosen[:, layer].ravel(), parts[:, layer].ravel(), minlength=problem.experts)
            row[layer] = carried / len(chosen)
    return share


def _slowest(problem: Problem, placed: Bools) -> list[Floats]:
    """Weights that lie on the slowest calls of each event, softly, float64 ``[T, L, K]`` by ingress."""
    layers = np.arange(problem.layers)
    weight = []
    for trunk, chosen in zip(problem.trunk_node, problem.events, strict=True):
        cost = problem.cost_s[trunk].T[:, :, None]  # [P, L, 1]
        call = np.where(placed, cost, np.inf).min(axis=0)[layers[None, :, None], chosen]
        ahead = (call - call.max(axis=2, keepdims=True)) / (_SOFTNESS * call.mean() + 1e-300)
        part = np.exp(np.maximum(ahead, -700.0))
        weight.append(part / part.sum(axis=2, keepdims=True))
    return weight
