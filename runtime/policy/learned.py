"""A small network that guesses the experts of a layer from those chosen before it, and how it is trained.

Decides the network and its training. MoE-Beyond (arXiv 2508.17137) sees every token's embedding and layer number
through four transformer layers, and learns each expert's activation as a yes or no of its own. Traces hold no
embeddings and a guess must cost less than the load that it hides, so here the experts that layers before chose stand
for the token, and one hidden layer is all there is::

    h = relu(Σ U[l, d, i] over i chosen by layer l−1−d, d < W, + Σ U[l, W, i'] over i' chosen by l for the token before
             + rates(l) · R[l] + c[l])
    logits of layer l = h · V[l] + b[l]        trained by binary cross-entropy

Must not know files, nor torch: numpy is enough for both. Axes: T tokens, L layers, E experts, K top-k, W window,
H hidden units.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.policy.eviction import Floats, Ints
from runtime.policy.guessing import Counts, Last, fade_in, one_hot
from runtime.policy.training import Adam

WINDOW: Final = 4
HIDDEN: Final = 64
_SHORT: Final = 1000  # tokens: a trace that is shorter is gone through oftener, in smaller steps
_DECAY: Final = 1e-2


class Weights(NamedTuple):
    """A network for each layer, float32.

    Attributes
    ----------
    given
        U, ``[L, W + 1, E, H]``.
    rates
        R, ``[L, E, H]``.
    hidden_bias
        c, ``[L, H]``.
    out
        V, ``[L, H, E]``.
    bias
        b, ``[L, E]``.
    """

    given: Counts
    rates: Counts
    hidden_bias: Counts
    out: Counts
    bias: Counts


class Learned:
    """The network at work: it learns nothing more, but sees how often experts were chosen lately."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        layers, experts = weights.bias.shape
        self._window = weights.given.shape[1] - 1
        self._rates = np.zeros((layers, experts), dtype=np.float32)
        self._last = Last(layers)

    def observe(self, layer: int, experts: Ints) -> None:
        """Note what was chosen."""
        self._last.note(layer, experts)
        fade_in(self._rates[layer], experts)

    def scores(self, layer: int) -> Floats:
        """Return logits."""
        net, tokens = self.weights, self._last.tokens(layer)
        hidden = net.hidden_bias[layer] + self._rates[layer] @ net.rates[layer]
        hidden = np.repeat(hidden[None], tokens, axis=0)
        for place, given in enumerate([*range(layer - 1, layer - 1 - self._window, -1), layer]):
            before = self._last.of(given, tokens)
            if before is not None:
                hidden += net.given[layer, place, before].sum(axis=1)
        return np.asarray(np.maximum(hidden, 0) @ net.out[layer] + net.bias[layer], dtype=np.float64)


def train(
    chosen: Ints,
    is_start: NDArray[np.bool_],
    experts: int,
    *,
    window: int = WINDOW,
    hidden: int = HIDDEN,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Train a network for each layer on a recording.

    Parameters
    ----------
    chosen
        ``[T, L, K]``, tokens in order.
    is_start
        ``[T]``: tokens that follow no other.
    progress
        Called with (layers done, layers in all).
    """
    layers = chosen.shape[1]
    rng = np.random.default_rng(seed)
    trained = []
    for layer in range(layers):
        trained.append(_train_layer(chosen, is_start, experts, layer, window=window, hidden=hidden, rng=rng))
        if progress:
            progress(layer + 1, layers)
    return Weights(*(np.stack(arrays) for arrays in zip(*trained, strict=True)))


def _train_layer(
    chosen: Ints,
    is_start: NDArray[np.bool_],
    experts: int,
    layer: int,
    *,
    window: int,
    hidden: int,
    rng: np.random.Generator,
) -> tuple[Counts, Counts, Counts, Counts, Counts]:
    """Train the network of one layer: Adam with weight decay on shuffled batches."""
    tokens, inputs = len(chosen), (window + 2) * experts
    goal = one_hot(chosen[:, layer], experts)
    popular = (goal.sum(axis=0) + 0.5) / (tokens + 1)
    first = (rng.standard_normal((inputs, hidden)) / np.sqrt(inputs)).astype(np.float32)
    second = (rng.standard_normal((hidden, experts)) / hidden).astype(np.float32)
    net = [first, np.zeros(hidden, np.float32), second, np.log(popular / (1 - popular)).astype(np.float32)]
    rates = _rates(chosen[:, layer], experts)
    adam, rate = Adam(net, decay=_DECAY), 1e-2 if tokens < _SHORT else 3e-3
    for batch in _batches(tokens, rng):
        x = _inputs(chosen, is_start, rates, layer, batch, window=window)
        raw = x @ net[0] + net[1]
        h = np.maximum(raw, 0)
        wrong = (1 / (1 + np.exp(-(h @ net[2] + net[3]))) - goal[batch]) / goal[batch].size
        back = (wrong @ net[2].T) * (raw > 0)
        adam.step([x.T @ back, back.sum(axis=0), h.T @ wrong, wrong.sum(axis=0)], rate)
    given, of_rates = np.split(net[0].reshape(window + 2, experts, hidden), [window + 1])
    return given, of_rates[0], net[1], net[2], net[3]


def _batches(tokens: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Yield tokens in random order, over and over where there are few."""
    size, rounds = (32, 30) if tokens < _SHORT else (256, max(3, min(8, 100_000 // tokens)))
    for _ in range(rounds):
        order = rng.permutation(tokens)
        yield from (order[start : start + size] for start in range(0, tokens, size))


def _rates(chosen: Ints, experts: int) -> Counts:
    """Return what `Learned` knows of one layer's rates before each token, ``[T, E]``; they outlast a text."""
    rates, known = np.zeros(experts, np.float32), np.zeros((len(chosen), experts), np.float32)
    for token, picked in enumerate(chosen):
        known[token] = rates
        fade_in(rates, picked[None])
    return known


def _inputs(
    chosen: Ints, is_start: NDArray[np.bool_], rates: Counts, layer: int, batch: Ints, *, window: int
) -> Counts:
    """Return what the network sees of some tokens, ``[B, (W + 2) * E]``."""
    experts = rates.shape[1]
    x = np.zeros((len(batch), window + 2, experts), np.float32)
    for place in range(min(window, layer)):
        x[:, place] = one_hot(chosen[batch, layer - 1 - place], experts)
    before = one_hot(chosen[batch - 1, layer], experts)
    before[is_start[batch]] = 0
    x[:, window], x[:, window + 1] = before, rates[batch]
    return x.reshape(len(batch), -1)
