"""Which resident expert to give up: policies that learn from routing and say what keeping an expert is worth.

Decides an order and nothing else: who may be evicted, how many and when is the cache's business (`cache`). Must not
know what an expert weighs or where it comes from. Flow: routing of each token and layer → `observe` → `worth`.

Axes: T tokens, L layers, E experts, K top-k, C candidates; keys are ``layer * E + expert``.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.policy.cost_aware import CostAware

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rows = NDArray[np.integer[Any]]

_SCORE_DECAY: Final = 0.9
FAST: Final = 0.5  # per token: a half-life of 1 token
_SLOW: Final = 0.97  # 23 tokens
_FAST_SHARE: Final = 0.25
STEADY_SLOW: Final = 0.984  # 43 tokens
STEADY_FAST_SHARE: Final = 0.08
PATIENCE: Final = 2.0  # token cycles


class Eviction(Protocol):
    """Ranks experts by what keeping them is worth."""

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Learn from the routing of some tokens in one layer. Modifies.

        Parameters
        ----------
        ids, scores
            Ranked candidates of each token and their router scores, ``[T, C]``; the first `top_k` were used.
        """
        ...

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return what keeping each expert is worth while `layer` runs, float64 ``[len(keys)]``. Does not modify."""
        ...


class _Cycle:
    """Tokens seen, by the layers that were run: a layer that is not above the last one begins a new token."""

    def __init__(self) -> None:
        self.token = 0
        self._layer = -1

    def advance(self, layer: int, tokens: int) -> None:
        if layer <= self._layer:
            self.token += tokens
        self._layer = layer


class Lru:
    """Least recently used first."""

    def __init__(self, layers: int, experts: int) -> None:
        self._experts = experts
        self._used = np.full(layers * experts, -1, dtype=np.int64)
        self._now = 0

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Note when each expert was used."""
        for chosen in ids[:, :top_k]:
            self._now += 1
            self._used[layer * self._experts + chosen] = self._now

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return when each was last used."""
        return self._used[keys].astype(np.float64)


class Lfu:
    """Least often used first; of those the least recently used."""

    def __init__(self, layers: int, experts: int) -> None:
        self._experts = experts
        self._count = np.zeros(layers * experts)
        self._recency = Lru(layers, experts)

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Count uses."""
        self._recency.observe(layer, ids, scores, top_k)
        np.add.at(self._count, layer * self._experts + ids[:, :top_k], 1.0)

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return uses so far."""
        return self._count[keys] + 1e-12 * self._recency.worth(keys, layer)


class ScoreAverage:
    """Lowest average router score over recent tokens first, experts that were not chosen included.

    SMoE's score-aware cache (importance-driven expert scheduling): a high score that did not make the top k is a sign
    of use to come.
    """

    def __init__(self, layers: int, experts: int, decay: float = _SCORE_DECAY) -> None:
        self._experts = experts
        self._decay = decay
        self._average = np.zeros(layers * experts)

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Let older scores fade and add these."""
        first = layer * self._experts
        for ranked, score in zip(ids, scores, strict=True):
            self._average[first : first + self._experts] *= self._decay
            self._average[first + ranked] += (1 - self._decay) * score

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return average scores."""
        return self._average[keys]


class LeastStale:
    """Experts that the running token has not used go first, of those the ones whose layer is visited furthest ahead.

    After SpecMD (arXiv 2602.03921): layers run in a cycle, so an expert of a layer that has just run is the last to be
    asked for again, which LRU turns upside down.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._token = np.full(layers * experts, -1, dtype=np.int64)
        self._cycle = _Cycle()

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Note in which token each expert was used."""
        self._cycle.advance(layer, len(ids))
        self._token[layer * self._experts + ids[:, :top_k]] = self._cycle.token

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Rank fresh before stale, then near before far."""
        since = self._cycle.token - self._token[keys]
        current = keys // self._experts <= layer  # its layer has run for the running token
        fresh = np.where(current, since == 0, since <= 1)
        return np.asarray(fresh * 1.0 - ahead_of(keys, layer, self._layers, self._experts) / self._layers / 2)


class CycLfu:
    """Fewest uses per token since the last one first; ties go to the layer that is visited furthest ahead.

    RUNTIME.md's reference policy: LFU that lets go of what was popular once.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._count = np.zeros(layers * experts)
        self._last = np.zeros(layers * experts, dtype=np.int64)
        self._cycle = _Cycle()

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Count uses and note the last."""
        self._cycle.advance(layer, len(ids))
        keys = layer * self._experts + ids[:, :top_k].ravel()
        np.add.at(self._count, keys, 1.0)
        self._last[keys] = self._cycle.token

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return uses per token of age."""
        age = self._cycle.token - self._last[keys] + 1
        return self._count[keys] / age - 1e-9 * ahead_of(keys, layer, self._layers, self._experts)


class Rates:
    """Lowest chance of use per time until it can be used first: ours.

    The chance that a token uses an expert is estimated by two exponential windows, one of a token or two (what was
    just used is used again) and one of some tens (what this text is about). An expert whose layer is `a` of L layers
    ahead must be kept for ``a / L`` cycles before its chance comes, and longer where it fails, so its worth is
    ``chance / (a / L + 2)``.

    Parameters
    ----------
    slow
        Decay per token of the longer window.
    fast_share
        Weight of the shorter window. Where what is missing may be replaced, less of it and a longer window are better:
        residents are then those that can stand in for the others, and a rare expert is let go at once.
    """

    def __init__(self, layers: int, experts: int, *, slow: float = _SLOW, fast_share: float = _FAST_SHARE) -> None:
        self._layers, self._experts = layers, experts
        self._rate = np.zeros((2, layers * experts))
        self._decay = np.array([[FAST], [slow]])
        self._fast_share = fast_share

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Let both windows move on by these tokens."""
        tokens, first = len(ids), layer * self._experts
        self._rate[:, first : first + self._experts] *= self._decay**tokens
        weight = (1 - self._decay) * self._decay ** np.arange(tokens - 1, -1, -1)  # [2, T]
        for rate, of_token in zip(self._rate, weight, strict=True):
            np.add.at(rate, first + ids[:, :top_k], of_token[:, None])

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return the chance of use per cycle of keeping it."""
        chance = self._fast_share * self._rate[0, keys] + (1 - self._fast_share) * self._rate[1, keys]
        ahead = ahead_of(keys, layer, self._layers, self._experts) / self._layers
        return np.asarray(chance / (ahead + PATIENCE))


class Deferred:
    """A policy that learns of a few tokens when it is asked: mostly nothing must go, and nobody asks.

    Parameters
    ----------
    most
        Notes that are kept for it, one for each layer of a step; what lies further back is forgotten if nobody asked
        meanwhile.
    """

    def __init__(self, policy: Eviction, most: int = 4096) -> None:
        self._policy = policy
        self._noted: deque[_Note] = deque(maxlen=most)

    def note(
        self, layer: int, expert: Sequence[int] | Rows, scores: NDArray[np.float32], token: Rows | None = None
    ) -> None:
        """Learn later which experts were used. Modifies; any thread may.

        Parameters
        ----------
        expert, scores, token
            [R] each, a row per token and expert; of one token where `token` is None.
        """
        self._noted.append(_Note(layer, expert, scores, token))

    def learn(self, layer: int, expert: Rows, scores: NDArray[np.float32], token: Rows) -> None:
        """Do what `note` does, now."""
        self._catch_up()
        self._learn(_Note(layer, expert, scores, token))

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Learn from some tokens, after those that were noted."""
        self._catch_up()
        self._policy.observe(layer, ids, scores, top_k)

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return what the policy says; learns what was noted."""
        self._catch_up()
        return self._policy.worth(keys, layer)

    def _catch_up(self) -> None:
        while self._noted:
            self._learn(self._noted.popleft())

    def _learn(self, note: "_Note") -> None:
        layer, token = note.layer, note.token
        expert, scores = np.asarray(note.expert, dtype=np.int64), note.scores.astype(np.float64)
        if token is None or token.min() == token.max():
            self._policy.observe(layer, expert[None], scores[None], len(expert))
            return
        order = np.lexsort((-scores, token))
        sizes = np.unique(token, return_counts=True)[1]
        ends = np.cumsum(sizes)
        for size in np.unique(sizes):
            rows = (ends[sizes == size] - size)[:, None] + np.arange(size)
            self._policy.observe(layer, expert[order][rows], scores[order][rows], int(size))


class _Note(NamedTuple):
    layer: int
    expert: Sequence[int] | Rows
    scores: NDArray[np.float32]
    token: Rows | None


class Belady:
    """What is needed again last goes first: the optimum, for which one must know the future.

    Parameters
    ----------
    uses
        Keys of every (token, layer) event in order, ``[T * L, K]``.
    """

    def __init__(self, uses: Ints, num_keys: int) -> None:
        self._uses = uses
        self._again = _next_uses(uses)
        self._next = np.full(num_keys, np.inf)
        first, where = np.unique(uses.ravel(), return_index=True)
        self._next[first] = where // uses.shape[1]
        self._now = 0

    def observe(self, layer: int, ids: Ints, scores: Floats, top_k: int) -> None:
        """Move on in time."""
        for event in range(self._now, self._now + len(ids)):
            self._next[self._uses[event]] = self._again[event]
        self._now += len(ids)

    def worth(self, keys: Ints, layer: int) -> Floats:
        """Return minus the event of the next use."""
        return -self._next[keys]


def _next_uses(uses: Ints) -> Floats:
    """Event in which each use's key is used again, infinity where it is not, float64 ``[T * L, K]``."""
    flat, events = uses.ravel(), np.repeat(np.arange(len(uses)), uses.shape[1])
    order = np.argsort(flat, kind="stable")
    follows = np.append(flat[order][1:] == flat[order][:-1], False)
    again = np.full(len(flat), np.inf)
    again[order[:-1]] = np.where(follows[:-1], events[order[1:]], np.inf)
    return again.reshape(uses.shape)


def ahead_of(keys: Ints, layer: int, layers: int, experts: int) -> Ints:
    """Layers that run after `layer` and before the one of each key."""
    return (keys // experts - layer - 1) % layers


EVICTIONS: Final[Mapping[str, Callable[[int, int], Eviction]]] = {
    "rates": Rates,
    "steady": partial(Rates, slow=STEADY_SLOW, fast_share=STEADY_FAST_SHARE),
    "cost-aware": lambda layers, experts: CostAware(Rates(layers, experts), layers * experts),
    "cyclfu": CycLfu,
    "least-stale": LeastStale,
    "score": ScoreAverage,
    "lfu": Lfu,
    "lru": Lru,
}
