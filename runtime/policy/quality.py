"""How much may still be given up: a budget of quality, spent by substitution and earned token by token.

Decides whether the next step may substitute. What a substitution costs is known from calibration, as a rise of the
negative log-likelihood (NLL) for each unit of router mass given up in a layer; sampled steps that were run both ways
say whether this text is like the calibration's, and probes, which give up a little more for nothing, how much dearer
that is here: then less is given up, at a higher price. Must not know how experts are chosen, nor what time it is: time
is tokens.

The account: every token earns the budget's rise of NLL, each layer its calibrated part, up to `horizon` tokens' worth;
what is given up is paid from it; while it is overdrawn, and through the warm-up, steps are exact. So what any n tokens
in a row give up is at most the budget of n + horizon tokens, and one step more. Nodes that run different layers of a
token keep their accounts apart, and together stay within the budget.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

Standing = Literal["off", "warming", "open", "spent", "unlike"]
"""Why steps are exact (``off``, ``warming``, ``spent``, ``unlike`` the calibration's text), or ``open``."""

_SAMPLES: Final = 64  # sampled divergences that are looked back on
_FEW: Final = 8  # samples that say nothing yet
_DOUBT: Final = 2.0  # standard errors
_PROBES: Final = 256  # that are looked back on
_FEW_PROBES: Final = 32
_SELDOM: Final = 8  # times as far between, once enough of them found nothing
_STEEP: Final = 1.45
"""Predictions diverge with about the 0.69th power of a budget's shares (tinymoe-base, 8 of 32 experts)."""


@dataclass(frozen=True)
class Allowance:
    """What calibration found for a budget.

    Attributes
    ----------
    budget
        Relative rise of perplexity that is allowed: .005 is half a per cent.
    nll
        Rise of NLL that each layer may cause per token [L], together log(1 + budget); nats.
    nll_per_mass
        Rise of NLL for each unit of lost share of top-K mass, by layer [L], to a token like others; nats.
    nll_per_low_row
        Rise of NLL for each (token, expert) computed in low precision, by layer [L]; nats. Empty where none may be.
    divergence
        KL divergence from exact to substituted next-token distributions that was measured at this budget; nats.
    warmup
        Exact tokens until what is at hand is what the text asks for.
    horizon
        Tokens' worth of budget that can be saved up.
    sample_every
        Tokens between two steps that are run both ways; never if 0.
    slope
        KL divergence for each unit of cost that probes gave up, on all but the dearest of the calibration's text; nats.
        Never probed if 0.
    probe_every
        Tokens between two probes.
    """

    budget: float
    nll: tuple[float, ...]
    nll_per_mass: tuple[float, ...]
    nll_per_low_row: tuple[float, ...] = ()
    divergence: float = math.inf
    warmup: int = 0
    horizon: int = 256
    sample_every: int = 0
    slope: float = 0.0
    probe_every: int = 16


@dataclass
class Controller:
    """The account of one node. Not thread-safe.

    Attributes
    ----------
    excess
        How many times as dear as on the calibration's dearest text probes found this text, beyond doubt; 1 at least.
    """

    allowance: Allowance
    tokens: int = field(default=0, init=False)
    earned: float = field(default=0.0, init=False)
    spent: float = field(default=0.0, init=False)
    balance: float = field(default=0.0, init=False)
    excess: float = field(default=1.0, init=False)
    _warm_at: int = field(init=False)
    _since_sample: int = field(default=0, init=False)
    _since_probe: int = field(default=0, init=False)
    _divergences: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES), init=False)
    _probes: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_PROBES), init=False)

    def __post_init__(self) -> None:
        self._warm_at = self.allowance.warmup

    @property
    def standing(self) -> Standing:
        """What the next step may do, and why."""
        if self.allowance.budget <= 0:
            return "off"
        if self.tokens < self._warm_at:
            return "warming"
        if self._is_unlike():
            return "unlike"
        return "open" if self.balance > 0 else "spent"

    @property
    def is_open(self) -> bool:
        """Whether the next step may substitute."""
        return self.standing == "open"

    @property
    def wants_sample(self) -> bool:
        """Whether the next step is to be run both ways: also while closed, since the text may change again."""
        every = self.allowance.sample_every
        return every > 0 and self.standing in {"open", "unlike"} and self._since_sample >= every

    @property
    def wants_probe(self) -> bool:
        """Whether the next step is to be run once more with something given up that need not be."""
        is_settled = len(self._probes) == _PROBES and self.excess == 1
        every = self.allowance.probe_every * (_SELDOM if is_settled else 1)
        return self.allowance.slope > 0 and self._since_probe >= every and self.standing == "open"

    @property
    def scale(self) -> float:
        """How many times the calibrated shares may be given up on text like this, at most once."""
        return float(self.dearness**-_STEEP)

    @property
    def dearness(self) -> float:
        """How many times the calibrated rise of NLL the same costs here, 1 at least.

        Calibration found less rise of NLL than divergence: what makes predictions diverge also makes them less sure of
        themselves, which helped there. Here all of the divergence that is more than there counts as a rise.
        """
        allowance, all_nll = self.allowance, sum(self.allowance.nll)
        leverage = allowance.divergence / all_nll if all_nll > 0 and math.isfinite(allowance.divergence) else 1.0
        return 1.0 + (self.excess - 1.0) * max(leverage, 1.0)

    @property
    def rise(self) -> float:
        """Relative rise of perplexity so far, as calibration would have it, if all layers spent their part alike."""
        return math.expm1(math.log1p(self.allowance.budget) * self.spent / self.earned) if self.earned else 0.0

    @property
    def divergence(self) -> float | None:
        """Mean sampled KL divergence; None before the first sample."""
        return sum(self._divergences) / len(self._divergences) if self._divergences else None

    def advance(
        self,
        tokens: int,
        layers: Iterable[int],
        lost: Mapping[int, float],
        low_rows: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Account for a step. Modifies.

        Parameters
        ----------
        layers
            That ran.
        lost
            Share of top-K mass given up by layer, summed over the step's tokens, each times how much dearer that is to
            it than to others.
        low_rows
            (token, expert) pairs computed in low precision, by layer.
        """
        earning = sum(self.allowance.nll[layer] for layer in layers)
        price = sum(self.allowance.nll_per_mass[layer] * mass for layer, mass in lost.items())
        price += sum(self.allowance.nll_per_low_row[layer] * rows for layer, rows in low_rows.items())
        price *= self.dearness
        self.tokens += tokens
        self._since_sample += tokens
        self._since_probe += tokens
        self.earned += earning * tokens
        self.spent += price
        self.balance = min(self.balance + earning * tokens, earning * self.allowance.horizon) - price

    def sample(self, divergence: float, layers: Iterable[int] | None = None) -> None:
        """Take in a step that was run both ways: the KL divergence from exact to substituted. Modifies.

        Parameters
        ----------
        layers
            That gave something up, all if None. What only some of them cause stands for what all would: divergences of
            layers add up, each layer's like its part of the budget.
        """
        nll = self.allowance.nll
        part = sum(nll[layer] for layer in layers) / sum(nll) if layers is not None and sum(nll) > 0 else 1.0
        self._since_sample = 0
        if part > 0:
            self._divergences.append(divergence / part)

    def probe(self, divergence: float, cost: float) -> None:
        """Take in what giving up a little more did to a step. Modifies.

        Parameters
        ----------
        divergence
            KL divergence that it caused; nats.
        cost
            Of what was given up, in the units of the calibrated shares.
        """
        self._since_probe = 0
        if cost > 0:
            self._probes.append((divergence, cost))
            self.excess = self._excess()

    def restart(self) -> None:
        """Warm up again, since what is at hand has changed. Modifies."""
        self._warm_at = self.tokens + self.allowance.warmup

    def _excess(self) -> float:
        """Return how many times as much as on the calibration's dearest text a unit of cost does here: 1 at least.

        A standard error less than was found (of a ratio: Cochran, Sampling Techniques, 1977, eq. 6.4), so that chance
        does not close what calibration allows.
        """
        count = len(self._probes)
        if count < _FEW_PROBES:
            return 1.0
        total = sum(cost for _, cost in self._probes)
        slope = sum(divergence for divergence, _ in self._probes) / total
        square = sum((divergence - slope * cost) ** 2 for divergence, cost in self._probes)
        error = math.sqrt(square * count / (count - 1)) / total
        return max(1.0, (slope - error) / self.allowance.slope)

    def _is_unlike(self) -> bool:
        """Whether samples diverge more than calibration's, beyond doubt."""
        count = len(self._divergences)
        if count < _FEW:
            return False
        mean = sum(self._divergences) / count
        variance = sum((each - mean) ** 2 for each in self._divergences) / (count - 1)
        return mean - _DOUBT * math.sqrt(variance / count) > self.allowance.divergence
