"""How often each expert will be used soon, learnt from recorded routing: an eviction policy, and how it is fitted.

Decides what keeping an expert is worth where a recording of the model says what its routers do next. Two windows of an
expert's own uses (`eviction.Rates`) know neither which experts follow it nor that the layers below have already chosen;
here a layer's estimate is linear in both, and bent by a small network::

    uses(l) = Σ r[l, d] ∘ x(l, d) + X(l) · G[l] · V[l] + b[l] + relu(X(l) · A[l] + c[l]) · B[l]

with ``x(l, d)`` the faded share of tokens that chose each expert of layer l, by decay (of this token alone: how much of
its router mass each has), and ``X(l)`` all of layer l's beside the quickest ones of W layers below. It estimates the
uses of the tokens to come, fading by a fifth with each: by ridge regression, in which what experts do to each other is
kept at a low rank (Izenman, Journal of Multivariate Analysis 5, 1975), and of what that leaves by the network, where
tokens that were kept apart say that it does.

With 8 of 32 experts per layer (tinymoe-base, exact routing, text that was not learnt from) a twentieth less is loaded
than by `Rates`, with the network a hundredth less again. Scores of experts that were not chosen would say little more.
Must not know files, nor torch, nor what is resident.

Axes: T tokens, L layers, E experts, K top-k, D decays, S sources, H rank, N hidden units.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from runtime.policy.eviction import PATIENCE, Floats, Ints, ahead_of
from runtime.policy.guessing import Counts, one_hot
from runtime.policy.training import Loss, Net, train

DECAYS: Final = (0.0, 0.5, 0.85, 0.984)  # per token: this one, a few, ten, what the text is about
OF_BELOW: Final = 2  # of them, for layers below
BELOW: Final = 3
RANK: Final = 32
HIDDEN: Final = 96
SOURCES: Final = len(DECAYS) + BELOW * OF_BELOW
_SOON: Final = 0.8  # per token to come
_RIDGE: Final = 3.0
_SPREAD: Final = 0.02  # what sources vary by at least; seldom used experts would weigh too much
_ROUNDS: Final = 8
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
    seen, hidden_bias, effect
        A, c and B, ``[L, S, E, N]``, ``[L, N]`` and ``[L, N, E]``. No hidden units: the estimate is linear.
    """

    rates: Counts
    given: Counts
    out: Counts
    bias: Counts
    seen: Counts
    hidden_bias: Counts
    effect: Counts

    def linear(self) -> "Uses":
        """Return the same without the network."""
        return self.of({name: getattr(self, name) for name in ("rates", "given", "out", "bias")})

    @classmethod
    def of(cls, arrays: Mapping[str, Counts]) -> "Uses":
        """Make one of named arrays; without those of the network, as older files are, it is linear."""
        layers, sources, experts, _ = arrays["given"].shape
        shapes = {"seen": (layers, sources, experts, 0), "hidden_bias": (layers, 0), "effect": (layers, 0, experts)}
        return cls(**{**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, **arrays})


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
        rates, given, out, bias, seen, hidden_bias, effect = (array[layer] for array in self._uses)
        x = np.zeros((len(mine), SOURCES, mine.shape[2]), dtype=np.float32)
        x[:, : len(DECAYS)] = mine
        for place in range(min(BELOW, layer)):
            below, first = self._last[layer - 1 - place], len(DECAYS) + place * OF_BELOW
            of_tokens = below if len(below) == len(mine) else below[-1:]  # other tokens: the newest stands for all
            x[:, first : first + OF_BELOW] = of_tokens[:, :OF_BELOW]
        flat = _flat(x)
        linear = (mine * rates).sum(axis=1) + flat @ given.reshape(flat.shape[1], -1) @ out + bias
        return np.asarray(linear + np.maximum(flat @ seen.reshape(flat.shape[1], -1) + hidden_bias, 0) @ effect)


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
    layers, rng = chosen.shape[1], np.random.default_rng(0)
    start = np.zeros((len(DECAYS), experts), dtype=np.float32)
    seen: list[Counts] = []  # of the layers below and this one
    fitted = []
    for layer in range(layers):
        seen = [*seen[-BELOW:], _faded(chosen[:, layer], scores[:, layer], start)]
        goal = _to_come(one_hot(chosen[:, layer], experts))
        *linear, bias = _fit_linear(seen, goal, min(rank, experts))
        more, *bend = _fit_bend(seen, goal, (*linear, bias), rng)
        fitted.append((*linear, bias + more, *bend))
        if progress:
            progress(layer + 1, layers)
    found = Uses(*(np.stack(arrays) for arrays in zip(*fitted, strict=True)))
    return found if found.effect.any() else found.linear()


def _fit_linear(seen: list[Counts], goal: Counts, rank: int) -> tuple[Counts, Counts, Counts, Counts]:
    """Return one layer's linear arrays: full ridge regression, then all but each expert's own effect at the rank."""
    experts, decays, each = goal.shape[1], len(DECAYS), np.arange(goal.shape[1])
    gram, moment = _moments(seen, goal)
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


def _fit_bend(
    seen: list[Counts], goal: Counts, linear: Sequence[Counts], rng: np.random.Generator
) -> tuple[Counts, Counts, Counts, Counts]:
    """Return what is added to a layer's bias, and its network, trained on what its linear estimate leaves.

    Zeros where that is best.
    """
    own, given, out, bias = linear
    used, experts = (len(DECAYS) + (len(seen) - 1) * OF_BELOW) * goal.shape[1], goal.shape[1]
    left = np.empty_like(goal)
    total, square = np.zeros(used), np.zeros(used)
    for part in _parts(len(goal)):
        x = _sources(seen, part)
        total, square = total + x.sum(axis=0, dtype=np.float64), square + (x**2).sum(axis=0, dtype=np.float64)
        cross = x @ given.reshape(-1, given.shape[-1])[:used] @ out
        left[part] = goal[part] - (seen[-1][part] * own).sum(axis=1) - cross - bias
    mean = (total / len(goal)).astype(np.float32)
    spread = np.sqrt(np.maximum(square / len(goal) - mean**2, 0)).astype(np.float32) + np.float32(_SPREAD)
    unit = np.float32(1 / max(float(left.std()), 1e-12))
    loss = Loss(lambda y, rows: float(((y - unit * left[rows]) ** 2).mean()), lambda y, rows: y - unit * left[rows])
    found = train(
        lambda rows: (_sources(seen, rows) - mean) / spread,
        loss, rows=len(goal), outputs=experts, hidden=HIDDEN, rounds=_ROUNDS, rng=rng,
    )  # fmt: skip
    net = found or Net(*(np.zeros(shape, np.float32) for shape in ((used, HIDDEN), HIDDEN, (HIDDEN, experts), experts)))
    into = np.zeros((SOURCES * experts, HIDDEN), dtype=np.float32)
    into[:used] = net.given / spread[:, None]
    seen_at = into.reshape(SOURCES, experts, HIDDEN)
    return net.bias / unit, seen_at, net.hidden_bias - mean @ into[:used], net.out / unit


def _moments(seen: list[Counts], goal: Counts) -> tuple[Floats, Floats]:
    """Return ``XᵀX`` and ``XᵀY`` of the regression, the first with its ridge; a one is the last column of X."""
    size = (len(DECAYS) + (len(seen) - 1) * OF_BELOW) * goal.shape[1] + 1
    gram, moment = np.eye(size) * _RIDGE, np.zeros((size, goal.shape[1]))
    for part in _parts(len(goal)):
        ones = np.ones((len(goal[part]), 1), dtype=np.float32)
        x = np.concatenate([_sources(seen, part), ones], axis=1)
        gram += x.T @ x
        moment += x.T @ goal[part]
    return gram, moment


def _parts(tokens: int) -> list[slice]:
    return [slice(first, first + _CHUNK) for first in range(0, tokens, _CHUNK)]


def _sources(seen: list[Counts], rows: slice | Ints) -> Counts:
    """Return what the estimate of some tokens is made of, as far as there are layers below, ``[B, S' * E]``."""
    *below, mine = seen
    return np.concatenate([_flat(mine[rows]), *(_flat(b[rows][:, :OF_BELOW]) for b in reversed(below))], axis=1)


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
