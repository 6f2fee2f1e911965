"""How often each expert will be used soon, learnt from recorded routing: an eviction policy, and how it is fitted.

Decides what keeping an expert is worth where a recording of the model says what its routers do next. Two windows of an
expert's own uses (`eviction.Rates`) know neither which experts follow it nor that the layers below have already chosen;
here a layer's estimate is linear in both::

    uses(l) = Σ r[l, d] ∘ x(l, d) + (Σ x(l, d) · G[l, d] + Σ x(l−1−w, d') · G[l, D + w·D' + d']) · V[l] + b[l]

with ``x(l, d)`` the faded share of tokens that chose each expert of layer l, by decay (of this token alone: how much of
its router mass each has), d' the quickest decays and w < W layers below. It estimates the uses of the tokens to come,
fading by a fifth with each, by ridge regression; what experts do to each other is kept at a low rank (Izenman, Journal
of Multivariate Analysis 5, 1975).

With 8 of 32 experts per layer (tinymoe-base, exact routing, text that was not learnt from) a twentieth less is loaded
than by `Rates`. Scores of experts that were not chosen would say little more. Must not know files, nor torch, nor what
is resident. Axes: T tokens, L layers, E experts, K top-k, D decays, H rank.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from runtime.policy.eviction import PATIENCE, Floats, Ints, ahead_of
from runtime.policy.guessing import Counts, one_hot

DECAYS: Final = (0.0, 0.5, 0.85, 0.984)  # per token: this one, a few, ten, what the text is about
OF_BELOW: Final = 2  # of them, for layers below
BELOW: Final = 3
RANK: Final = 32
SOURCES: Final = len(DECAYS) + BELOW * OF_BELOW
_SOON: Final = 0.8  # per token to come
_RIDGE: Final = 3.0
_CHUNK: Final = 4096  # tokens
_REMEMBERED: Final = 512  # tokens: what lies before fades away
_RARE: Final = 0.01  # estimates may be below zero, a chance is not: from here down it only keeps their order

_FADES: Final = np.array(DECAYS, dtype=np.float32)[:, None]


class Uses(NamedTuple):
    """What an estimate is made of, float32.

    Attributes
    ----------
    rates
        r, ``[L, D, E]``.
    given, out
        G and V, ``[L, S, E, H]`` and ``[L, H, E]``, S sources: a layer's own decays, then each layer's below.
    bias
        b, ``[L, E]``.
    """

    rates: Counts
    given: Counts
    out: Counts
    bias: Counts


class Estimates:
    """Estimates of one run of text, layer by layer. Not thread-safe."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        layers, experts = uses.bias.shape
        self._last: list[Counts] = [np.zeros((1, len(DECAYS), experts), dtype=np.float32)] * layers

    def advance(self, layer: int, chosen: Ints, scores: Floats) -> Counts:
        """Return what is expected after each of some tokens, ``[T, E]``, which chose ``[T, K]``. Modifies."""
        mine = _faded(chosen, scores, self._last[layer][-1])
        self._last[layer] = mine
        return self._expected(layer, mine)

    def _expected(self, layer: int, mine: Counts) -> Counts:
        rates, given, out, bias = (array[layer] for array in self._uses)
        own, *of_below = np.split(given, range(len(DECAYS), SOURCES, OF_BELOW))
        hidden = _flat(mine) @ own.reshape(-1, own.shape[-1])
        for place in range(min(BELOW, layer)):
            below, effect = self._last[layer - 1 - place], of_below[place]
            of_tokens = below if len(below) == len(mine) else below[-1:]  # other tokens: the newest stands for all
            hidden = hidden + _flat(of_tokens[:, :OF_BELOW]) @ effect.reshape(-1, effect.shape[-1])
        return np.asarray((mine * rates).sum(axis=1) + hidden @ out + bias)


class LearnedUses:
    """Fewest expected uses, per time until the first can be, first. An `Eviction`."""

    def __init__(self, uses: Uses) -> None:
        self._layers, self._experts = uses.bias.shape
        self._estimates = Estimates(uses)
        self._expected: Floats = uses.bias.astype(np.float64)

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Move a layer's estimate on by these tokens."""
        of = slice(-_REMEMBERED, None), slice(top_k)
        self._expected[layer] = self._estimates.advance(layer, ids[of], scores[of])[-1]

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return the expected uses per cycle of keeping it, as `eviction.Rates` counts them."""
        cycles = ahead_of(keys, layer, self._layers, self._experts) / self._layers + PATIENCE
        expected = self._expected.reshape(-1)[keys]
        chance = np.where(expected > _RARE, expected, _RARE * np.exp(np.minimum(expected / _RARE - 1, 0)))
        return np.asarray(chance / cycles)


def fit(
    chosen: Ints, scores: Floats, experts: int, *, rank: int = RANK, progress: Callable[[int, int], None] | None = None
) -> Uses:
    """Fit the estimates of each layer to a recording.

    Parameters
    ----------
    chosen, scores
        ``[T, L, K]``, tokens in order; caches outlast texts, and so do rates.
    progress
        Called with (layers done, layers in all).
    """
    layers = chosen.shape[1]
    start = np.zeros((len(DECAYS), experts), dtype=np.float32)
    seen: list[Counts] = []  # of the layers below and this one
    fitted = []
    for layer in range(layers):
        seen = [*seen[-BELOW:], _faded(chosen[:, layer], scores[:, layer], start)]
        fitted.append(_fit_layer(seen, one_hot(chosen[:, layer], experts), min(rank, experts)))
        if progress:
            progress(layer + 1, layers)
    return Uses(*(np.stack(arrays) for arrays in zip(*fitted, strict=True)))


def _fit_layer(seen: list[Counts], hot: Counts, rank: int) -> tuple[Counts, Counts, Counts, Counts]:
    """Return one layer's arrays: full ridge regression, then all but each expert's own effect at the rank."""
    experts, decays, each = hot.shape[1], len(DECAYS), np.arange(hot.shape[1])
    gram, moment = _moments(seen, _to_come(hot))
    weights = np.linalg.solve(gram, moment)
    cross, bias = weights[:-1].reshape(-1, experts, experts).copy(), weights[-1]
    own = cross[:decays, each, each] - (cross[:decays].sum(axis=1) - cross[:decays, each, each]) / max(1, experts - 1)
    cross[:decays, each, each] -= own
    flat = cross.reshape(-1, experts)
    root = np.linalg.cholesky(gram[:-1, :-1]).T
    out = np.linalg.svd(root @ flat, full_matrices=False)[2][:rank]  # [H, E], orthonormal rows
    given = np.zeros((SOURCES, experts, rank), dtype=np.float32)
    given[: len(cross)] = (flat @ out.T).reshape(-1, experts, rank)
    return own.astype(np.float32), given, out.astype(np.float32), bias.astype(np.float32)


def _moments(seen: list[Counts], goal: Counts) -> tuple[Floats, Floats]:
    """Return ``XᵀX`` and ``XᵀY`` of the regression, the first with its ridge; a one is the last column of X."""
    *below, mine = seen
    size = (len(DECAYS) + len(below) * OF_BELOW) * goal.shape[1] + 1
    gram, moment = np.eye(size) * _RIDGE, np.zeros((size, goal.shape[1]))
    for first in range(0, len(goal), _CHUNK):
        part = slice(first, first + _CHUNK)
        ones = np.ones((len(goal[part]), 1), dtype=np.float32)
        x = np.concatenate([_flat(mine[part]), *(_flat(b[part, :OF_BELOW]) for b in reversed(below)), ones], axis=1)
        gram += x.T @ x
        moment += x.T @ goal[part]
    return gram, moment


def _faded(chosen: Ints, scores: Floats, before: Counts) -> Counts:
    """Return the faded share of tokens that chose each expert, after each token, ``[T, D, E]``, from ``[D, E]``."""
    mass = scores * (scores.shape[1] / np.maximum(scores.sum(axis=1, keepdims=True), 1e-12))  # 1 on average
    faded = np.empty((len(chosen), *before.shape), dtype=np.float32)
    gain = 1 - _FADES
    for token, picked in enumerate(chosen):
        np.multiply(before, _FADES, out=faded[token])
        faded[token][:, picked] += gain
        faded[token][0, picked] = mass[token]
        before = faded[token]
    return faded


def _to_come(hot: Counts) -> Counts:
    """Return the faded uses of the tokens after each, ``[T, E]``."""
    goal = np.zeros_like(hot)
    for token in range(len(hot) - 2, -1, -1):
        goal[token] = _SOON * goal[token + 1] + (1 - _SOON) * hot[token + 1]
    return goal


def _flat(shares: Counts) -> Counts:
    return shares.reshape(len(shares), -1)
