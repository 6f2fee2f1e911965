"""The variables of the MILP, made only where they can be other than 0."""

from dataclasses import dataclass

import numpy as np
import pulp

from planner.problem import Bools
from planner.solvers.terms import Terms


@dataclass(frozen=True, eq=False)
class Variables:
    """Columns of the model.

    Attributes
    ----------
    x
        By expert k: place → binary "place p holds a replica of k".
    a
        By (caller n, expert k) with demand: place → share of n's calls for k that place p serves, in [0, 1].
    """

    x: list[dict[int, pulp.LpVariable]]
    a: dict[tuple[int, int], dict[int, pulp.LpVariable]]

    def placement(self, shape: tuple[int, ...]) -> Bools:
        """Read the solved placement, bool ``[P, L, E]``."""
        placed = np.zeros((shape[0], len(self.x)), dtype=bool)
        for expert, places in enumerate(self.x):
            for place, variable in places.items():
                placed[place, expert] = (variable.varValue or 0.0) > 0.5
        return placed.reshape(shape)


def make_variables(terms: Terms) -> Variables:
    """Make x for every allowed (place, expert) and a for every pair with demand."""
    x = [
        {int(p): pulp.LpVariable(f"x_{p}_{k}", cat=pulp.LpBinary) for p in np.flatnonzero(terms.allowed[:, k])}
        for k in range(terms.num_experts)
    ]
    a = {(int(n), int(k)): {p: pulp.LpVariable(f"a_{n}_{k}_{p}", 0, 1) for p in x[k]} for n, k in terms.pairs()}
    return Variables(x, a)
