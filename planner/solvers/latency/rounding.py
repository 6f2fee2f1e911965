"""A placement from the relaxation's mixture, before any search.

Decides who gets a slot when fractions are made whole. Must not know events. It may fail where pins are tight; whoever
asks checks the result.
"""

import numpy as np

from planner.solvers.latency.instance import Bools, Floats, LatencyInstance


def rounded(instance: LatencyInstance, mixture: Floats) -> Bools:
    """Fill places in the order of the mixture ``[L, E, P]``: first coverage, then what is left; bool ``[P, L, E]``."""
    places = instance.num_places
    share = mixture.reshape(-1, places)
    allowed = instance.allowed.reshape(places, -1).T
    held = instance.forced.reshape(places, -1).T.copy()
    free = instance.capacity - held.sum(axis=0)
    siblings = instance.on_node @ instance.on_node.T
    wanted = np.argsort(-share, axis=1, kind="stable")
    for _ in range(instance.required):
        for expert in np.argsort(-share.max(axis=1), kind="stable"):
            if held[expert].sum() < instance.required:
                blocked = siblings @ held[expert]
                open_ = [p for p in wanted[expert] if free[p] > 0 and allowed[expert, p] and not blocked[p]]
                held[expert, open_[:1]] = True
                free[open_[:1]] -= 1
    for place in range(places):
        fits = allowed[:, place] & ~(held @ siblings[:, place])
        best = np.argsort(np.where(fits, -share[:, place], np.inf), kind="stable")[: min(free[place], fits.sum())]
        held[best, place] = True
    return np.ascontiguousarray(held.T).reshape(instance.allowed.shape)
