"""The variables of the CP-SAT model, made only where they can be other than 0."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from planner.problem import Bools
from planner.solvers.terms import Terms


@dataclass(frozen=True, eq=False)
class Variables:
    """Variables of the model.

    Attributes
    ----------
    x
        By expert k: place → Boolean "place p holds a replica of k".
    a
        By (caller n, expert k) with demand: place → parts of n's calls for k that place p serves, 0 … `parts`.
    parts
        1 where nothing competes for compute or links, so that one replica serves all.
    """

    x: list[dict[int, cp_model.IntVar]]
    a: dict[tuple[int, int], dict[int, cp_model.IntVar]]
    parts: int

    def placement(self, value: Callable[[cp_model.IntVar], int], shape: tuple[int, ...]) -> Bools:
        """Read a placement, bool ``[P, L, E]``, through a function that tells a variable's value."""
        placed = np.zeros((shape[0], len(self.x)), dtype=bool)
        for expert, places in enumerate(self.x):
            for place, variable in places.items():
                placed[place, expert] = bool(value(variable))
        return placed.reshape(shape)


def make_variables(model: cp_model.CpModel, terms: Terms, parts: int) -> Variables:
    """Make x for every allowed (place, expert) and a for every pair with demand. Modifies `model`."""
    x = [
        {int(p): model.new_bool_var(f"x_{p}_{k}") for p in np.flatnonzero(terms.allowed[:, k])}
        for k in range(terms.num_experts)
    ]
    a = {(int(n), int(k)): {p: model.new_int_var(0, parts, f"a_{n}_{k}_{p}") for p in x[k]} for n, k in terms.pairs()}
    return Variables(x, a, parts)
