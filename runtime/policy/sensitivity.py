"""How much it matters to a token, in a layer, what the experts there put out: told by the router's own scores.

Decides a factor and nothing else: what replacing an expert costs this token beside what it costs a token on average.
A token whose successor is as good as settled bears more than one after which much is open, and scores tell them apart,
as far as a small network does that was trained on the gradients of calibration text (`runtime.pricing`)::

    factor(l) = exp(relu([log p, p] · A[l] + c[l]) · v[l] + b[l])        p: all experts' scores, which add up to 1

It is trained as Poisson regression: gradients vary by their own size. At as many loads, perplexity of text that it was
not trained on rises by .46 % instead of .58 % (tinymoe-base, 8 of 32 experts; 124k tokens of calibration text, the
difference known to .03 points) and predictions diverge by an eighth less. Must not know files, nor torch, nor what
is at hand. Axes: T tokens, L layers, E experts, H hidden units.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from runtime.policy.eviction import Floats, Ints
from runtime.policy.training import Loss, Matrix, Net, train

HIDDEN: Final = 16
_ROUNDS: Final = 10
_LEAST: Final = 1e-5  # of p
_MOST: Final = 4.0  # of the factor's logarithm: what is beyond was hardly seen
_SPREAD: Final = 1e-3
_OUTLIER: Final = 30.0  # times the mean: one token is not to settle a layer's network


class Sensitivity(NamedTuple):
    """The networks of all layers, float64: in few digits.

    Attributes
    ----------
    given, hidden_bias
        A and c, ``[L, 2E, H]`` and ``[L, H]``.
    out, bias
        v and b, ``[L, H]`` and ``[L]``.
    """

    given: Floats
    hidden_bias: Floats
    out: Floats
    bias: Floats

    def factor(self, layer: int, ids: Ints, scores: Floats) -> float:
        """Return a token's factor; 1 where not all experts are among its candidates ``[C]``."""
        given, hidden_bias, out, bias = (array[layer] for array in self)
        if 2 * len(ids) != len(given):
            return 1.0
        share = np.empty(len(ids))
        share[ids] = scores
        answer = np.maximum(inputs(share[None])[0] @ given + hidden_bias, 0) @ out + bias
        return float(np.exp(min(max(answer, -_MOST), _MOST)))


def inputs(scores: Floats | Matrix) -> Matrix:
    """Return what the network sees of scores ``[T, E]``, in the experts' order: ``[T, 2E]``."""
    share = np.maximum(scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-12), _LEAST)
    log = np.log(share)
    return np.concatenate([log - log.mean(axis=1, keepdims=True), share], axis=1, dtype=np.float32)


def fit(scores: Sequence[Matrix], mattered: Sequence[Floats]) -> Sensitivity:
    """Fit the networks.

    Parameters
    ----------
    scores
        Of all experts by layer, ``[T, E]``, tokens in order.
    mattered
        How much what they put out did matter, ``[T]``, not negative, by layer.
    """
    rng = np.random.default_rng(0)
    layers = [_fit_layer(inputs(x), y, rng) for x, y in zip(scores, mattered, strict=True)]
    return Sensitivity(*(np.stack(arrays) for arrays in zip(*layers, strict=True)))


def _fit_layer(x: Matrix, mattered: Floats, rng: np.random.Generator) -> tuple[Floats, Floats, Floats, Floats]:
    """Return a layer's arrays, rounded as they will be written; zeros where scores tell nothing."""
    mean, spread = x.mean(axis=0), x.std(axis=0) + np.float32(_SPREAD)
    goal = np.minimum(mattered / max(float(mattered.mean()), 1e-30), _OUTLIER).astype(np.float32)[:, None]
    goal /= max(float(goal.mean()), 1e-30)
    net = None if not goal.any() else train(
        lambda rows: (x[rows] - mean) / spread,
        Loss(
            lambda y, rows: float((np.exp(_bounded(y)) - goal[rows] * _bounded(y)).mean()),
            lambda y, rows: np.exp(_bounded(y)) - goal[rows],
        ),
        rows=len(x), outputs=1, hidden=HIDDEN, rounds=_ROUNDS, rng=rng,
    )  # fmt: skip
    if net is None:
        net = Net(
            np.zeros((x.shape[1], HIDDEN), np.float32), *(np.zeros(n, np.float32) for n in (HIDDEN, (HIDDEN, 1), 1))
        )
    given = net.given / spread[:, None]
    return _short(given), _short(net.hidden_bias - mean @ given), _short(net.out[:, 0]), _short(net.bias[0])


def _bounded(answer: Matrix) -> Matrix:
    return np.clip(answer, -_MOST, _MOST)


def _short(array: Matrix) -> Floats:
    """Return numbers that take few digits to write."""
    return np.array(np.vectorize(lambda value: float(f"{value:.4g}"), otypes=[np.float64])(array))
