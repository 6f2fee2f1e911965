"""Placement for the wait that a token really has: each layer waits for the slowest of its K experts.

Flow: `instance` (input) → `patterns` (merged events) → `dual` (lower bound, memory prices, by a first-order method)
→ `sweep` (whole layers at those prices, as paths of placements) → `select` (one column per layer that fits memory)
→ `polish` (experts exchanged between places) → `solve` (the loop, its incumbent and its bound).
"""

from planner.solvers.latency.instance import InvalidInstance, LatencyInstance, latency_instance, waits
from planner.solvers.latency.solve import Limits, Outcome, Progress, Schedule, solve_latency

__all__ = [
    "InvalidInstance",
    "LatencyInstance",
    "Limits",
    "Outcome",
    "Progress",
    "Schedule",
    "latency_instance",
    "solve_latency",
    "waits",
]
