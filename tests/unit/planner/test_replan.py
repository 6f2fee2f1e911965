"""Replays of workloads: what is decided when they shift, drift, or only fluctuate."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner.demand import activation_share
from planner.inputs import load_inputs
from planner.moved import Arranged, migration_seconds, new_copies
from planner.objective import judge, nearest
from planner.problem import build_problem
from planner.replan import (
    Arrangement,
    MovingRules,
    dancemoe_adopts,
    decide,
    look,
    saving,
    token_waits,
    watch,
)
from planner.solvers.base import SolveLimits, ignore
from planner.solvers.strategies.dancemoe import solve_dancemoe
from planner.statistics import Detector, Sensitivity, alarm_threshold, count_events, detector_of, shift_score
from tests.small_clusters import make_model, make_topology, popularity

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "topology.yaml"
BATCH, TEXT = 256, 32


def texts(rng, share, tokens, top_k=2):
    """Events of texts, each of which leans to some experts of its own: tokens of a text are alike, as real ones are."""
    parts = []
    for _ in range(tokens // TEXT):
        leaning = share * rng.gamma(2.0, 0.5, size=share.shape)
        noise = rng.gumbel(size=(TEXT, *share.shape))
        parts.append(np.argsort(-(np.log(leaning)[None] + noise), axis=2)[:, :, :top_k])
    return np.concatenate(parts).astype(np.int16)


def pieces(rng, events, tokens):
    """Events of a serving cluster: pieces of a recorded trace from anywhere."""
    starts = rng.integers(len(events) - TEXT, size=tokens // TEXT)
    return np.concatenate([events[start : start + TEXT] for start in starts])


def place(problem):
    result = solve_dancemoe(problem, objective="additive-latency", limits=SolveLimits(), report=ignore)
    return Arrangement(result.placed, nearest(problem, result.placed, "additive-latency"))


def replay(problem, stream, now, rules=None):
    """Run the whole loop over a stream of batches; return (batch, decision) of every look."""
    first, *rest = stream
    watcher = watch(first, problem.experts)
    looks = []
    for number, batch in enumerate(rest, start=1):
        watcher = watcher.after(batch)
        if watcher.ready:
            decision, now, watcher = look(watcher, problem, now, place, rules or MovingRules())
            looks.append((number, decision))
    return looks


def moves(looks):
    return [number for number, decision in looks if decision.move]


def synthetic(seed):
    """Three ingresses, each with a workload of its own, and a fourth workload that may come."""
    rng = np.random.default_rng(seed)
    model = make_model(layers=6, experts=16, top_k=2)
    topology = make_topology([25, 45, 75], [20.0, 10.0, 30.0])
    shares = [popularity(rng, 6, 16) for _ in range(4)]
    problem = build_problem(topology, model, [texts(rng, share, 4096) for share in shares[:3]])
    return rng, problem, shares


@pytest.mark.parametrize("seed", range(4))
def test_a_workload_that_only_fluctuates_moves_nothing(seed):
    rng, problem, shares = synthetic(seed)
    stream = [tuple(texts(rng, share, BATCH) for share in shares[:3]) for _ in range(120)]
    assert moves(replay(problem, stream, place(problem))) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_workload_that_shifts_moves_once(seed):
    rng, problem, shares = synthetic(seed)
    before = [tuple(texts(rng, share, BATCH) for share in shares[:3]) for _ in range(40)]
    after = [tuple(texts(rng, share, BATCH) for share in (shares[3], *shares[1:3])) for _ in range(80)]
    at = moves(replay(problem, before + after, place(problem)))
    assert len(at) == 1
    assert 40 < at[0] <= 52, "found and judged within twelve batches"


def test_workloads_that_change_places_on_the_quickstart_move_once_each_time():
    inputs = load_inputs(QUICKSTART)
    problem = inputs.problem()
    traces = problem.events
    rng = np.random.default_rng(0)
    usual = [tuple(pieces(rng, events, BATCH) for events in traces) for _ in range(40)]
    swapped = [tuple(pieces(rng, traces[other], BATCH) for other in (2, 1, 0)) for _ in range(40)]
    back = [tuple(pieces(rng, events, BATCH) for events in traces) for _ in range(40)]
    at = moves(replay(problem, usual + swapped + back, place(problem)))
    assert len(at) == 2
    assert 40 < at[0] <= 55
    assert 80 < at[1] <= 95


def test_a_first_placement_that_suits_nobody_is_left_after_the_first_look():
    rng, problem, shares = synthetic(0)
    foreign = problem.judged_on([texts(rng, shares[3], 2048) for _ in range(3)])
    stream = [tuple(texts(rng, share, BATCH) for share in shares[:3]) for _ in range(60)]
    at = moves(replay(problem, stream, place(foreign)))
    assert len(at) == 1
    assert at[0] <= 16


def test_saving_is_weighed_against_moving():
    rng, problem, shares = synthetic(1)
    foreign = place(problem.judged_on([texts(rng, shares[3], 2048) for _ in range(3)]))
    good = place(problem)
    batches = [tuple(texts(rng, share, BATCH) for share in shares[:3]) for _ in range(12)]

    def asked(**rules):
        return decide(problem, now=foreign, then=good, judged_on=batches, rules=MovingRules(**rules))

    assert asked().move
    assert not asked(horizon_s=0.5).move, "what is saved in half a second is less than moving costs"
    assert not asked(least_gain=0.99).move
    few = asked(max_bytes=problem.expert_bytes)
    assert not few.move
    assert "limit" in few.reason
    unsure = asked(surety=1e6)
    assert (unsure.move, unsure.uncertain) == (False, True)
    back = decide(problem, now=good, then=foreign, judged_on=batches, rules=MovingRules())
    assert not back.move
    assert back.benefit_s < 0


def test_few_batches_are_never_sure():
    _, problem, _ = synthetic(2)
    here = place(problem)
    saved, error, waited = saving(problem, here, here, [problem.events] * 3)
    assert (saved, error) == (0.0, np.inf)
    assert waited > 0


def test_waits_are_the_judgements():
    _, problem, _ = synthetic(0)
    routing = place(problem).routing
    means = [waits.mean() for waits in token_waits(problem, routing, problem.events)]
    np.testing.assert_allclose(means, judge(problem, routing).wait_s)


def test_what_a_path_saves_counts_beside_waits():
    """A trunk where the experts are: neither the hops there nor the compute of its node are left out."""
    _, problem, _ = synthetic(0)
    placed = np.zeros((problem.num_places, problem.layers, problem.experts), dtype=bool)
    placed[problem.place_node == 2] = True
    there = Arrangement(placed, nearest(problem, placed, "latency"))
    moved = there._replace(trunk=np.full_like(problem.trunk_node, 2))
    at_node = replace(problem, trunk_node=moved.trunk)
    saved, _, taken = saving(problem, there, moved, [problem.events] * 4)
    assert taken == pytest.approx(problem.tokens_per_s @ judge(problem, there.routing).latency_s)
    assert saved == pytest.approx(taken - problem.tokens_per_s @ judge(at_node, there.routing).latency_s)
    assert decide(problem, now=there, then=moved, judged_on=[problem.events] * 4, rules=MovingRules()).move


def test_moving_costs_its_new_copies_over_their_best_links():
    _, problem, _ = synthetic(0)
    held = np.zeros((3, 6, 16), dtype=bool)
    held[0] = True
    wanted = held.copy()
    wanted[1, 0, :2] = True
    assert new_copies(problem, held, wanted) == [(0, 1), (1, 1)]
    assert migration_seconds(problem, Arranged(held), Arranged(wanted)) == pytest.approx(2 * problem.transfer_s[0, 1])
    assert migration_seconds(problem, Arranged(wanted), Arranged(held)) == 0.0


def test_dancemoe_takes_estimates_at_their_word():
    assert dancemoe_adopts(10.0, 8.0, 1.0)
    assert not dancemoe_adopts(10.0, 9.0, 1.0)


def test_old_activations_weigh_half_after_the_half_life():
    first = count_events(np.zeros((100, 1, 1), np.int16), 2)
    later = first.after(count_events(np.ones((100, 1, 1), np.int16), 2), half_life=100)
    np.testing.assert_allclose(later.counts, [[50.0, 100.0]])
    np.testing.assert_allclose(later.share, [[1 / 3, 2 / 3]])


def test_scores_of_independent_tokens_are_about_one_and_of_others_far_above():
    rng = np.random.default_rng(0)
    one, other = popularity(rng, 4, 16), popularity(rng, 4, 16)

    def draw(share, tokens):
        return np.argsort(-(np.log(share) + rng.gumbel(size=(tokens, *share.shape))), axis=2)[:, :, :2].astype(np.int16)

    usual = count_events(draw(one, 4000), 16)
    assert 0.5 < shift_score(count_events(draw(one, 256), 16), usual) < 1.5
    assert shift_score(count_events(draw(other, 256), 16), usual) > 10
    np.testing.assert_allclose(usual.share, activation_share(draw(one, 4000), 16), atol=0.05)


def test_thresholds_rise_with_rarer_alarms_and_match_tables():
    assert alarm_threshold(1 / 465, 0.5) == pytest.approx(4.2, abs=0.25)  # ARL 465 at h = 4.77, two-sided tables: 930
    assert alarm_threshold(1e-5, 1.0) > alarm_threshold(1e-3, 1.0)


def test_false_alarms_are_rare():
    """With texts that lean their own way, over two thousand batches of one workload."""
    rng = np.random.default_rng(3)
    share = popularity(rng, 4, 16)
    sensitivity = Sensitivity()
    detector = detector_of(count_events(texts(rng, share, BATCH), 16))
    alarms = 0
    for _ in range(2000):
        detector = detector.after(count_events(texts(rng, share, BATCH), 16), sensitivity)
        if detector.has_changed(sensitivity):
            alarms += 1
            detector = Detector(detector.learnt)
    assert alarms <= 2
