"""From prices to the best bound: runs the bundle against an oracle until little more is promised.

Decides when the bound is good enough. Must not know how placements are made of it. An everyday answer may have looked
at a part of the holder sets and then bounds nothing; only answers that looked at all make `bound`.
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from planner.solvers.decomposition.answers import Answer, Oracle
from planner.solvers.decomposition.arrays import Floats, Ints
from planner.solvers.decomposition.bundle import Bundle
from planner.solvers.decomposition.prices import Choice, summarise

MAX_PASSES = 500
MAX_ROUNDS = 12
MISSING = 1e-5  # relative fall of the value, over all sets, that says that sets which matter were left out
KEEP_ANSWERS = 12
GROUPS = 48
MANY_PRICES = 40  # beyond, without a price per layer and node, subgradient steps go first
PATIENCE = 4
SMALLEST_SHARE = 2e-3
START_PRICES = (0.5, 0.2, 0.08, 0.03, 0.01)  # of a slot, in what a mean expert costs


class Dual:
    """Prices, the bound they prove and the last answers. `solve` modifies it."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.coupling = oracle, oracle.coupling
        arrays = self.coupling.arrays
        self.group = _groups(arrays.num_experts, arrays.layer_of_expert if arrays.makespan is not None else None)
        self.bundle = Bundle(self.coupling, int(self.group[-1]) + 1, self._start())
        self.bound, self.best_theta = -np.inf, self.bundle.center
        self.best_answer = oracle.answer(self.best_theta)
        self.recent: deque[Answer] = deque(maxlen=KEEP_ANSWERS)

    def solve(self, tolerance: float, *, keep_going: Callable[[], bool]) -> None:
        """Raise the bound until the model promises less than `tolerance` (relative) more, or there is no time."""
        if self.coupling.heaviest.start > MANY_PRICES:
            self._approach(keep_going)
        for _ in range(MAX_ROUNDS):
            self._improve(tolerance, keep_going)
            if self.oracle.is_whole or not self._certify() or not keep_going():
                break

    def _start(self) -> Floats:
        """Best of one memory price for all places, over some powers, with the heaviest nodes' prices even."""
        coupling = self.coupling
        theta = np.zeros(coupling.size)
        if coupling.arrays.makespan is not None:
            theta[coupling.heaviest] = coupling.ceiling[coupling.heaviest] / coupling.arrays.num_nodes
        tried = np.repeat(theta[None], len(START_PRICES), axis=0)
        tried[:, coupling.memory] = np.array(START_PRICES)[:, None] * coupling.unit
        values = [self._value(each, self.oracle.answer(each)) for each in tried]
        return np.asarray(tried[int(np.argmax(values))])

    def _approach(self, keep_going: Callable[[], bool]) -> None:
        """Subgradient steps before the bundle, which is slow to find its way among many prices.

        θ ← θ + step · (target − value) / |g|² · g with g = use − limit (Polyak 1969), in units of each price's scale;
        the target lies a share above the best value, and that share halves after `PATIENCE` passes without gain.
        """
        theta, share, stale, scale = self.bundle.center, 0.1, 0, self.coupling.scale
        while share > SMALLEST_SHARE and keep_going():
            answer = self.oracle.answer(theta)
            value, choice = self._value(theta, answer), self._choice(answer)
            if self.oracle.is_whole:
                self._keep(theta, value, answer)
            self.recent.append(answer)
            stale = 0 if self.bundle.learn(theta, value, choice) else stale + 1
            if stale > PATIENCE:
                theta, share, stale = self.bundle.center, share / 2, 0
                continue
            slope = (choice.use.sum(axis=0) - self.coupling.limit) * scale
            length = (self.bundle.value + share * abs(self.bundle.value) - value) / max(float(slope @ slope), 1e-300)
            theta = np.clip(theta + length * slope * scale, 0.0, self.coupling.ceiling)
        self.bundle.restate(self.bundle.value)

    def _improve(self, tolerance: float, keep_going: Callable[[], bool]) -> None:
        theta = self.bundle.center
        for _ in range(MAX_PASSES):
            answer = self.oracle.answer(theta)
            value = self._value(theta, answer)
            if self.oracle.is_whole:
                self._keep(theta, value, answer)
            self.recent.append(answer)
            self.bundle.learn(theta, value, self._choice(answer))
            if not keep_going():
                break
            theta = self.bundle.propose()
            if self.bundle.promise - self.bundle.value <= tolerance * abs(self.bundle.value):
                break

    def _certify(self) -> bool:
        """Look at all holder sets at the centre; return whether sets that matter had been left out."""
        theta, promised = self.bundle.center, self.bundle.value
        answer = self.oracle.certify(theta)
        value = self._value(theta, answer)
        self._keep(theta, value, answer)
        self.bundle.learn(theta, value, self._choice(answer))
        self.bundle.restate(self._value(theta, self.oracle.answer(theta)))
        return promised - value > MISSING * abs(value)

    def _keep(self, theta: Floats, value: float, answer: Answer) -> None:
        if value > self.bound:
            self.bound, self.best_theta, self.best_answer = value, theta, answer

    def _value(self, theta: Floats, answer: Answer) -> float:
        return float(answer.lower.sum() - self.coupling.limit @ theta)

    def _choice(self, answer: Answer) -> Choice:
        return summarise(self.coupling, answer.held, answer.place, self.group)


def _groups(num_experts: int, layer: Ints | None) -> Ints:
    """One group per layer where prices differ by layer, else about `GROUPS` of equal size."""
    if layer is not None:
        return np.unique(layer, return_inverse=True)[1]
    return np.arange(num_experts) * min(GROUPS, num_experts) // num_experts
