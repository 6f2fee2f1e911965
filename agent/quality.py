"""The quality budget of one agent: the calibration file its config names, as a policy and an account.

Decides which of the calibration's settings is spent and refuses one of another model. Must not know sessions.
"""

from pathlib import Path
from typing import Final

from agent.settings import Settings
from runtime.calibrate import policy_of
from runtime.counters import Counts
from runtime.importance import Importance
from runtime.policy.quality import Allowance, Controller
from schemas.calibration import Calibration, load_calibration
from schemas.files import Fault, InvalidFile
from schemas.messages import QualityUse
from schemas.model import ModelSpec

SAMPLE_EVERY: Final = 256  # tokens between two steps that are run both ways


def load_importance(settings: Settings, spec: ModelSpec) -> Importance | None:
    """Return what may be given up; None for exact execution.

    Raises
    ------
    InvalidFile
        The calibration is of another model, or has no setting within the budget.
    """
    quality = settings.quality
    if not quality.budget or quality.calibration is None:
        return None
    path = Path(quality.calibration)
    calibration = load_calibration(path)
    if faults := _faults(calibration, spec, quality.budget):
        raise InvalidFile(path, faults)
    return importance_of(calibration, quality.budget)


def importance_of(calibration: Calibration, budget: float) -> Importance:
    """Return the policy and the account of the largest setting within a budget; KeyError where there is none."""
    setting = calibration.setting(budget)
    if setting is None:
        raise KeyError(budget)
    is_whole = calibration.situation.is_whole
    allowance = Allowance(
        setting.budget,
        setting.nll,
        setting.nll_per_mass,
        divergence=setting.divergence,
        warmup=calibration.warmup,
        sample_every=SAMPLE_EVERY,
    )
    return Importance(policy_of(setting.shares, is_whole=is_whole), Controller(allowance), is_whole=is_whole)


def _faults(calibration: Calibration, spec: ModelSpec, budget: float) -> list[Fault]:
    shape = (calibration.layers, calibration.experts, calibration.top_k)
    faults = []
    if calibration.model != spec.id or shape != (spec.layers, spec.experts, spec.top_k):
        shown = f"{calibration.model}, {shape[0]} layers × {shape[1]} experts, top-{shape[2]}"
        faults.append(Fault("model", f"is of {shown}; this agent runs {spec.id}: calibrate that"))
    if calibration.setting(budget) is None:
        least = min(each.budget for each in calibration.settings)
        faults.append(Fault("settings", f"none is within {budget:.2%}; the least is {least:.2%}"))
    return faults


def quality_use(importance: Importance | None, counts: Counts) -> QualityUse | None:
    """Return what has been spent, for the coordinator."""
    if importance is None:
        return None
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
