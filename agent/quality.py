"""The quality budget of one agent: the plan's or its own, spent as a calibration says that fits what is at hand.

Decides whether the calibration (`settings.calibration_of`) fits: same model; made for what is at hand at this node
now, layer by layer; which of its settings is spent, and why nothing is spent otherwise. What does not fit keeps the
node exact and is said. Must not know sessions.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from agent.routes import AtHand
from agent.settings import Settings, calibration_of
from runtime.calibrate import Prices, policy_of
from runtime.counters import Counts
from runtime.importance import Importance
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import LowMissing, Routing
from schemas.calibration import Calibration, layer_mask, load_calibration
from schemas.files import Fault, InvalidFile
from schemas.messages import QualityUse
from schemas.model import ModelSpec
from schemas.precision import LowPrecision, Precision

log = logging.getLogger(__name__)

SAMPLE_EVERY: Final = 256  # tokens between two steps that are run both ways
_OTHER_PLACEMENT: Final = (
    "the calibration is of another placement ({file}, plan {plan}): layers {layers} differ, so this node is exact; "
    "run agent calibrate --plan PLAN --node NODE and apply the plan again"
)
_OTHER_PRECISION: Final = (
    "{file} was measured with experts in {precision}, this node holds them in {held}, and what that costs leaves "
    "nothing of the budget, or is not known: this node is exact; run agent calibrate --held {held}"
)


@dataclass(frozen=True)
class Spending:
    """What a node may give up now.

    Attributes
    ----------
    importance, calibration
        Policy and account, and where they come from; None for exact execution.
    budget, precision
        That was asked for, and in which experts are held.
    standing, note
        Why nothing is given up where there is a budget.
    """

    importance: Importance | None = None
    calibration: Calibration | None = None
    budget: float = 0.0
    precision: Precision = "checkpoint"
    standing: Literal["off", "uncalibrated", "misplaced"] = "off"
    note: str = ""


class QualityBudget:
    """Finds out what an agent may spend, when it starts and whenever what is at hand changes."""

    def __init__(self, settings: Settings, spec: ModelSpec) -> None:
        self._settings = settings
        self._spec = spec
        self.spending = Spending()

    def require(self) -> None:
        """Raise `InvalidFile` where the calibration of the config's own budget cannot be spent, whatever the plan."""
        quality, file = self._settings.quality, calibration_of(self._settings)
        if file is not None and (quality.budget or quality.calibration):
            _load(file, self._spec, quality.budget or 1.0)

    def activate(
        self, planned: float, at_hand: AtHand, precision: Precision = "checkpoint", *, is_paid: bool = False
    ) -> Spending:
        """Begin with a plan that allows a rise of perplexity of `planned`; returns what may be spent. Modifies.

        Parameters
        ----------
        precision
            In which experts are held here: what that costs is paid from the budget, too.
        is_paid
            The plan's budget is what that has left.
        """
        own, before = self._settings.quality.budget, self.spending
        if own is None and is_paid:
            now = self._spend(planned, at_hand, precision, is_paid=True)
        else:
            now = self._spend(planned if own is None else own, at_hand, precision)
        if now.note:
            log.warning("%s", now.note)
        if before.importance is not None and replace(now, importance=before.importance) == before:
            before.importance.restart()  # the account goes on
            now = before
        self.spending = now
        return now

    def _spend(self, budget: float, at_hand: AtHand, precision: Precision, *, is_paid: bool = False) -> Spending:
        if not budget or not at_hand:
            return Spending()
        file = calibration_of(self._settings)
        if file is None:
            note = f"no calibration for the budget of {budget:.2%}: this node is exact; run agent calibrate"
            return Spending(budget=budget, standing="uncalibrated", note=note)
        try:
            calibration = _load(file, self._spec, budget)
        except (InvalidFile, OSError) as error:
            return Spending(budget=budget, standing="uncalibrated", note=str(error))
        if other := sorted(_misplaced(calibration, at_hand)):
            layers, plan = ", ".join(map(str, other)), calibration.situation.plan[:12]
            note = _OTHER_PLACEMENT.format(file=file.name, plan=plan, layers=layers)
            return Spending(budget=budget, standing="misplaced", note=note)
        if calibration.situation.eviction == "learned" and self._settings.uses is None:
            log.warning(
                "%s was measured with learnt uses: more is loaded here than it says; name them as uses", file.name
            )
        is_paid = is_paid and calibration.situation.precision == "checkpoint"
        left = budget if is_paid else _left(calibration, budget, precision)
        if left is None or calibration.setting(left) is None:
            note = _OTHER_PRECISION.format(file=file.name, precision=calibration.situation.precision, held=precision)
            return Spending(budget=budget, standing="uncalibrated", note=note)
        importance = importance_of(calibration, left, self._settings.low_precision)
        return Spending(importance, calibration, budget, precision)

    def use(self, counts: Counts) -> QualityUse | None:
        """Return what has been spent, for the coordinator; None where nothing was asked for."""
        spending = self.spending
        if spending.importance is not None:
            return quality_use(spending.importance, counts)
        if not spending.budget:
            return None
        return QualityUse(
            budget=spending.budget,
            standing=spending.standing,
            rise=0.0,
            lost_mass=counts.lost_mass_share or 0.0,
            spared_events=counts.spared_events,
            events=counts.events,
            divergence=None,
            note=spending.note,
        )


def importance_of(calibration: Calibration, budget: float, precision: LowPrecision | None = None) -> Importance:
    """Return the policy and the account of the largest setting within a budget; KeyError where there is none.

    Parameters
    ----------
    precision
        In which missing experts may be loaded. What it would cost to have every expert in it is set aside, and other
        experts stand in for what is left; where too little is left for that, missing experts are loaded as they are.
    """
    cost = next((each for each in calibration.precisions if each.precision == precision), None)
    if precision is not None and cost is None:
        log.warning("the calibration does not tell what %s costs: it is not used; run agent calibrate again", precision)
    set_aside = max(cost.high, 0.0) if cost is not None else 0.0
    setting = calibration.setting((1 + budget) / (1 + set_aside) - 1)
    if cost is not None and setting is None:
        log.warning("a budget of %.2f%% has no room for %s (%.2f%%)", 100 * budget, precision, 100 * set_aside)
        return importance_of(calibration, budget)
    if setting is None:
        raise KeyError(budget)
    is_whole = calibration.situation.is_whole
    low = cost.nll_per_row if cost is not None else (0.0,) * calibration.layers
    allowance = Allowance(
        setting.budget if cost is None else (1 + setting.budget) * (1 + set_aside) - 1,
        tuple(nll + calibration.top_k * row for nll, row in zip(setting.nll, low, strict=True)),
        setting.nll_per_mass,
        nll_per_low_row=low,
        divergence=setting.divergence + (cost.divergence if cost is not None else 0.0),
        warmup=calibration.warmup,
        sample_every=SAMPLE_EVERY,
        slope=setting.slope,
    )
    policy: Routing = policy_of(
        setting.shares, is_whole=is_whole, prices=Prices.of(calibration), stand_in=calibration.stand_in
    )
    if cost is not None:
        policy = LowMissing(policy)
    return Importance(policy, Controller(allowance), is_whole=is_whole, precision=precision if cost else None)


def _load(file: Path, spec: ModelSpec, budget: float) -> Calibration:
    """Read a calibration; raises `InvalidFile` where it is of another model, or has no setting within the budget."""
    calibration = load_calibration(file)
    if faults := list(_faults(calibration, spec, budget)):
        raise InvalidFile(file, faults)
    return calibration


def _faults(calibration: Calibration, spec: ModelSpec, budget: float) -> Iterator[Fault]:
    shape = (calibration.layers, calibration.experts, calibration.top_k)
    if calibration.model != spec.id or shape != (spec.layers, spec.experts, spec.top_k):
        shown = f"{calibration.model}, {shape[0]} layers × {shape[1]} experts, top-{shape[2]}"
        yield Fault("model", f"is of {shown}; this agent runs {spec.id}: calibrate that")
    if calibration.setting(budget) is None:
        least = min(each.budget for each in calibration.settings)
        yield Fault("settings", f"none is within {budget:.2%}; the least is {least:.2%}")


def _left(calibration: Calibration, budget: float, precision: Precision) -> float | None:
    """Return what of a budget is left beside what holding every expert in a precision costs; None: nobody knows.

    A calibration that was made in it has paid already; one in the checkpoint's may tell what it costs.
    """
    if calibration.situation.precision == precision:
        return budget
    cost = next((each for each in calibration.precisions if each.precision == precision), None)
    if cost is None or calibration.situation.precision != "checkpoint":
        return None
    return (1 + budget) / (1 + max(cost.high, 0.0)) - 1


def _misplaced(calibration: Calibration, at_hand: AtHand) -> Iterator[int]:
    """Yield the layers of this node for which the calibration was made with other experts at hand.

    One that was made with a cache, or says nothing of what was at hand, fits wherever its model does.
    """
    placement = calibration.situation.placement
    for layer, experts in at_hand.items():
        if layer < len(placement) and placement[layer] != layer_mask(experts):
            yield layer


def quality_use(importance: Importance, counts: Counts) -> QualityUse:
    """Return what has been spent, for the coordinator."""
    account = importance.controller
    return QualityUse(
        budget=account.allowance.budget,
        standing=account.standing,
        rise=account.rise,
        lost_mass=counts.lost_mass_share or 0.0,
        spared_events=counts.spared_events,
        events=counts.events,
        divergence=account.divergence,
    )
