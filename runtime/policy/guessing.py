"""Which experts a layer will probably ask for, from what layers and tokens before it chose: guesses without a model.

Decides how probable each expert is and nothing else: whether a guess is worth a load is `prefetch`'s. Where the model
is at hand the next layer's gate on the current hidden state knows more (`runtime.ahead`); these policies need recorded
routing only. Must not know hidden states, nor what is resident. Flow: each layer's choice → `observe` → `scores` of the
next layer.

Axes: T tokens, L layers, E experts, K top-k.
"""

from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.policy.eviction import Floats, Ints

Counts = NDArray[np.float32]

_DECAY: Final = 0.999  # per use of an expert: what it was followed by a thousand uses ago hardly counts
_PRIOR: Final = 1.0  # uses that popularity counts for
_BEFORE_WEIGHT: Final = 0.5  # of the token before: it says what the layers before say, and is not independent of them
_FADE: Final = 0.95  # per token


class Predictor(Protocol):
    """Guesses the experts of a layer."""

    def observe(self, layer: int, experts: Ints) -> None:
        """Learn what the router of a layer chose for the tokens of a step, ``[T, K]``. Modifies."""
        ...

    def scores(self, layer: int) -> Floats:
        """Return how probable each expert of `layer` is for the tokens that ran the layer before it, ``[T, E]``.

        Does not modify. Numbers of one row can be compared, no others.
        """
        ...


class Last:
    """What each layer chose last: the running token's choice of layers that have run for it, else the one's before."""

    def __init__(self, layers: int) -> None:
        self._chosen: list[Ints | None] = [None] * layers

    def note(self, layer: int, experts: Ints) -> None:
        """Note a choice, ``[T, K]``. Modifies."""
        self._chosen[layer] = experts

    def tokens(self, layer: int) -> int:
        """Return T of the step that ran the layer below `layer`; 1 where none did."""
        below = self._chosen[layer - 1] if layer else None
        return 1 if below is None else len(below)

    def of(self, layer: int, tokens: int) -> Ints | None:
        """Return what a layer chose last, a row for each of so many tokens; None where it never ran.

        Rows are the same tokens' where as many ran; else the newest stands for all.
        """
        chosen = self._chosen[layer] if layer >= 0 else None
        if chosen is None or len(chosen) == tokens:
            return chosen
        return np.broadcast_to(chosen[-1], (tokens, chosen.shape[1]))


class Previous:
    """What the token before used; of the rest, what was used most lately. The guess to beat."""

    def __init__(self, layers: int, experts: int) -> None:
        self._rates = np.zeros((layers, experts))
        self._last = Last(layers)

    def observe(self, layer: int, experts: Ints) -> None:
        """Let older choices fade and note these."""
        self._last.note(layer, experts)
        fade_in(self._rates[layer], experts)

    def scores(self, layer: int) -> Floats:
        """Return how lately each expert was used, the token before first of all."""
        tokens = self._last.tokens(layer)
        scores = np.repeat(self._rates[layer][None], tokens, axis=0)
        before = self._last.of(layer, tokens)
        if before is not None:
            np.put_along_axis(scores, before, 1 + np.take_along_axis(scores, before, axis=1), axis=1)
        return scores


class Tables(NamedTuple):
    """Counts of what followed what, float32; old ones fade.

    Attributes
    ----------
    near, far, again
        ``[L, E, E]``: how often j of layer l followed i of layer l−1, of layer l−2, and i of layer l one token ago.
    used
        ``[L, E]``: how often each expert was chosen.
    """

    near: Counts
    far: Counts
    again: Counts
    used: Counts


class Coactivation:
    """How often experts were chosen after one another: in the two layers before, and by the token before.

    Each expert that was chosen multiplies the odds of those that follow it by how much oftener than by popularity they
    did, as if experts followed independently of each other (naive Bayes)::

        score(j) = log p(j) + Σ log P(j | i)/p(j) + Σ log P(j | i')/p(j) + ½ Σ log P(j | i'')/p(j)

    over the experts i of the layer before, i' of the one before that, i'' of the token before in the same layer. Counts
    go on while text is made.
    """

    def __init__(self, layers: int, experts: int, tables: Tables | None = None) -> None:
        near, far, again = (np.zeros((layers, experts, experts), dtype=np.float32) for _ in range(3))
        self.tables = tables or Tables(near, far, again, np.zeros((layers, experts), dtype=np.float32))
        self._last = Last(layers)

    def fit(self, chosen: Ints, is_start: NDArray[np.bool_]) -> None:
        """Count a recording besides what was counted. Modifies.

        Parameters
        ----------
        chosen
            ``[T, L, K]``, tokens in order.
        is_start
            ``[T]``: tokens that follow no other.
        """
        near, far, again, used = self.tables
        layers, experts = used.shape
        hot = one_hot(chosen, experts)
        follows = np.flatnonzero(~is_start[1:])
        for layer in range(layers):
            used[layer] += hot[:, layer].sum(axis=0)
            if layer > 0:
                near[layer] += hot[:, layer - 1].T @ hot[:, layer]
            if layer > 1:
                far[layer] += hot[:, layer - 2].T @ hot[:, layer]
            again[layer] += hot[follows, layer].T @ hot[follows + 1, layer]
        most = chosen.shape[2] / (1 - _DECAY)  # what a row adds up to when as much fades as comes
        for table in (near, far, again):
            np.multiply(table, most / np.maximum(table.sum(axis=-1, keepdims=True), most), out=table)
        most = experts / (1 - _DECAY)
        np.multiply(used, most / np.maximum(used.sum(axis=-1, keepdims=True), most), out=used)

    def observe(self, layer: int, experts: Ints) -> None:
        """Count what followed what."""
        tokens, (near, far, again, used) = len(experts), self.tables
        used[layer] *= _DECAY ** (experts.size / used.shape[1])  # as fast as the rows: odds are of what both have seen
        np.add.at(used[layer], experts, 1.0)
        for table, given in ((near, layer - 1), (far, layer - 2), (again, layer)):
            before = self._last.of(given, tokens)
            if before is None:
                continue
            for followed, follower in zip(before, experts, strict=True):
                table[layer, followed] *= _DECAY
                table[layer, followed[:, None], follower] += 1.0
        self._last.note(layer, experts)

    def scores(self, layer: int) -> Floats:
        """Return the logarithm of each expert's odds, but for a constant."""
        near, far, again, counts = self.tables
        tokens, used = self._last.tokens(layer), counts[layer].astype(np.float64)
        popular = (used + 1 / len(used)) / (used.sum() + 1)  # adds up to 1
        scores = np.repeat(np.log(popular)[None], tokens, axis=0)
        for table, given, weight in ((near, layer - 1, 1.0), (far, layer - 2, 1.0), (again, layer, _BEFORE_WEIGHT)):
            before = self._last.of(given, tokens)
            if before is not None:
                rows = table[layer, before]  # [T, K, E]
                top_k = before.shape[1]
                chance = (rows + _PRIOR * top_k * popular) / (rows.sum(axis=2, keepdims=True) + _PRIOR * top_k)
                scores += weight * np.log(chance / popular).sum(axis=1)
        return scores


def best(scores: Floats, count: int) -> Ints:
    """Return the experts guessed for some tokens, best first: the `count` best of each, int64 ``[≤ T * count]``.

    >>> best(np.array([[0.1, 0.7, 0.2, 0.0], [0.9, 0.0, 0.2, 0.3]]), 2)
    array([1, 0, 2, 3])
    """
    count = min(count, scores.shape[1])
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    found = list(dict.fromkeys(ranked.T.ravel().tolist()))
    return np.array(found, dtype=np.int64)


def one_hot(chosen: Ints, experts: int) -> Counts:
    """Return which experts were chosen, float32 ``[..., E]`` of indices ``[..., K]``."""
    hot = np.zeros((*chosen.shape[:-1], experts), dtype=np.float32)
    np.put_along_axis(hot, chosen, 1.0, axis=-1)
    return hot


def fade_in(rates: Floats | Counts, experts: Ints) -> None:
    """Let the share of tokens that chose each expert, ``[E]``, move on by some, ``[T, K]``. Modifies `rates`."""
    for chosen in experts:
        rates *= _FADE
        rates[chosen] += 1 - _FADE
