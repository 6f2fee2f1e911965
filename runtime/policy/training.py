"""How a network with one hidden layer is trained on what was recorded, with numpy alone.

Decides the steps and when to stop: where a tenth that was kept apart is fitted best, maybe before the first step. Must
not know what the network is for, nor files. The network is ``y = relu(x · given + hidden_bias) · out + bias``.

Axes: T rows, D inputs, H hidden units, O outputs.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]

_MOMENTA: Final = (0.9, 0.999)
_EPSILON: Final = 1e-8
_APART: Final = 10  # one block of rows in so many is for judging
_BLOCK: Final = 256  # rows that follow each other are alike
_ROWS: Final = 512  # of a batch
_STEPS: Final = 1500  # at least: few rows are gone through oftener


class Net(NamedTuple):
    """A network, float32 ``[D, H]``, ``[H]``, ``[H, O]`` and ``[O]``."""

    given: Matrix
    hidden_bias: Matrix
    out: Matrix
    bias: Matrix

    def answer(self, x: Matrix) -> Matrix:
        """Return y ``[T, O]`` of x ``[T, D]``."""
        return np.asarray(np.maximum(x @ self.given + self.hidden_bias, 0) @ self.out + self.bias)


class Loss(NamedTuple):
    """What a network is trained by.

    Attributes
    ----------
    value
        Mean loss of answers to rows: of y ``[B, O]`` and rows ``[B]``.
    slope
        Its derivative by y, times the rows ``[B, O]``.
    """

    value: Callable[[Matrix, Rows], float]
    slope: Callable[[Matrix, Rows], Matrix]


class Adam:
    """Adam with decoupled weight decay on matrices (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, net: list[Matrix], *, decay: float) -> None:
        self._net, self._decay, self._steps = net, decay, 0
        self._mean = [np.zeros_like(each) for each in net]
        self._square = [np.zeros_like(each) for each in net]

    def step(self, gradients: list[Matrix], rate: float) -> None:
        """Move the net, in place."""
        self._steps += 1
        fast, slow = _MOMENTA
        for index, gradient in enumerate(gradients):
            mean, square, array = self._mean[index], self._square[index], self._net[index]
            mean += (1 - fast) * (gradient - mean)
            square += (1 - slow) * (gradient**2 - square)
            size = np.sqrt(square / (1 - slow**self._steps)) + _EPSILON
            array -= rate * (mean / (1 - fast**self._steps) / size + self._decay * array * (array.ndim > 1))


def train(
    inputs: Callable[[Rows], Matrix],
    loss: Loss,
    *,
    rows: int,
    outputs: int,
    hidden: int,
    rounds: int,
    rng: np.random.Generator,
    rate: float = 3e-3,
    decay: float = 0.02,
) -> Net | None:
    """Train a network; None where rows that were kept apart are fitted best by none at all.

    Parameters
    ----------
    inputs
        Returns what the network sees of some rows, ``[B, D]``, spread about one.
    rows
        How many there are; neighbours are taken to be alike.
    rounds
        Through all of them; more where they are few. The rate falls to nothing over them.
    """
    is_apart = np.arange(rows) // _BLOCK % _APART == _APART - 1
    apart, rest = np.flatnonzero(is_apart), np.flatnonzero(~is_apart)
    if not len(apart):
        return None
    given = (rng.standard_normal((inputs(rest[:1]).shape[1], hidden))).astype(np.float32)
    given /= np.sqrt(np.float32(len(given)))
    net = Net(
        given, np.zeros(hidden, np.float32), np.zeros((hidden, outputs), np.float32), np.zeros(outputs, np.float32)
    )
    adam, best, least = (
        Adam(list(net), decay=decay),
        None,
        loss.value(np.zeros((len(apart), outputs), np.float32), apart),
    )
    seen, steps, done = inputs(apart), -(-len(rest) // _ROWS), 0
    rounds = max(rounds, -(-_STEPS // steps))
    for _ in range(rounds):
        order = rng.permutation(rest)
        for start in range(0, len(order), _ROWS):
            batch = order[start : start + _ROWS]
            adam.step(_gradients(net, inputs(batch), batch, loss), rate * _pace(done / (rounds * steps)))
            done += 1
        if (value := loss.value(net.answer(seen), apart)) < least:
            best, least = Net(*(array.copy() for array in net)), value
    return best


def _gradients(net: Net, x: Matrix, batch: Rows, loss: Loss) -> list[Matrix]:
    raw = x @ net.given + net.hidden_bias
    hidden = np.maximum(raw, 0)
    wrong = loss.slope(hidden @ net.out + net.bias, batch) / np.float32(len(batch))
    back = (wrong @ net.out.T) * (raw > 0)
    return [x.T @ back, back.sum(axis=0), hidden.T @ wrong, wrong.sum(axis=0)]


def _pace(done: float) -> float:
    """Return what part of the rate a step is made with: up in a fifth of the way, then down to nothing."""
    return done / 0.2 if done < 0.2 else 0.5 * (1 + float(np.cos(np.pi * (done - 0.2) / 0.8)))
