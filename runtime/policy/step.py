"""Which experts the tokens of one step get in a layer, where they share what is waited for.

Decides for all of them what a `Routing` decides for one. Two ways of sharing: what one token fetches, the others may
use as it comes (`choose_each`); and a layer that waits for one expert of another node waits as long as for three, so
that giving up router mass is worth it only if nobody waits any more (`choose_whole`). Must not know torch.

Axes: T tokens, E experts, C candidates.
"""

import numpy as np

from runtime.policy.eviction import Bools, Floats, Ints
from runtime.policy.routing import Choice, Exact, LowMissing, Routing

Ranked = tuple[Ints, Floats]


def choose_each(rule: Routing, layer: int, ranked: Ranked, resident: Bools, top_k: int) -> list[Choice]:
    """Return what each token gets; what some of them fetch, other than in low precision, is at hand for all.

    Parameters
    ----------
    ranked
        Candidates of each token, best first, and their router scores, ``[T, C]`` each.
    resident
        Whether each expert of the layer is at hand, bool ``[E]``.
    """
    choices = _choose(rule, layer, ranked, resident, top_k)
    if len(choices) > 1 and (fetched := _fetched(choices, resident)).any():
        choices = _choose(rule, layer, ranked, resident | fetched, top_k)
    return choices


def choose_whole(rule: Routing, layer: int, ranked: Ranked, resident: Bools, top_k: int) -> list[Choice]:
    """Return choices that need nothing but what is at hand, or else exact ones, in low precision where that will do."""
    choices = _choose(rule, layer, ranked, resident, top_k)
    if _missing(choices, resident).any():
        exact = LowMissing(Exact(), rule.share) if isinstance(rule, LowMissing) else Exact()
        choices = _choose(exact, layer, ranked, resident, top_k)
    return choices


def _choose(rule: Routing, layer: int, ranked: Ranked, resident: Bools, top_k: int) -> list[Choice]:
    return [rule.choose(layer, *token, resident, top_k) for token in zip(*ranked, strict=True)]


def low_experts(choices: list[Choice]) -> list[int]:
    """Return the experts that will do in low precision for every token that gets them, ascending."""
    low = {int(expert) for choice in choices for expert in choice.experts[choice.low]}
    exact = {int(expert) for choice in choices for expert in choice.experts[~choice.low]}
    return sorted(low - exact)


def _fetched(choices: list[Choice], resident: Bools) -> Bools:
    """Whether each expert is fetched as it is, bool ``[E]``."""
    fetched = np.zeros_like(resident)
    for choice in choices:
        fetched[choice.experts[~choice.low]] = True
    return np.asarray(fetched & ~resident)


def _missing(choices: list[Choice], resident: Bools) -> Bools:
    """Whether each expert is chosen and not at hand, bool ``[E]``."""
    missing = np.zeros_like(resident)
    for choice in choices:
        missing[choice.experts] = True
    return np.asarray(missing & ~resident)
