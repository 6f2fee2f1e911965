"""Which experts a token gets when some of those that its router chose are not at hand.

Decides from ranked candidates, their scores and what is resident; exact routing is one policy among others, and every
policy at zero is exact. Must not know what a miss costs, nor weights: similarity of weights says nothing about which
expert may stand in for another (RUNTIME.md), router scores do.

Axes: E experts, K top-k, C >= K ranked candidates of one token in one layer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.policy.eviction import Bools, Floats, Ints
from runtime.policy.sensitivity import Sensitivity


@dataclass(frozen=True, eq=False)
class Choice:
    """What a token gets in a layer.

    Attributes
    ----------
    experts, scores
        The experts to run, best first, and what they are weighted by: their router scores, or part of them where a
        policy says so; int64 and float64 ``[K']``, K' <= K.
    low
        Whether a low-precision copy will do, bool ``[K']``.
    lost
        Share of the top-K router mass that was given up, 0 where the choice is exact.
    factor
        How much dearer giving up is to this token than to others (`MassBudget.factor`).
    probed
        What an expert that was at hand and replaced nonetheless costs, in the units of a budget's shares (`Probed`).
    """

    experts: Ints
    scores: Floats
    low: Bools
    lost: float = 0.0
    factor: float = 1.0
    probed: float = 0.0


class Routing(Protocol):
    """Chooses experts for one token in one layer."""

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Return what the token gets.

        Parameters
        ----------
        ids, scores
            Candidates best first and the router's scores of them, ``[C]``.
        resident
            Whether each expert of the layer is at hand, bool ``[E]``.
        """
        ...


def _kept(ids: Ints, scores: Floats, picked: Ints, top_k: int, low: Bools | None = None) -> Choice:
    """Make the choice of candidates at positions `picked`."""
    total = float(scores[:top_k].sum())
    given = float(scores[picked].sum())
    lost = max(0.0, 1 - given / total) if total > 0 else 0.0
    if len(picked) == top_k and (picked < top_k).all():
        lost = 0.0
    return Choice(ids[picked], scores[picked], np.zeros(len(picked), dtype=bool) if low is None else low, lost)


@dataclass(frozen=True)
class Exact:
    """What the router chose."""

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Return the top K."""
        return _kept(ids, scores, np.arange(top_k), top_k)


@dataclass(frozen=True)
class SmoeMargin:
    """SMoE: missing experts near the edge of the top K are replaced by residents just beyond it.

    With S the best score that was not chosen, experts above ``(1 + margin) S`` are required; others may be replaced by
    residents with scores in ``((1 - margin) S, S]``, best first. `margins` are per layer; one number holds for all.
    """

    margins: tuple[float, ...]

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Replace missing experts within the margin."""
        if len(ids) <= top_k:
            return _kept(ids, scores, np.arange(top_k), top_k)
        margin = self.margins[layer % len(self.margins)]
        edge = scores[top_k]
        spare = [c for c in range(top_k, len(ids)) if resident[ids[c]] and scores[c] > (1 - margin) * edge]
        picked = []
        for candidate in range(top_k):
            required = resident[ids[candidate]] or scores[candidate] > (1 + margin) * edge
            picked.append(candidate if required or not spare else spare.pop(0))
        return _kept(ids, scores, np.array(sorted(picked)), top_k)


@dataclass(frozen=True)
class MassBudget:
    """Ours: missing experts are replaced while the router mass lost stays within a share of the top-K mass.

    The lowest score goes first, and gets the best resident outside of the top K. `shares` are per layer; one number
    holds for all.

    Where a wait is shared, as it is for a layer that calls other nodes, replacing some of the missing experts buys
    nothing: with `whole`, it is all of them or none (RUNTIME.md, "Across nodes"). With `weighted`, what is lost counts
    by the share of mass of the expert that is replaced: a close call between two heavy experts changes more of a
    layer's output than one between two light ones. `prices`, by layer and expert, say how much more it matters that
    one expert is replaced than another (`runtime.pricing`), and `sensitivity`, to one token than to another; without
    them, all matter alike. A stand-in is weighted by `stand_in` of its score: its output is all but orthogonal to what
    is missing, so that less of it changes a layer's output less; and none at all makes predictions too sure of
    themselves (see `LeaveOut`).
    """

    shares: tuple[float, ...]
    whole: bool = False
    weighted: bool = False
    prices: tuple[tuple[float, ...], ...] = ()
    stand_in: float = 1.0
    sensitivity: Sensitivity | None = None

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Replace what the budget allows."""
        here, score = resident[ids].tolist(), scores.tolist()  # quicker than arrays for so few
        missing = [c for c in range(top_k - 1, -1, -1) if not here[c]]
        spare = [c for c in range(top_k, len(here)) if here[c]]
        total = max(sum(score[:top_k]), 1e-12)
        budget = self.shares[layer % len(self.shares)]
        factor = self.factor(layer, ids, scores) if missing and spare and budget > 0 else 1.0
        budget /= factor
        stand_in: dict[int, int] = {}
        for candidate in missing:
            share, other = score[candidate] / total, score[spare[0]] / total if spare else 0.0
            cost = self.cost_of(layer, ids[candidate], share, other) if spare else math.inf
            if cost > budget:
                if self.whole:
                    stand_in.clear()
                    break
                continue
            budget -= cost
            stand_in[candidate] = spare.pop(0)
        picked = np.array(sorted(stand_in.get(candidate, candidate) for candidate in range(top_k)))
        choice = replace(_kept(ids, scores, picked, top_k), factor=factor)
        if self.stand_in == 1.0 or not stand_in:
            return choice
        return replace(choice, scores=np.where(picked < top_k, choice.scores, self.stand_in * choice.scores))

    def _cost(self, missing: float, spare: float) -> float:
        """Return what it costs to replace one expert by another, from their shares of the top-K mass."""
        return max(0.0, missing - spare) * (missing if self.weighted else 1.0)

    def scaled(self, scale: float) -> "MassBudget":
        """Return the same policy with shares so many times as large."""
        return self if scale == 1.0 else replace(self, shares=tuple(scale * share for share in self.shares))

    def factor(self, layer: int, ids: Ints, scores: Floats) -> float:
        """Return how much dearer a replacement is to this token than to others."""
        return self.sensitivity.factor(layer, ids, scores) if self.sensitivity is not None else 1.0

    def cost_of(self, layer: int, expert: int, missing: float, spare: float) -> float:
        """Return what it costs to replace an expert, from its and its stand-in's shares of the top-K mass.

        To a token like others: `factor` times as much to this one.
        """
        return self._cost(missing, spare) * (self.prices[layer][expert] if self.prices else 1.0)


@dataclass(frozen=True)
class Probed:
    """What a budget chooses, and the lightest expert at hand replaced besides: to see what that does to predictions.

    Nothing is loaded for it. It costs about as much as what is really replaced, since predictions do not diverge in
    proportion to much more: at most `most` of a layer's share of `usual`, the budget that the calibration was made for.
    """

    inner: MassBudget
    usual: MassBudget
    most: float = 3.0

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Replace what the budget allows, and one more."""
        choice = self.inner.choose(layer, ids, scores, resident, top_k)
        total = max(float(scores[:top_k].sum()), 1e-12)
        taken = np.isin(ids, choice.experts)
        spare = np.flatnonzero(resident[ids] & ~taken)
        spare, kept = spare[spare >= top_k], np.flatnonzero(resident[ids[:top_k]] & taken[:top_k])
        if not len(spare) or not len(kept):
            return choice
        given, instead = int(kept[-1]), int(spare[0])
        mass, other = float(scores[given]) / total, float(scores[instead]) / total
        cost = self.usual.cost_of(layer, int(ids[given]), mass, other) * self.usual.factor(layer, ids, scores)
        if cost > self.most * self.usual.shares[layer % len(self.usual.shares)]:
            return choice
        slot = int(np.flatnonzero(choice.experts == ids[given])[0])
        experts, weights = choice.experts.copy(), choice.scores.copy()
        experts[slot], weights[slot] = ids[instead], self.usual.stand_in * scores[instead]
        return replace(choice, experts=experts, scores=weights, probed=cost)


@dataclass(frozen=True)
class LeaveOut:
    """Ours, where a wait is shared: a token's missing experts are all left out, or none of them is.

    They are while the squares of their shares of the top-K mass sum up to no more than the layer's share, and one is
    left; the others weigh as much more as the model normalises. `shares` are per layer; one number holds for all.

    What experts put out is all but orthogonal. So the square of what is missing is what a layer's output changes by,
    and an expert behind the top K that stood in would add its own. At as many waits, predictions diverge by a seventh
    to a fifth less than with stand-ins (tinymoe); yet the perplexity of new text rises more, since stand-ins make
    predictions less sure of themselves: `MassBudget` is what a budget of perplexity is spent by.
    """

    shares: tuple[float, ...]

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Leave out all that is missing, if the budget allows it."""
        here = resident[ids[:top_k]]
        share = scores[:top_k] / max(float(scores[:top_k].sum()), 1e-12)
        lost = float((share[~here] ** 2).sum())
        is_affordable = here.any() and lost <= self.shares[layer % len(self.shares)] > 0
        return _kept(ids, scores, np.flatnonzero(here) if is_affordable else np.arange(top_k), top_k)


@dataclass
class CachePrior:
    """Cache-conditional experts (arXiv 2412.00099): residents rank higher.

    They get `weight` times the running range of logits added, for ranking only; the `top` best are kept as they are.
    """

    weight: float
    top: int = 1
    _range: dict[int, tuple[float, int]] = field(default_factory=dict)

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Rank anew. Modifies the running range."""
        logits = np.log(np.maximum(scores, 1e-9))
        mean, count = self._range.get(layer, (0.0, 0))
        mean = (mean * count + float(logits.max() - logits.min())) / (count + 1)
        self._range[layer] = mean, count + 1
        biased = logits + self.weight * mean * resident[ids]
        biased[: self.top] = np.inf
        picked = np.sort(np.argsort(-biased, kind="stable")[:top_k])
        return _kept(ids, scores, picked, top_k)


@dataclass(frozen=True)
class Buddies:
    """BuddyMoE (arXiv 2511.10054): a missing expert is replaced by a resident that is often chosen together with it.

    Only for tokens whose gate is undecided: entropy of the top-K mass at least `undecided` of the highest possible.
    `table` lists the buddies of each expert, best first, int64 ``[L, E, B]`` (see `buddies_of`).
    """

    table: NDArray[np.int64]
    undecided: float

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Replace missing experts by buddies among the candidates."""
        mass = np.maximum(scores[:top_k], 1e-12) / np.maximum(scores[:top_k], 1e-12).sum()
        entropy = float(-(mass * np.log(mass)).sum()) / max(np.log(top_k), 1e-12)
        picked = list(range(top_k))
        if entropy >= self.undecided:
            position = {int(expert): candidate for candidate, expert in enumerate(ids)}
            for slot in range(top_k):
                if not resident[ids[slot]]:
                    buddies = self.table[layer, ids[slot]].tolist()
                    free = (position[b] for b in buddies if b in position and resident[b] and position[b] not in picked)
                    picked[slot] = next(free, slot)
        return _kept(ids, scores, np.array(sorted(picked)), top_k)


def buddies_of(ids: Ints, experts: int, top_k: int, count: int = 4) -> NDArray[np.int64]:
    """Return the experts most often chosen together with each, int64 ``[L, E, count]``, from ids ``[T, L, C]``."""
    layers = ids.shape[1]
    table = np.empty((layers, experts, min(count, experts - 1)), dtype=np.int64)
    for layer in range(layers):
        together = np.zeros((experts, experts))
        chosen = ids[:, layer, :top_k]
        for first in range(top_k):
            for second in range(top_k):
                if first != second:
                    np.add.at(together, (chosen[:, first], chosen[:, second]), 1.0)
        np.fill_diagonal(together, -1.0)
        table[layer] = np.argsort(-together, axis=1, kind="stable")[:, : table.shape[2]]
    return table


@dataclass(frozen=True)
class DropCold:
    """A missing expert is left out if its share of the top-K mass is below `share`; the best expert never is."""

    share: float

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Leave out what is cold and unimportant."""
        total = float(scores[:top_k].sum())
        picked = [c for c in range(top_k) if c == 0 or resident[ids[c]] or scores[c] >= self.share * total]
        return _kept(ids, scores, np.array(picked), top_k)


@dataclass(frozen=True)
class AdaptiveGating:
    """AdapMoE (arXiv 2408.10284): a token that needs fewer experts gets fewer.

    Trailing experts are left out, resident or not, while the squared share of mass that goes with them, times the
    layer's `sensitivity`, stays below `threshold`. One sensitivity holds for all layers.
    """

    threshold: float
    sensitivity: tuple[float, ...] = (1.0,)

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Use as many experts as the token needs."""
        share = scores[:top_k] / max(float(scores[:top_k].sum()), 1e-12)
        weight = self.sensitivity[layer % len(self.sensitivity)]
        count = top_k
        while count > 1 and weight * float(share[count - 1 :].sum()) ** 2 <= self.threshold:
            count -= 1
        return _kept(ids, scores, np.arange(count), top_k)


@dataclass(frozen=True)
class LowMissing:
    """What another policy chooses; a low-precision copy will do for what is missing even then.

    Only where its share of the top-K mass is at most `share`.
    """

    inner: Routing
    share: float = 1.0

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Load less of what is missing."""
        choice = self.inner.choose(layer, ids, scores, resident, top_k)
        light = choice.scores <= self.share * max(float(scores[:top_k].sum()), 1e-12)
        return replace(choice, low=choice.low | (~resident[choice.experts] & light))


@dataclass(frozen=True)
class PrecisionByRank:
    """HOBBIT (arXiv 2411.01433): a missing expert is as unimportant as the mass of those ranked before it.

    Above `low` a low-precision copy will do, above `skip` it is left out.
    """

    low: float
    skip: float

    def choose(self, layer: int, ids: Ints, scores: Floats, resident: Bools, top_k: int) -> Choice:
        """Load less of what matters less."""
        share = scores[:top_k] / max(float(scores[:top_k].sum()), 1e-12)
        before = np.cumsum(share) - share
        here = resident[ids[:top_k]]
        picked = np.flatnonzero(here | (before <= self.skip))
        return _kept(ids, scores, picked, top_k, low=(~here & (before > self.low))[picked])


ROUTINGS: Final[Mapping[str, Callable[[float], Routing]]] = {
    "exact": lambda _: Exact(),
    "mass": lambda share: MassBudget((share,)),
    "mass-weighted": lambda share: MassBudget((share,), weighted=True),
    "mass-whole": lambda share: MassBudget((share,), whole=True),
    "leave-out": lambda share: LeaveOut((share,)),
    "smoe": lambda margin: SmoeMargin((margin,)),
    "cache-prior": CachePrior,
    "drop-cold": DropCold,
    "adaptive": AdaptiveGating,
    "hobbit": lambda share: PrecisionByRank(low=1 - share, skip=1.0),
}
"""Policies that take one number; 0 is exact."""
