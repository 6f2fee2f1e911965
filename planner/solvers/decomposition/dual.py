"""From prices to the best bound: runs the bundle against the oracle, over few holder sets first, over all at the end.

Decides when the bound is good enough. Must not know how placements are made of it. A value over a part of the holder
sets bounds nothing; only `Dual.bound`, from passes over all of them, is handed out.
"""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from planner.solvers.decomposition.arrays import Floats, Ints
from planner.solvers.decomposition.bundle import Bundle
from planner.solvers.decomposition.oracle import Answer, Oracle
from planner.solvers.decomposition.prices import Choice, summarise

ENOUGH_SETS = 3000  # holder sets looked at before the first pass over all
WHOLE_SETS = 8192  # up to here every pass looks at all
MAX_PASSES = 500
MAX_ROUNDS = 12
KEEP_ANSWERS = 12
GROUPS = 48


class Dual:
    """Prices, the bound they prove and the last answers. `improve` and `certify` modify it."""

    def __init__(self, oracle: Oracle, start: Floats | None = None) -> None:
        self.oracle, self.coupling = oracle, oracle.coupling
        arrays = oracle.arrays
        self.group = _groups(arrays.num_experts, arrays.layer_of_expert if arrays.makespan is not None else None)
        self.bundle = Bundle(self.coupling, int(self.group[-1]) + 1, _start(oracle) if start is None else start)
        every = len(oracle.sets)
        self.index: Ints = np.arange(every) if every <= WHOLE_SETS else oracle.sets.smallest(ENOUGH_SETS)
        self.bound, self.best_theta = -np.inf, self.bundle.center
        self.best_answer = oracle.answer(self.best_theta, self.index)
        self.recent: deque[Answer] = deque(maxlen=KEEP_ANSWERS)

    @property
    def is_whole(self) -> bool:
        """Whether every pass looks at all holder sets, so that each is a bound."""
        return len(self.index) == len(self.oracle.sets)

    def improve(self, tolerance: float) -> Iterator[float]:
        """Raise the dual until the model promises less than `tolerance` (relative) more; yield its value per pass."""
        theta = self.bundle.center
        for _ in range(MAX_PASSES):
            yield self._step(theta)
            theta = self.bundle.propose()
            if self.bundle.promise - self.bundle.value <= tolerance * abs(self.bundle.value):
                break

    def solve(self, tolerance: float, *, keep_going: Callable[[], bool]) -> None:
        """Find the best bound: improve over the sets known to matter, pass over all, add what was missing, repeat."""
        for _ in range(MAX_ROUNDS):
            for _ in self.improve(tolerance):
                if not keep_going():
                    break
            missing = self.certify()
            if not missing or not keep_going():
                break

    def certify(self) -> bool:
        """Pass over all holder sets at the centre; return whether sets that matter had been left out."""
        if self.is_whole:
            return False
        theta, promised = self.bundle.center, self.bundle.value
        answer = self.oracle.answer(theta)
        value = self._value(theta, answer)
        self._keep(theta, value, answer)
        self.index = np.union1d(self.index, answer.chosen)
        self.bundle.learn(theta, value, self._choice(answer))
        self.bundle.restate(min(promised, self._value(theta, self.oracle.answer(theta, self.index))))
        self.bundle.radius = 0.05
        return promised - value > 1e-5 * abs(value)

    def _step(self, theta: Floats) -> float:
        answer = self.oracle.answer(theta, None if self.is_whole else self.index)
        value = self._value(theta, answer)
        if self.is_whole:
            self._keep(theta, value, answer)
        self.recent.append(answer)
        self.bundle.learn(theta, value, self._choice(answer))
        return value

    def _keep(self, theta: Floats, value: float, answer: Answer) -> None:
        if value > self.bound:
            self.bound, self.best_theta, self.best_answer = value, theta, answer

    def _value(self, theta: Floats, answer: Answer) -> float:
        return float(answer.lower.sum() - self.coupling.limit @ theta)

    def _choice(self, answer: Answer) -> Choice:
        held = self.oracle.sets.member[answer.chosen].astype(np.float64)
        return summarise(self.coupling, held, answer.place, self.group)


def _start(oracle: Oracle) -> Floats:
    coupling = oracle.coupling
    theta = np.zeros(coupling.size)
    theta[coupling.memory] = 0.3 * coupling.unit
    if oracle.arrays.makespan is not None:
        theta[coupling.heaviest] = coupling.ceiling[coupling.heaviest] / oracle.arrays.num_nodes
    return theta


def _groups(num_experts: int, layer: Ints | None) -> Ints:
    """One group per layer where prices differ by layer, else about `GROUPS` of equal size."""
    if layer is not None:
        return np.unique(layer, return_inverse=True)[1]
    return np.arange(num_experts) * min(GROUPS, num_experts) // num_experts
