"""Measuring what substitution costs: negative log-likelihood of text against what may be given up in each layer.

Decides how much text is enough and which shares a budget buys. Flow: texts → pieces → exact run → how much more one
expert costs than another: from gradients (`runtime.pricing`), or, where a layer replaces all or none, from each layer
alone → all layers together at a few scales → for each budget the largest scale whose cost stays within it
(`runtime.forcing` runs the text). Where experts are held in a low precision, everything but the exact run is made in
it, and what it costs beside the exact run is paid from every budget first.

The KL divergence from exact to substituted predictions has little noise and the rise of NLL much, so that the first
says how layers compare and how cost grows with scale, the second how much of it is a loss on real text.

Axes: N pieces, T tokens, L layers, E experts, K top-k.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import InvalidInput
from runtime.forcing import WARMUP, Bench, Run
from runtime.policy.eviction import Floats
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import Exact, MassBudget
from runtime.policy.sensitivity import Sensitivity
from runtime.pricing import measure_prices
from runtime.rounding import held_in
from schemas.calibration import Calibration, Setting, Situation, TokenPrices

log = logging.getLogger(__name__)

BUDGETS: Final = (0.0025, 0.005, 0.01, 0.02)
WINDOW: Final = 256
_PROBE: Final = 0.02  # share given to one layer alone, to see what it costs
_PROBE_PIECES: Final = 16
_PROBE_EVERY: Final = 8  # tokens between those that are run once more
_SCALES: Final = (0.5, 1.0, 2.0)  # around the first guess
STAND_IN: Final = 0.65
"""Part of its score that a stand-in is weighted by: at as many loads, perplexity of tinymoe-base's calibration text
rises by .69 % instead of .80 % (8 of 32 experts; 222k tokens, the difference known to .02 points) and predictions
diverge by a seventh less, there and on new text, whose perplexity is the same within chance."""
_CONFIDENT: Final = 1.96  # standard errors on either side: 95 %
_FEWEST: Final = 8  # pieces
_TRIES, _NEAR = 4, 0.9  # runs for a budget, and how much of it is enough
_REACH: Final = 2.0  # times the largest scale that was run: the fit says little beyond

Progress = Callable[[int, int], None]


class Prices(NamedTuple):
    """What replacements cost, as files tell it.

    Attributes
    ----------
    experts
        Replacing each beside the others, [L, E]; empty where all cost alike.
    tokens
        A token's beside those of others; None where all cost alike.
    """

    experts: tuple[tuple[float, ...], ...] = ()
    tokens: TokenPrices | None = None

    @classmethod
    def of(cls, calibration: Calibration) -> "Prices":
        """Return a file's."""
        return cls(calibration.prices, calibration.token_prices)


_ALIKE: Final = Prices()


@dataclass(frozen=True)
class Rise:
    """A rise of mean NLL with its standard error over pieces; nats."""

    mean: float
    error: float

    @classmethod
    def between(cls, exact: Run, run: Run) -> "Rise":
        """Compare two runs piece by piece."""
        return cls.of(run.nll - exact.nll[: len(run.nll)])

    @classmethod
    def of(cls, differences: NDArray[np.floating[Any]]) -> "Rise":
        """Summarise differences, one for each piece."""
        return cls(float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences))))


def require_text(error: float, budget: float, *, tokens: int) -> None:
    """Refuse text whose noise hides a budget; raises InvalidInput with how many tokens are needed.

    Parameters
    ----------
    error
        Standard error of the rise of NLL that was measured at the budget.
    """
    interval, allowed = _CONFIDENT * error, math.log1p(budget)
    if interval > allowed:
        needed = math.ceil(tokens * (interval / allowed) ** 2 / 1000) * 1000
        raise InvalidInput(
            f"{tokens} tokens of text are too few for a budget of {budget:.2%}: the rise of perplexity is known to "
            f"± {math.expm1(interval):.2%} (95 %) only; give about {needed} tokens, or a budget above "
            f"{math.expm1(interval):.2%}"
        )


def require_pieces(pieces: torch.Tensor) -> None:
    """Refuse text of which nothing can be said; raises InvalidInput with how many tokens are needed."""
    count, window = pieces.shape[0], pieces.shape[1] - 1
    if count < _FEWEST:
        raise InvalidInput(
            f"{count} pieces of {window} tokens are too few to tell cost from chance; give {_FEWEST * window + 1} "
            "tokens at least"
        )


def calibrate(
    bench: Bench,
    *,
    model: str,
    situation: Situation,
    budgets: Sequence[float] = BUDGETS,
    priced: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Return the largest shares that stay within each budget.

    Parameters
    ----------
    priced
        Pieces that prices are measured on, int64 [N', T + 1]; the bench's if None. One pass: more of them cost little.

    Raises
    ------
    InvalidInput
        The text is too short for a budget, and the message says how much is needed; or the situation's precision costs
        more than a budget.
    UnfitPrecision
        The model's shape has no place for the groups of that precision.
    """
    layers, experts = bench.supply.layers, bench.supply.experts
    count, window = bench.pieces.shape[0], bench.pieces.shape[1] - 1
    require_pieces(bench.pieces)
    done, total = (
        0,
        2 + (layers if situation.is_whole else 1) + len(_SCALES) + len(budgets) * (1 if situation.is_whole else 2),
    )

    def report() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, total), total)

    bench.on_run = report  # a budget that was not met at once takes another run
    is_plain = situation.precision == "checkpoint"
    plain = bench.run(Exact(), keep=is_plain)
    with held_in(bench.model, situation.precision):
        exact = plain if is_plain else bench.run(Exact(), keep=True)
        held = max(Rise.between(plain, exact).mean, 0.0)
        affordable = _affordable(budgets, held, situation)
        prices = Prices() if situation.is_whole else _prices(bench, bench.pieces if priced is None else priced, report)
        shape = np.ones(layers) if prices.experts else _shape_of_layers(bench, situation)
        curve = _Curve(bench, exact, shape, situation, prices)
        for scale in _SCALES:
            curve.measure(scale * _PROBE / 2)
        settings = [_setting(plain, curve, budget, held) for budget in affordable]
    return Calibration(
        model=model,
        layers=layers,
        experts=experts,
        top_k=bench.top_k,
        tokens=count * window,
        pieces=count,
        warmup=0 if bench.supply.masks is not None else WARMUP,
        situation=situation,
        prices=prices.experts,
        token_prices=prices.tokens,
        stand_in=_stand_in(situation),
        settings=tuple(settings),
    )


def policy_of(shares: Sequence[float], *, is_whole: bool, prices: Prices = _ALIKE, stand_in: float = 1.0) -> MassBudget:
    """Return the policy that calibrated shares, prices and weights of stand-ins are for."""
    return MassBudget(
        tuple(shares),
        whole=is_whole,
        weighted=True,
        prices=prices.experts,
        stand_in=stand_in,
        sensitivity=_sensitivity(prices.tokens) if prices.tokens is not None else None,
    )


def _sensitivity(told: TokenPrices) -> Sensitivity:
    return Sensitivity(*(np.array(getattr(told, name)) for name in Sensitivity._fields))


def _stand_in(situation: Situation) -> float:
    return 1.0 if situation.is_whole else STAND_IN


def _prices(bench: Bench, pieces: torch.Tensor, report: Callable[[], None]) -> Prices:
    """Return what replacements cost."""
    found = measure_prices(bench.model, pieces, layers=bench.supply.layers, experts=bench.supply.experts)
    report()
    tokens = {name: array.tolist() for name, array in found.sensitivity._asdict().items()}
    return Prices(tuple(map(tuple, found.experts.tolist())), TokenPrices.model_validate_json(json.dumps(tokens)))


def _shape_of_layers(bench: Bench, situation: Situation) -> Floats:
    """Return how large a share each layer may have beside the others [L], mean 1: the less it diverges, the larger.

    Shares are upper limits of cost, and at the best allotment the next unit of it costs the same in every layer.
    """
    layers = bench.supply.layers
    price, stride = np.zeros(layers), max(1, len(bench.pieces) // _PROBE_PIECES)
    for layer in range(layers):
        shares = [_PROBE if each == layer else 0.0 for each in range(layers)]
        run = bench.run(policy_of(shares, is_whole=situation.is_whole), stride=stride)
        price[layer] = run.divergence / max(run.lost[layer], 1e-9)
    price = np.maximum(price, 0.05 * price.max()) if price.max() > 0 else np.ones(layers)
    shape = 1 / price
    return np.asarray(shape / shape.mean())


class _Point(NamedTuple):
    """A run at a scale."""

    scale: float
    run: Run
    rise: Rise


class _Curve:
    """Cost against scale: divergence grows with a power of it, and NLL in proportion to divergence, then faster."""

    def __init__(self, bench: Bench, exact: Run, shape: Floats, situation: Situation, prices: Prices) -> None:
        self._bench, self.exact, self._shape, self._situation = bench, exact, shape, situation
        self._prices = prices
        self.price_of_layers: Floats = np.array(prices.experts).mean(1) if prices.experts else 1 / shape
        self._runs: list[tuple[float, Run]] = []
        self.tokens = bench.pieces.shape[0] * (bench.pieces.shape[1] - 1)

    def shares(self, scale: float) -> tuple[float, ...]:
        """Return the shares at a scale."""
        return tuple(float(share) for share in scale * self._shape)

    def measure(self, scale: float) -> Run:
        """Run the text at a scale. Modifies."""
        run = self._bench.run(self._policy(scale))
        self._runs.append((scale, run))
        return run

    def slope(self, scale: float) -> float:
        """Return what probes at a scale cause for each unit of cost on all but the dearest stretches of the text; nats.

        It is their mean and a standard deviation between them.
        """
        if self._situation.is_whole:
            return 0.0
        account = Controller(Allowance(1.0, (), (), slope=math.inf, probe_every=_PROBE_EVERY))
        slopes = np.array(self._bench.run(self._policy(scale), account=account).slopes)
        return float(slopes.mean() + slopes.std())

    def _policy(self, scale: float) -> MassBudget:
        situation = self._situation
        return policy_of(
            self.shares(scale), is_whole=situation.is_whole, prices=self._prices, stand_in=_stand_in(situation)
        )

    def around(self, allowed: float) -> tuple["_Point", "_Point | None"]:
        """Return the largest scale whose rise is within what is allowed, and the next larger one that was run."""
        points = sorted(
            (_Point(scale, run, Rise.between(self.exact, run)) for scale, run in self._runs),
            key=lambda point: point.scale,
        )
        within = [point for point in points if point.rise.mean <= allowed]
        best = within[-1] if within else _Point(0.0, self.exact, Rise(0.0, 0.0))
        return best, next((point for point in points if point.scale > best.scale), None)

    def scale_of(self, rise: float) -> float:
        """Return the scale at which NLL is expected to rise by this much, as far as runs reach."""
        points = sorted((run.divergence, scale) for scale, run in self._runs if run.divergence > 0)
        if len(points) < 2:
            return self._runs[-1][0]
        diverged, scales = np.log(np.array(points)).T
        power, offset = np.polyfit(diverged, scales, 1)
        wanted = float(np.exp(power * math.log(self._divergence_of(rise)) + offset))
        return min(wanted, _REACH * max(scale for scale, _ in self._runs))

    def _divergence_of(self, rise: float) -> float:
        """Invert the fit ``rise = a D + b D^2``, a and b not negative, to all runs."""
        diverged = np.array([run.divergence for _, run in self._runs])
        rises = np.array([Rise.between(self.exact, run).mean for _, run in self._runs])
        linear = max(float((rises * diverged).sum() / (diverged**2).sum()), 0.05)  # where giving up helped, by luck
        (first, second), *_ = np.linalg.lstsq(np.stack([diverged, diverged**2], axis=1), rises, rcond=None)
        if second <= 0:
            return rise / linear
        if first < 0:
            return math.sqrt(rise / max(float((rises * diverged**2).sum() / (diverged**4).sum()), 1e-3))
        return float((math.sqrt(first**2 + 4 * second * rise) - first) / (2 * second))


def _affordable(budgets: Sequence[float], held: float, situation: Situation) -> list[float]:
    """Return the budgets, smallest first, that are more than the rise of NLL which the precision costs alone."""
    found = [budget for budget in sorted(budgets) if math.log1p(budget) > held]
    said = f"holding every expert in {situation.precision} costs {math.expm1(held):.2%} alone"
    if not found:
        raise InvalidInput(f"{said}; give a budget above that, or hold them in more bits")
    for budget in sorted(set(budgets) - set(found)):
        log.warning("%s: there is no setting for a budget of %.2f%%", said, 100 * budget)
    return found


def _setting(plain: Run, curve: _Curve, budget: float, held: float) -> Setting:
    """Approach a budget, first by the fit, then between what was within it and what was not; keep the most within.

    Parameters
    ----------
    plain
        The exact run in the checkpoint's precision: what all is paid for beside.
    held
        Rise of NLL that goes to the precision in which experts are held; nats.
    """
    tokens, allowed = curve.tokens, math.log1p(budget) - held
    scale = curve.scale_of(allowed)
    for _ in range(_TRIES):
        require_text(Rise.between(plain, curve.measure(scale)).error, budget, tokens=tokens)
        best, dear = curve.around(allowed)
        if best.rise.mean >= _NEAR * allowed:
            break
        if dear is None:
            scale = best.scale * min(max(curve.scale_of(allowed) / max(best.scale, 1e-12), 1.2), _REACH)
        else:
            way = (allowed - best.rise.mean) / (dear.rise.mean - best.rise.mean)
            scale = best.scale + (dear.scale - best.scale) * min(max(0.9 * way, 0.1), 0.9)
    return _told(budget, allowed, best, curve, Rise.between(plain, best.run))


def _told(budget: float, allowed: float, point: _Point, curve: _Curve, rise: Rise) -> Setting:
    """Return the setting: what is lost has its price by layer; `rise` is that beside the checkpoint's precision."""
    shares, run, price = curve.shares(point.scale), point.run, curve.price_of_layers.copy()
    spent = price * run.lost
    price *= max(point.rise.mean, allowed / 2) / max(float(spent.sum()), 1e-6)
    parts = spent / spent.sum() * allowed if spent.sum() > 0 else np.full(len(shares), allowed / len(shares))
    interval = _CONFIDENT * rise.error
    return Setting(
        budget=budget,
        shares=shares,
        nll=tuple(parts.tolist()),
        nll_per_mass=tuple(price.tolist()),
        rise=math.expm1(rise.mean),
        low=math.expm1(rise.mean - interval),
        high=math.expm1(rise.mean + interval),
        divergence=run.divergence,
        waits_share=float(run.waits.sum() / max(curve.exact.waits.sum(), 1e-12)),
        slope=curve.slope(point.scale),
    )
