"""Placement under a quality budget: the rule is the agents', exchanges keep every limit and leave fewer waits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.feasibility import violations
from planner.objective import nearest
from planner.substitution import Ranked, Sparing
from runtime.policy.routing import MassBudget
from tests.planning import line, model_spec, node, problem_of, topology_of


def events(rng, *, tokens, candidates, experts, top_k):
    ids = np.array([rng.permutation(experts)[:candidates] for _ in range(tokens)], dtype=np.int16)
    scores = -np.sort(-rng.random((tokens, candidates)).astype(np.float32), axis=1)
    return Ranked(ids, scores / scores[:, :top_k].sum(axis=1, keepdims=True), top_k)


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.01, 0.05, 0.3, 10.0]), top_k=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_events_wait_where_agents_would_call(seed, share, top_k):
    rng = np.random.default_rng(seed)
    ranked = events(rng, tokens=30, candidates=int(rng.integers(top_k, 9)), experts=9, top_k=top_k)
    resident = rng.random((3, 9)) < rng.random((3, 1))
    rule = MassBudget((share,), whole=True, weighted=True)
    want = [
        np.mean([
            not here[rule.choose(0, ids.astype(np.int64), mass.astype(np.float64), here, top_k).experts].all()
            for ids, mass in zip(ranked.ids, ranked.mass, strict=True)
        ])
        for here in resident
    ]  # fmt: skip
    assert ranked.waiting(resident, share) == pytest.approx(want, abs=1e-9)


def placed_problem(seed):
    nodes = [node("a", device=5, rate=10), node("b", device=5, rate=5), node("c", device=6)]
    problem = problem_of(topology_of(nodes, line("a", "b", "c")), model_spec(layers=2, experts=4, top_k=2), seed)
    rng = np.random.default_rng(seed)
    placed = np.zeros((problem.num_places, 2, 4), dtype=bool)
    keys = [(layer, expert) for layer in range(2) for expert in range(4)]
    for number, key in enumerate(keys):
        placed[(number % problem.num_places, *key)] = True
    for place, room in enumerate(problem.capacity_bytes // problem.expert_bytes):
        free = [key for key in keys if not placed[(place, *key)]]
        for key in [free[i] for i in rng.permutation(len(free))][: int(room) - int(placed[place].sum())]:
            placed[(place, *key)] = True
    ranked = [
        [events(rng, tokens=40, candidates=4, experts=4, top_k=2) for _ in range(2)] for _ in problem.ingress_node
    ]
    return problem, placed, ranked


@pytest.mark.parametrize("seed", range(6))
def test_exchanges_leave_fewer_waits_and_keep_every_limit(seed):
    problem, placed, ranked = placed_problem(seed)
    assert not violations(problem, placed, nearest(problem, placed, "latency"))
    sparing = Sparing(problem, ranked, 0.05, placed)
    before, told = sparing.cost, sparing.share_waiting
    sparing.descend(lambda: False)
    assert sparing.cost <= before
    assert Sparing(problem, ranked, 0.05, sparing.placed).cost == pytest.approx(sparing.cost)
    assert 0 <= sparing.share_waiting <= 1
    assert (sparing.cost < before) or sparing.share_waiting == told
    assert not violations(problem, sparing.placed, nearest(problem, sparing.placed, "latency"))
    assert (sparing.placed.sum(axis=(1, 2)) == placed.sum(axis=(1, 2))).all()


def test_no_exchange_is_made_without_time():
    problem, placed, ranked = placed_problem(0)
    sparing = Sparing(problem, ranked, 0.05, placed)
    sparing.descend(lambda: True)
    assert (sparing.placed == placed).all()
