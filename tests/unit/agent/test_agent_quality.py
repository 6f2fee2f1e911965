"""An agent's quality budget: which calibration it takes, and what it reports."""

import math

import numpy as np
import pytest

from agent.quality import QualityBudget, importance_of, quality_use
from agent.settings import load_settings
from runtime.counters import Counts
from schemas.calibration import Calibration, PrecisionCost, Setting, Situation
from schemas.files import InvalidFile
from schemas.model import ModelSpec

SPEC = ModelSpec(id="m", layers=2, experts=4, top_k=2, hidden_size=8, itemsize=4, expert_bytes=64)
CONFIG = """
node: n1
model: model
data: run
memory: {device: 2 MiB, host: 0 B, disk: 0 B}
quality: {budget: BUDGET, calibration: c.json}
"""


def setting(budget, shares=(0.01, 0.02)):
    parts = (math.log1p(budget) / 2,) * 2
    return Setting(
        budget=budget, shares=shares, nll=parts, nll_per_mass=(0.1, 0.1), rise=budget / 2, low=0.0, high=budget,
        divergence=0.02, waits_share=0.5,
    )  # fmt: skip


def calibration(**changes):
    found = Calibration(
        model="m", layers=2, experts=4, top_k=2, tokens=2048, pieces=8, warmup=3,
        situation=Situation(node="n1", is_whole=True), settings=(setting(0.005), setting(0.01, (0.02, 0.04))),
    )  # fmt: skip
    return found.model_copy(update=changes)


HERE = {0: [0, 1], 1: [3]}


def agent(tmp_path, quality):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "agent.yaml").write_text(CONFIG.replace("quality: {budget: BUDGET, calibration: c.json}", quality))
    return QualityBudget(load_settings(tmp_path / "agent.yaml"), SPEC)


def load(tmp_path, budget, found):
    (tmp_path / "c.json").write_text(found.model_dump_json())
    quality = agent(tmp_path, f"quality: {{budget: {budget}, calibration: c.json}}")
    quality.require()
    return quality.activate(0.0, HERE).importance


def placed(*masks):
    return calibration(situation=Situation(node="n1", plan="ab" * 32, placement=masks, is_whole=True))


def test_the_largest_setting_within_the_budget_is_spent(tmp_path):
    account = load(tmp_path, "0.7 %", calibration()).controller
    assert account.allowance.budget == pytest.approx(0.005)
    assert account.standing == "warming"
    assert account.allowance.divergence == 0.02


def test_a_calibration_with_learnt_uses_wants_them_named(tmp_path, caplog):
    learnt = calibration(situation=Situation(capacity=2, eviction="learned"))
    assert load(tmp_path, "0.7 %", learnt) is not None
    assert "c.json was measured with learnt uses" in caplog.text


INT8 = PrecisionCost(precision="int8", rise=0.001, low=0.0, high=0.002, divergence=0.001, nll_per_row=(0.0, 0.0))


def test_experts_that_are_held_in_low_precision_are_paid_from_the_budget(tmp_path):
    def budget_left(found, **how):
        (tmp_path / "c.json").write_text(found.model_dump_json())
        quality = agent(tmp_path, "quality: {calibration: c.json}")
        account = quality.activate(0.01, HERE, "int8", **how).importance
        return account.controller.allowance.budget if account else quality.spending.note

    told, made = calibration(precisions=(INT8,)), calibration(situation=Situation(capacity=2, precision="int8"))
    assert budget_left(told) == pytest.approx(0.005), "its setting of 1 % would spend .2 % too much"
    assert budget_left(told, is_paid=True) == pytest.approx(0.01), "the plan's budget is what is left"
    assert budget_left(made) == pytest.approx(0.01), "which it was measured with"
    assert "c.json was measured with experts in checkpoint, this node holds them in int8" in budget_left(calibration())
    dear = told.model_copy(update={"precisions": (INT8.model_copy(update={"high": 0.02}),)})
    assert "run agent calibrate --held int8" in budget_left(dear)


def test_what_is_held_otherwise_than_before_begins_a_new_account(tmp_path):
    (tmp_path / "c.json").write_text(calibration(precisions=(INT8,)).model_dump_json())
    quality = agent(tmp_path, "quality: {budget: 0.8 %, calibration: c.json}")
    first = quality.activate(0.0, HERE).importance
    assert quality.activate(0.0, HERE).importance is first
    changed = quality.activate(0.0, HERE, "int8").importance
    assert changed is not None
    assert changed is not first


def test_nothing_is_given_up_by_default(tmp_path):
    assert load(tmp_path, "0 %", calibration()) is None
    quality = agent(tmp_path, "")
    assert quality.activate(0.0, HERE).importance is None
    assert quality.use(counts()) is None
    assert quality.activate(0.01, {}).importance is None, "a node that runs no layers chooses no experts"


def counts():
    return Counts(np.zeros((2, 4), dtype=np.int64))


@pytest.mark.parametrize("name", ["calibration-n1.json", "calibration.json"])
def test_the_plans_budget_is_spent_by_what_lies_beside_the_model(tmp_path, name):
    quality = agent(tmp_path, "")
    quality.require()
    assert quality.activate(0.005, HERE).standing == "uncalibrated"
    use = quality.use(counts())
    assert (use.budget, use.standing) == (0.005, "uncalibrated")
    assert "run agent calibrate" in use.note
    (tmp_path / "model" / name).write_text(calibration().model_dump_json())
    assert quality.activate(0.005, HERE).importance.controller.allowance.budget == pytest.approx(0.005)
    assert quality.use(counts()).note == ""


def test_the_configs_word_is_stronger_than_the_plans(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "calibration.json").write_text(calibration().model_dump_json())
    assert agent(tmp_path, "quality: {budget: 0 %}").activate(0.01, HERE).importance is None
    assert agent(tmp_path, "quality: {budget: 1 %}").activate(
        0.005, HERE
    ).importance.controller.allowance.budget == pytest.approx(0.01)


def test_a_budget_of_ones_own_without_a_calibration_is_refused(tmp_path):
    with pytest.raises(InvalidFile, match=r"\.yaml: line \d+, quality\.budget: needs a calibration: name a file"):
        agent(tmp_path, "quality: {budget: 1 %}")


def test_a_calibration_belongs_to_what_was_at_hand(tmp_path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "calibration.json"
    quality = agent(tmp_path, "")
    file.write_text(placed("3", "8").model_dump_json())
    kept = quality.activate(0.01, HERE).importance
    assert kept is not None
    kept.controller.advance(5, range(2), {})
    assert quality.activate(0.01, HERE).importance is kept, "the account goes on where nothing has changed"
    assert quality.activate(0.01, {0: [1], 1: [3]}).standing == "misplaced"
    assert "layers 0 differ" in quality.use(counts()).note
    file.write_text(placed("2", "ffff").model_dump_json())
    assert quality.activate(0.01, {0: [1]}).importance is not None, "layers that others run are others' business"


def test_a_damaged_calibration_keeps_a_node_exact(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "calibration.json").write_text("{}")
    quality = agent(tmp_path, "")
    assert quality.activate(0.01, HERE).importance is None
    assert "calibration.json" in quality.use(counts()).note


@pytest.mark.parametrize(
    ("changes", "budget", "said"),
    [
        ({"model": "other"}, "1 %", "model: is of other, 2 layers × 4 experts, top-2; this agent runs m"),
        ({"experts": 8}, "1 %", "8 experts"),
        ({}, "0.1 %", "settings: none is within 0.10%; the least is 0.50%"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, budget, said):
    with pytest.raises(InvalidFile, match=r".*") as caught:
        load(tmp_path, budget, calibration(**changes))
    assert said in str(caught.value)


def low_cost(**changes):
    given = {
        "precision": "int8",
        "rise": 0.001,
        "low": -0.001,
        "high": 0.003,
        "divergence": 0.004,
        "nll_per_row": (1e-4, 5e-4),
    }
    return PrecisionCost(**{**given, **changes})


def test_what_low_precision_may_cost_is_set_aside_from_the_budget(caplog):
    found = calibration(precisions=(low_cost(),))
    account = importance_of(found, 0.01, "int8").controller
    assert account.allowance.budget == pytest.approx(1.005 * 1.003 - 1)  # the setting of .5 %, and int8
    plain = importance_of(found, 0.006).controller
    assert account.allowance.nll == pytest.approx(
        [a + 2 * b for a, b in zip(plain.allowance.nll, (1e-4, 5e-4), strict=True)]
    )
    account.advance(4, range(2), {}, {})
    account.advance(1, range(2), {0: 0.01}, {1: 3})
    assert account.spent == pytest.approx(0.01 * account.allowance.nll_per_mass[0] + 3 * 5e-4)
    assert not caplog.text
    exact = importance_of(found, 0.006, "int8").controller
    assert exact.allowance.budget == 0.005
    assert "a budget of 0.60% has no room for int8 (0.30%)" in caplog.text
    importance_of(found, 0.01, "int4")
    assert "does not tell what int4 costs" in caplog.text


def test_what_was_spent_is_reported():
    importance = importance_of(calibration(), 0.01)
    importance.controller.advance(4, range(2), {})
    importance.controller.advance(1, range(2), {0: 0.05})
    counts = Counts(np.zeros((2, 4), dtype=np.int64), events=10, spared_events=1, lost_mass=0.05)
    use = quality_use(importance, counts)
    assert (use.standing, use.events, use.spared_events) == ("open", 10, 1)
    assert use.budget == pytest.approx(0.01)
    assert use.lost_mass == pytest.approx(0.005)
    assert use.rise == pytest.approx(math.expm1(0.005 / 5), rel=1e-3)
    with pytest.raises(KeyError):
        importance_of(calibration(), 0.001)
