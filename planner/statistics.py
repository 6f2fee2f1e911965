"""What tokens ask for lately, and whether that has changed: activation windows and a change detector.

Decides how fast old activations are forgotten and when a difference is more than noise. Values in, values out: no
clock and no I/O; a batch is what was routed since the last look. Must not know placements.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.problem import Events, Floats

_LEAST_EXPECTED: Final = 1.0  # counts expected below this would let a single token look like a shift
_USUAL_SPREAD: Final = 0.25  # of the logarithm of scores, until enough of them have been seen
_USUAL_WEIGHT: Final = 4.0
_FARTHEST: Final = 4.0  # one odd batch raises the sum by no more than this many standard deviations


@dataclass(frozen=True, eq=False)
class Window:
    """Activations counted over a time.

    Attributes
    ----------
    counts
        Tokens that chose each expert, weighted by age, float64 ``[L, E]``.
    tokens
        Weighted by age.
    """

    counts: Floats
    tokens: float

    @property
    def share(self) -> Floats:
        """Share of tokens that activate each expert, float64 ``[L, E]``."""
        return self.counts / max(self.tokens, 1e-300)

    def after(self, batch: "Window", half_life: float) -> "Window":
        """Return the window with a batch added, what was there weighing half as much after `half_life` tokens."""
        kept = 0.5 ** (batch.tokens / half_life)
        return Window(self.counts * kept + batch.counts, self.tokens * kept + batch.tokens)


def count_events(events: Events, experts: int) -> Window:
    """Count chosen experts ``[T, L, K]``."""
    tokens, layers, _ = events.shape
    flat = np.arange(layers)[None, :, None] * experts + events
    counts = np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)
    return Window(counts.astype(np.float64), float(tokens))


def shift_score(batch: Window, usual: Window) -> float:
    """Chi-square of a batch against what is usual, per expert: about 1 for independent tokens of the same workload.

    Counts of both are uncertain, so expected counts are widened by the batch's size against the window's. Tokens of
    one text are alike, so real batches score above 1 without any shift; `Detector` learns how far.
    """
    expected = usual.share * batch.tokens
    spread = np.maximum(expected, _LEAST_EXPECTED) * (1 + batch.tokens / max(usual.tokens, 1.0))
    return float(((batch.counts - expected) ** 2 / spread).mean())


def alarm_threshold(false_alarm_rate: float, drift: float) -> float:
    """Height of a CUSUM that unchanged, independent, normal scores reach once in ``1 / false_alarm_rate`` batches.

    Notes
    -----
    Siegmund (1985): ``ARL = (exp(2 k b) - 2 k b - 1) / (2 k^2)`` with ``b = h + 1.166``, solved for h.
    """
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        grown = 2 * drift * (middle + 1.166)
        low, high = (middle, high) if (math.expm1(grown) - grown) * false_alarm_rate < 2 * drift**2 else (low, middle)
    return high


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How eager a detector is.

    Attributes
    ----------
    false_alarm_rate
        Alarms per batch while nothing changes.
    drift
        Standard deviations above the mean that do not count: half of the smallest shift worth finding.
    warm_up
        Batches from which the usual scores are learnt before the first alarm.
    half_life
        Tokens after which an activation weighs half.
    """

    false_alarm_rate: float = 1e-4
    drift: float = 1.0
    warm_up: int = 8
    half_life: float = 20_000.0


@dataclass(frozen=True, eq=False)
class Learnt:
    """What is usual: activations, and the scores that batches of the same workload get against them.

    Attributes
    ----------
    scores, total, squares
        Number, sum and sum of squares of the logarithms of scores.
    """

    window: Window
    scores: int = 0
    total: float = 0.0
    squares: float = 0.0

    def after(self, batch: Window, score: float, half_life: float) -> "Learnt":
        """Return what is usual with a batch and its score (logarithm) added."""
        window = self.window.after(batch, half_life)
        return Learnt(window, self.scores + 1, self.total + score, self.squares + score**2)

    def score(self, batch: Window) -> float:
        """Logarithm of the batch's `shift_score`."""
        return math.log(max(shift_score(batch, self.window), 1e-12))

    def deviation(self, score: float) -> float:
        """Say by how many standard deviations a score is unusual; few scores lean to a spread usual elsewhere."""
        mean = self.total / self.scores
        squares = max(self.squares - self.scores * mean**2, 0.0) + _USUAL_WEIGHT * _USUAL_SPREAD**2
        return (score - mean) / math.sqrt(squares / (self.scores + _USUAL_WEIGHT - 1))


@dataclass(frozen=True, eq=False)
class Detector:
    """Whether an ingress's latest batches are as usual (CUSUM of how unusual their scores are).

    Attributes
    ----------
    learnt
        Up to the last batch that was above suspicion.
    tentative
        With the batches under suspicion, which become usual once the sum is back at zero. Were odd batches left out
        for good, what is usual would look less varied than it is, and alarms would be false.
    height
        Of the sum.
    since
        Batches since the sum last was at zero: when the change began, if there is one.
    """

    learnt: Learnt
    tentative: Learnt | None = None
    height: float = 0.0
    since: int = 0

    def after(self, batch: Window, sensitivity: Sensitivity) -> "Detector":
        """Return the detector after a batch."""
        score = self.learnt.score(batch)
        with_it = (self.tentative or self.learnt).after(batch, score, sensitivity.half_life)
        if self.learnt.scores < sensitivity.warm_up:
            return Detector(with_it)
        unusual = min(self.learnt.deviation(score), _FARTHEST)
        height = max(self.height + unusual - sensitivity.drift, 0.0)
        return Detector(self.learnt, with_it, height, self.since + 1) if height else Detector(with_it)

    def has_changed(self, sensitivity: Sensitivity) -> bool:
        """Whether the latest batches are more than noise."""
        return self.height > alarm_threshold(sensitivity.false_alarm_rate, sensitivity.drift)


def detector_of(first: Window) -> Detector:
    """Begin with a first batch."""
    return Detector(Learnt(first))
