"""What `agent calibrate` found: how much may be given up in each layer for what rise of perplexity.

Decides the file's format. Must not know how it was measured, nor who spends it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from schemas.base import FrozenModel
from schemas.files import Fault, load_json
from schemas.precision import LowPrecision, Precision

Number = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Situation(FrozenModel):
    """What was at hand while it was measured.

    Attributes
    ----------
    capacity
        Experts of each layer that were cached; 0 where a plan said what is at hand.
    eviction
        Of the cache; empty where a plan said what is at hand.
    node, plan
        The plan's digest and the node whose tokens were run.
    placement
        What was at hand under that plan by layer (`layer_mask`), at the nodes that run these layers; empty where no
        plan said.
    is_whole
        Whether experts were replaced only where the layer then waits for nobody.
    precision
        In which every expert was held: budgets pay for that, too.
    """

    capacity: Annotated[int, Field(ge=0)] = 0
    eviction: str = ""
    node: str = ""
    plan: str = ""
    placement: tuple[str, ...] = ()
    is_whole: bool = False
    precision: Precision = "checkpoint"


class Setting(FrozenModel):
    """The largest shares whose cost stays within a budget.

    Attributes
    ----------
    budget
        Relative rise of perplexity.
    shares
        What a token may give up, by layer (`runtime.policy.routing.MassBudget`, weighted).
    nll
        Part of the budget that is each layer's, as a rise of negative log-likelihood, without what the situation's
        precision costs; nats per token.
    nll_per_mass
        Rise of negative log-likelihood for each unit of lost share of top-K mass, by layer, to a token like others.
    rise, low, high
        Relative rise of perplexity measured with these shares, and its 95 % confidence interval over text pieces.
    divergence
        Mean KL divergence from exact to substituted next-token distributions, both in the situation's precision; nats.
    waits_share
        Loads (or, with a plan, waiting events) per token relative to exact execution.
    slope
        KL divergence for each unit of cost, as shares are, that probes gave up on all but the text's dearest stretches;
        nats. 0 where none was made.
    """

    budget: Annotated[float, Field(gt=0, le=1)]
    shares: tuple[Number, ...]
    nll: tuple[Number, ...]
    nll_per_mass: tuple[Number, ...]
    rise: float
    low: float
    high: float
    divergence: Number
    waits_share: Number
    slope: Number = 0.0


class PrecisionCost(FrozenModel):
    """What it costs to execute every expert in a low precision.

    Attributes
    ----------
    rise, low, high
        Relative rise of perplexity, and its 95 % confidence interval over text pieces.
    divergence
        Mean KL divergence from exact next-token distributions; nats.
    nll_per_row
        Rise of negative log-likelihood for each (token, expert) computed so, by layer; nats. From the upper end of the
        interval, divided among layers as their divergences are when each is alone in this precision.
    """

    precision: LowPrecision
    rise: float
    low: float
    high: float
    divergence: Number
    nll_per_row: tuple[Number, ...]


class TokenPrices(FrozenModel):
    """How much dearer replacing experts is to one token than to others: a small network of router scores by layer.

    Attributes
    ----------
    given, hidden_bias, out, bias
        ``[L, 2E, H]``, ``[L, H]``, ``[L, H]`` and ``[L]`` (`runtime.policy.sensitivity`).
    """

    given: tuple[tuple[tuple[Finite, ...], ...], ...]
    hidden_bias: tuple[tuple[Finite, ...], ...]
    out: tuple[tuple[Finite, ...], ...]
    bias: tuple[Finite, ...]


class Calibration(FrozenModel):
    """A calibration file.

    Attributes
    ----------
    prices
        What replacing each expert costs beside the others, by layer and expert (`runtime.pricing`), mean 1: the unit of
        every setting's shares. Empty where all cost alike.
    token_prices
        What it costs one token beside others; None where all cost alike.
    stand_in
        Part of its score that an expert is weighted by where it stands in for another.
    settings
        By budget.
    precisions
        Each at most once; none where they were not measured.
    """

    format: Literal["expertmesh-calibration-1"] = "expertmesh-calibration-1"
    model: str
    layers: Positive
    experts: Positive
    top_k: Positive
    tokens: Positive
    pieces: Positive
    warmup: Annotated[int, Field(ge=0)]
    situation: Situation
    prices: tuple[tuple[Number, ...], ...] = ()
    token_prices: TokenPrices | None = None
    stand_in: Number = 1.0
    settings: Annotated[tuple[Setting, ...], Field(min_length=1)]
    precisions: tuple[PrecisionCost, ...] = ()

    def setting(self, budget: float) -> Setting | None:
        """Return the setting of the largest budget that is not above `budget`; None if all are."""
        within = [each for each in self.settings if each.budget <= budget * (1 + 1e-9)]
        return max(within, key=lambda each: each.budget, default=None)


def layer_mask(experts: Iterable[int]) -> str:
    """Write which experts of a layer are at hand, as a hexadecimal number with a bit for each.

    >>> layer_mask([0, 3, 4])
    '19'
    """
    return f"{sum(1 << expert for expert in set(experts)):x}"


def load_calibration(path: Path) -> Calibration:
    """Read a calibration file; raises `InvalidFile` with every fault."""
    return load_json(path, Calibration, calibration_faults)


def calibration_faults(calibration: Calibration) -> Iterator[Fault]:
    """Yield what in a well-formed calibration cannot be meant."""
    for number, setting in enumerate(calibration.settings):
        for name in ("shares", "nll", "nll_per_mass"):
            count = len(getattr(setting, name))
            if count != calibration.layers:
                yield Fault(
                    f"settings[{number}].{name}", f"has {count} numbers, the model has {calibration.layers} layers"
                )
    if calibration.prices and len(calibration.prices) != calibration.layers:
        yield Fault("prices", f"has {len(calibration.prices)} layers, the model has {calibration.layers}")
    for layer, prices in enumerate(calibration.prices):
        if len(prices) != calibration.experts:
            yield Fault(f"prices[{layer}]", f"has {len(prices)} numbers, the model has {calibration.experts} experts")
    if calibration.token_prices is not None:
        yield from _token_price_faults(calibration, calibration.token_prices)
    for number, cost in enumerate(calibration.precisions):
        if len(cost.nll_per_row) != calibration.layers:
            yield Fault(
                f"precisions[{number}].nll_per_row",
                f"has {len(cost.nll_per_row)} numbers, the model has {calibration.layers} layers",
            )


def _token_price_faults(calibration: Calibration, prices: TokenPrices) -> Iterator[Fault]:
    for name in ("given", "hidden_bias", "out", "bias"):
        count = len(getattr(prices, name))
        if count != calibration.layers:
            yield Fault(f"token_prices.{name}", f"has {count} layers, the model has {calibration.layers}")
    for layer, given in enumerate(prices.given):
        if len(given) != 2 * calibration.experts:
            said = f"has {len(given)} inputs, expected two for each of the model's {calibration.experts} experts"
            yield Fault(f"token_prices.given[{layer}]", said)
    widths = {len(row) for rows in (*prices.given, prices.hidden_bias, prices.out) for row in rows}
    if len(widths) > 1:
        told = ", ".join(map(str, sorted(widths)))
        yield Fault("token_prices", f"has layers of {told} hidden units, expected as many in each")
