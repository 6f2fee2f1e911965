"""One column per layer that together fit into memory, at the least wait.

Decides a multiple-choice knapsack with one row per place. Must not know what a column means.

Annealed pair moves: two layers choose both their columns anew, the best of all pairs after the waits were perturbed by
exponential noise of the current temperature; what exceeds memory is charged at a price well above its worth. With the
noise gone this is exact for each pair, so it ends where no two layers can improve.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from planner.solvers.latency.columns import Front
from planner.solvers.latency.instance import Floats, Ints

_SAMPLE = 120  # columns of a layer that one pair move looks at


def select(
    fronts: list[Front],
    capacity: Ints,
    start: list[int],
    *,
    penalty: Floats,
    temperature: tuple[float, float],
    steps: int,
    rng: np.random.Generator,
    should_stop: Callable[[], bool],
) -> list[int]:
    """Choose one column of each front.

    Parameters
    ----------
    start
        A choice that fits; the result is never worse.
    penalty
        Seconds per second charged for each slot beyond memory, float64 ``[P]``.
    temperature
        Size of the noise at the first and at the last step, seconds per second.
    """
    state = _State(fronts, capacity, start, penalty)
    best, best_wait = list(start), state.wait()
    hot, cold = temperature
    for step in range(steps):
        if step % 64 == 0 and should_stop():
            break
        noise = hot * (cold / hot) ** (step / steps)
        state.move(rng, noise)
        if state.fits() and (wait := state.wait()) < best_wait:
            best, best_wait = list(state.choice), wait
    return best


class _State:
    """A choice and the slots it uses. `move` modifies it."""

    def __init__(self, fronts: list[Front], capacity: Ints, start: list[int], penalty: Floats) -> None:
        self.waits = [front.wait for front in fronts]
        self.used = [front.used.astype(np.float64) for front in fronts]
        self.capacity, self.penalty = capacity.astype(np.float64), penalty
        self.choice = list(start)
        self.total = np.sum([used[c] for used, c in zip(self.used, start, strict=True)], axis=0)

    def wait(self) -> float:
        return float(sum(wait[c] for wait, c in zip(self.waits, self.choice, strict=True)))

    def fits(self) -> bool:
        return bool((self.total <= self.capacity).all())

    def move(self, rng: np.random.Generator, noise: float) -> None:
        """Let two layers (one, where there is but one) choose anew."""
        first, second = rng.choice(len(self.waits), 2, replace=len(self.waits) < 2)
        rows, columns = self._sample(rng, first), self._sample(rng, second)
        if first == second:
            columns = np.array([self.choice[second]])
        others = self.total - self.used[first][self.choice[first]] - self.used[second][self.choice[second]]
        own = np.zeros_like(self.used[second][columns]) if first == second else self.used[second][columns]
        if first == second:
            others = others + self.used[second][self.choice[second]]
        value = (self.waits[first][rows] + noise * rng.exponential(size=len(rows)))[:, None]
        value = value + (self.waits[second][columns] + noise * rng.exponential(size=len(columns)))[None, :]
        excess = self.used[first][rows] + others - self.capacity
        for place, price in enumerate(self.penalty):
            value += price * np.maximum(0.0, excess[:, place, None] + own[None, :, place])
        row, column = divmod(int(value.argmin()), value.shape[1])
        self.choice[first] = int(rows[row])
        if first != second:
            self.choice[second] = int(columns[column])
        self.total = others + self.used[first][rows[row]] + own[column]

    def _sample(self, rng: np.random.Generator, layer: int) -> Ints:
        size = len(self.waits[layer])
        if size <= _SAMPLE:
            return np.arange(size)
        drawn = rng.choice(size, _SAMPLE, replace=False)
        drawn[0] = self.choice[layer]
        return np.asarray(drawn, dtype=np.int64)


def column_prices(fronts: list[Front], capacity: Ints) -> Floats | None:
    """Prices of slots at which the columns at hand are best mixed (dual of the Dantzig-Wolfe master), ``[P]``.

    None where the linear programme could not be solved.
    """
    sizes = [len(front.wait) for front in fronts]
    group = np.repeat(np.arange(len(fronts)), sizes)
    one_each = csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    used = np.concatenate([front.used for front in fronts]).T
    wait = np.concatenate([front.wait for front in fronts])
    scale = max(float(np.abs(wait).max()), 1e-300)
    solved = linprog(wait / scale, A_ub=csr_array(used), b_ub=capacity, A_eq=one_each, b_eq=np.ones(len(fronts)))
    if solved.status != 0:
        return None
    return np.asarray(np.maximum(0.0, -solved.ineqlin.marginals) * scale)
