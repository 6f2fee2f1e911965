"""Substitution between router and experts: exact without it, the model's own weights with it, only where it may."""

import math

import numpy as np
import pytest
import torch

from runtime.alone import open_alone
from runtime.dispatch import Dispatcher
from runtime.engine import Segment
from runtime.generation import generate
from runtime.importance import Importance, RouterTaps, Substitution
from runtime.loading import load_trunk
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import DropCold, Exact, MassBudget
from runtime.policy.sensitivity import Sensitivity
from runtime.routers import router_rule, routers_of
from tests.families import FAMILIES, reference, split_model, spread

PROMPT = [5, 6, 7, 8]


def controller(layers, *, budget=10.0, price=1.0, **options):
    return Controller(Allowance(budget=budget, nll=(1.0,) * layers, nll_per_mass=(price,) * layers, **options))


def parts(checkpoint, store, family, policy, *, is_whole=False, **options):
    split = split_model(checkpoint(family), store(family), spread(store(family)))
    account = controller(split.segment.trunk.spec.layers, **options)
    split.segment.importance = Importance(policy, account, is_whole=is_whole)
    return split, account


def tokens(split, count=12, **options):
    never = frozenset()
    return list(generate(split.segment, PROMPT, max_tokens=count, caller=split.caller, stop_ids=never, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_model(checkpoint, family):
    model = reference(checkpoint(family))
    rule, seen = router_rule(model.config), []
    for router in routers_of(model):
        router.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        model(torch.tensor([list(range(20))]))
    for logits, weights, index in seen:
        scores = rule.scores(logits).gather(1, index)
        torch.testing.assert_close(rule.weights(scores, scores.sum(1, keepdim=True)), weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_that_gives_nothing_up_changes_no_bit(checkpoint, store, family):
    exact = split_model(checkpoint(family), store(family), spread(store(family)))
    split, _ = parts(checkpoint, store, family, Exact())
    for segment in (exact.segment, split.segment):
        segment.open("a", 16)
    for step in ([5, 6, 7], [8], [9], [10]):
        ids = torch.tensor(step)
        want, got = (each.segment.step("a", ids, caller=each.caller) for each in (exact, split))
        assert torch.equal(want, got)
    counts, exact_counts = split.segment.counters.snapshot(), exact.segment.counters.snapshot()
    assert not counts.replaced_rows
    assert 0 < counts.remote_rows == exact_counts.remote_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_budget_for_everything_decoding_waits_for_nobody(checkpoint, store, family):
    split, account = parts(checkpoint, store, family, MassBudget((1.0,)), is_whole=True, horizon=1000)
    split.segment.open("a", 32)
    split.segment.step("a", torch.tensor(PROMPT), caller=split.caller)
    assert split.caller.calls, "prompts are exact"
    split.segment.step("a", torch.tensor([9]), caller=split.caller)  # earns something to spend
    split.caller.calls.clear()
    for token in range(10, 20):
        split.segment.step("a", torch.tensor([token]), caller=split.caller)
    assert not split.caller.calls
    counts = split.segment.counters.snapshot()
    assert counts.spared_events
    assert counts.replaced_rows >= counts.spared_events
    assert 0 < counts.lost_mass_share < 1
    assert account.spent == pytest.approx(counts.lost_mass)


def test_evictions_learn_what_the_router_chose_whoever_stood_in(store, monkeypatch):
    spec = store("olmoe").manifest.model
    room = spec.range_bytes(range(spec.num_decoder_layers)) + 64 * (
        spec.num_decoder_layers * spec.kv_bytes_per_token_layer
    )
    segment = open_alone(store("olmoe").path, budget=room + spec.total_expert_bytes // 3, max_tokens=64)
    account = controller(spec.layers, horizon=1000)
    segment.importance = Importance(MassBudget((1.0,)), account, is_whole=False)
    chosen, learnt, run = [], [], Dispatcher.run

    def spy(self, layer, hidden, index, weights):
        chosen.append(sorted(index.flatten().tolist()))
        return run(self, layer, hidden, index, weights)

    monkeypatch.setattr(Dispatcher, "run", spy)
    segment.residency.observe = lambda _, __, expert, ___: learnt.append(sorted(expert.tolist()))
    segment.residency.observe_token = lambda _, experts, __: learnt.append(sorted(experts))
    never = frozenset()
    list(generate(segment, PROMPT, max_tokens=12, stop_ids=never))
    assert segment.counters.snapshot().replaced_rows > 0
    assert learnt == chosen


def test_steps_that_combine_in_order_are_exact(checkpoint, store):
    split, account = parts(checkpoint, store, "olmoe", MassBudget((1.0,)), is_whole=True)
    tokens(split, combine="ordered")
    assert account.tokens == 0


def test_rows_that_nobody_computes_are_left_out(checkpoint, store):
    split, _ = parts(checkpoint, store, "qwen3_moe", DropCold(1.0))
    tokens(split, 6)
    counts = split.segment.counters.snapshot()
    assert counts.rows < counts.events * 2
    assert counts.replaced_rows == counts.events * 2 - counts.rows


def test_a_batch_waits_for_nobody_or_is_exact(checkpoint, store):
    split, _ = parts(checkpoint, store, "mixtral", MassBudget((0.3,)), is_whole=True, horizon=1000)
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        split.segment.open(name, 16)
        split.segment.step(name, torch.tensor([5, 6, 7 + number]), caller=split.caller)
    seen = split.segment.counters.snapshot()
    for step in range(4):
        split.segment.step_batch(names, torch.tensor([step + 9, step + 40, step + 80]), caller=split.caller)
    counts = split.segment.counters.snapshot()
    assert counts.tokens - seen.tokens == 12
    assert counts.remote_calls > seen.remote_calls  # some layers could not do without


def test_sampled_steps_run_both_ways_and_answer_exactly(checkpoint, store):
    exact = split_model(checkpoint("qwen3_moe"), store("qwen3_moe"), spread(store("qwen3_moe")))
    split, account = parts(checkpoint, store, "qwen3_moe", MassBudget((1.0,)), is_whole=True, sample_every=1)
    account.advance(1, range(4), {})
    want = list(generate(exact.segment, PROMPT, max_tokens=6, caller=exact.caller, stop_ids=frozenset()))
    assert tokens(split, 6) == want
    assert account.divergence is not None
    assert account.divergence > 0


def test_probes_answer_and_load_as_if_there_were_none(checkpoint, store):
    answers = []
    for slope in (0.0, 1e-6):
        split, account = parts(
            checkpoint, store, "qwen3_moe", MassBudget((0.2,)), horizon=1000, slope=slope, probe_every=2
        )
        account.advance(1, range(4), {})
        answers.append(tokens(split, 8))
        assert (len(account._probes) >= 2) == (slope > 0)
    assert answers[0] == answers[1]


def test_what_a_dear_token_gives_up_is_charged_as_such(checkpoint, store):
    dear = Sensitivity(np.zeros((4, 16, 1)), np.zeros((4, 1)), np.zeros((4, 1)), np.full(4, math.log(2)))
    split, account = parts(checkpoint, store, "olmoe", MassBudget((1.0,), sensitivity=dear), horizon=1000)
    account.advance(1, range(4), {})
    tokens(split, 8)
    given_up = split.segment.counters.snapshot().lost_mass
    assert given_up > 0
    assert account.spent == pytest.approx(2 * given_up)


def test_a_spent_budget_closes_until_more_is_earned(checkpoint, store):
    split, account = parts(checkpoint, store, "qwen3_moe", MassBudget((1.0,)), is_whole=True, price=100.0, horizon=1)
    tokens(split, 16)
    assert account.balance < 0
    assert account.standing == "spent"
    assert 0 < split.segment.counters.snapshot().spared_events <= 4


def test_taps_touch_no_model_before_they_are_used(checkpoint):
    model = reference(checkpoint("olmoe"))
    taps = RouterTaps(model)
    assert not any(router._forward_hooks for router in routers_of(model))
    seen = []
    with taps.open(lambda _, logits: seen.append(logits)), torch.inference_mode():
        model(torch.tensor([[5, 6]]))
    model(torch.tensor([[5, 6]]))
    assert [tuple(each.shape) for each in seen] == [(2, 8)] * 4


def test_without_logits_the_router_decides(checkpoint):
    rule = router_rule(reference(checkpoint("olmoe")).config)
    index, weights = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]])
    nothing = Substitution(rule, MassBudget((1.0,)), is_whole=False).apply(
        0, index, weights, torch.zeros(8, dtype=bool).numpy()
    )
    assert nothing[0] is index
    assert nothing[1] is weights


def test_the_last_segment_samples_what_its_layers_cause(checkpoint, store):
    split, account = parts(checkpoint, store, "qwen3_moe", MassBudget((1.0,)), is_whole=True, sample_every=1)
    trunks = [
        load_trunk(checkpoint("qwen3_moe"), dtype="float32", first_layer=first, last_layer=last)
        for first, last in ((0, 1), (2, 3))
    ]
    importance = split.segment.importance
    front, back = (
        Segment(trunk, split.segment.residency, split.segment.board, importance=importance) for trunk in trunks
    )
    front.open("a", 16)
    back.open("a", 16)
    hidden = front.step("a", torch.tensor(PROMPT), caller=split.caller)
    back.step("a", hidden, caller=split.caller)
    for token in range(9, 13):
        hidden = front.step("a", torch.tensor([token]), caller=split.caller)
        assert account.divergence is None or token > 9, "layers without a head see no predictions"
        back.step("a", hidden, caller=split.caller)
    assert account.divergence is not None
    assert account.divergence > 0
