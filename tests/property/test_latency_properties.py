"""The latency solver against every placement there is, on problems small enough to enumerate them."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.solvers.latency import LatencyInstance, Limits, Schedule, latency_instance, solve_latency, waits
from planner.solvers.latency.holders import Repair, any_placement, holder_sets
from planner.solvers.latency.instance import Bools
from planner.solvers.latency.paths import relink
from planner.solvers.latency.patterns import layers_of
from planner.solvers.latency.polish import LayerTable, Polish
from planner.solvers.latency.pricing import least_cost, set_costs
from planner.solvers.latency.solve import violations

QUICK = Schedule(dual_steps=60, rounds=2, select_steps=200, more_dual_steps=10)


@st.composite
def instances(draw: st.DrawFn, max_layers: int = 2, max_experts: int = 3) -> LatencyInstance:
    """Tiny problems: uneven memory, several cost levels, tiers, pins and bans."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, experts = draw(st.integers(1, max_layers)), draw(st.integers(2, max_experts))
    nodes = draw(st.integers(1, 3))
    node_of_place = np.concatenate([np.arange(nodes), rng.integers(0, nodes, draw(st.integers(0, 1)))])
    ingresses = draw(st.integers(1, 2))
    chosen = draw(st.integers(1, experts))
    events = tuple(
        np.argsort(rng.random((draw(st.integers(1, 12)), layers, experts)), axis=2)[:, :, :chosen].astype(np.int16)
        for _ in range(ingresses)
    )
    distinct = draw(st.integers(1, 4))
    cost = rng.integers(0, distinct, (ingresses, layers, len(node_of_place))) * 0.01
    shape = (len(node_of_place), layers, experts)
    allowed = rng.random(shape) < draw(st.sampled_from([1.0, 0.8]))
    forced = allowed & (rng.random(shape) < draw(st.sampled_from([0.0, 0.1])))
    for node in range(nodes):  # one place per node
        same = np.flatnonzero(node_of_place == node)
        forced[same[1:]] &= ~forced[same[0]]
    return latency_instance(
        events,
        rng.uniform(0.1, 3.0, ingresses),
        cost,
        rng.integers(0, layers * experts + 1, len(node_of_place)),
        node_of_place=node_of_place,
        num_experts=experts,
        required=draw(st.sampled_from([1, 1, 1, 2])),
        allowed=allowed,
        forced=forced,
    )


def optimum(instance: LatencyInstance) -> float | None:
    """Least objective over every feasible placement, by layers: waits by slots used, then every combination."""
    per_layer = []
    for layer, data in enumerate(layers_of(instance)):
        best: dict[tuple[int, ...], float] = {}
        for choice in product(*(_choices(instance, layer, e) for e in range(instance.num_experts))):
            hold = np.array(choice)
            key, wait = tuple(int(n) for n in hold.sum(axis=0)), data.wait(hold)
            best[key] = min(best.get(key, np.inf), wait)
        per_layer.append(best)
    least = None
    for combination in product(*per_layer):
        if (np.sum(combination, axis=0) <= instance.capacity).all():
            total = sum(best[key] for best, key in zip(per_layer, combination, strict=True))
            least = total if least is None else min(least, total)
    return least


def _choices(instance: LatencyInstance, layer: int, expert: int) -> list[Bools]:
    sets = holder_sets(instance).holds
    may, must = instance.allowed[:, layer, expert], instance.forced[:, layer, expert]
    return [held for held in sets if not (held & ~may).any() and not (must & ~held).any()]


@settings(max_examples=120, deadline=None)
@given(instances())
def test_bound_and_incumbent_enclose_the_optimum(instance: LatencyInstance) -> None:
    best, outcome = optimum(instance), solve_latency(instance, schedule=QUICK)
    if best is None:
        assert outcome.placed is None
        assert outcome.stop_reason == "infeasible"
        return
    assert outcome.placed is not None
    assert outcome.objective is not None
    assert violations(instance, outcome.placed) == []
    assert outcome.objective == pytest.approx(float(instance.tokens_per_s @ waits(instance, outcome.placed)))
    assert outcome.bound <= best + 1e-9
    assert outcome.objective >= best - 1e-9


@settings(max_examples=60, deadline=None)
@given(instances(), st.randoms())
def test_names_of_nodes_and_experts_do_not_matter(instance: LatencyInstance, random) -> None:
    places, experts = list(range(instance.num_places)), list(range(instance.num_experts))
    random.shuffle(places)
    random.shuffle(experts)
    renamed = np.argsort(experts).astype(np.int16)
    other = latency_instance(
        tuple(renamed[chosen] for chosen in instance.events),
        instance.tokens_per_s,
        instance.cost_s[:, :, places],
        instance.capacity[places],
        node_of_place=instance.node_of_place[places],
        num_experts=instance.num_experts,
        required=instance.required,
        allowed=instance.allowed[places][:, :, experts],
        forced=instance.forced[places][:, :, experts],
    )
    assert optimum(other) == pytest.approx(optimum(instance))
    if (placed := any_placement(instance)) is not None:
        assert waits(other, placed[places][:, :, experts]) == pytest.approx(waits(instance, placed))
        one, two = solve_latency(instance, schedule=QUICK), solve_latency(other, schedule=QUICK)
        assert two.bound == pytest.approx(one.bound, abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(instances(max_layers=3, max_experts=6), st.integers(0, 2**32 - 1))
def test_tables_follow_changes(instance: LatencyInstance, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = layers_of(instance)[0]
    hold = rng.random((instance.num_experts, instance.num_places)) < 0.5
    table = LayerTable(layer, hold)
    for _ in range(6):
        expert = int(rng.integers(instance.num_experts))
        table.change(expert, rng.random(instance.num_places) < 0.5)
    fresh = LayerTable(layer, table.hold)
    assert table.wait == pytest.approx(layer.wait(table.hold))
    for kept, anew in zip(table.scores(), fresh.scores(), strict=True):
        np.testing.assert_allclose(kept, anew, atol=1e-12)
    np.testing.assert_array_equal(table.missing, fresh.missing)


@settings(max_examples=100, deadline=None)
@given(instances(max_layers=1, max_experts=5), st.integers(0, 2**32 - 1))
def test_scores_are_what_one_change_does(instance: LatencyInstance, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = layers_of(instance)[0]
    hold = rng.random((instance.num_experts, instance.num_places)) < 0.6
    gain, loss = LayerTable(layer, hold).scores()
    for expert, place in np.ndindex(hold.shape):
        changed = hold.copy()
        changed[expert, place] = ~hold[expert, place]
        difference = layer.wait(changed) - layer.wait(hold)
        assert loss[expert, place] - gain[expert, place] == pytest.approx(difference, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(instances(max_layers=1, max_experts=6), st.integers(0, 2**32 - 1))
def test_waits_along_a_path_are_those_of_its_placements(instance: LatencyInstance, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = layers_of(instance)[0]
    start, end = (rng.random((instance.num_experts, instance.num_places)) < 0.5 for _ in range(2))
    path = relink(layer, start, end, rng.random(instance.num_places) * 0.01)
    for position, hold in path.walk():
        assert path.wait[position] == pytest.approx(layer.wait(hold), abs=1e-9)
        np.testing.assert_array_equal(hold, path.at(position))
    np.testing.assert_array_equal(path.at(len(path.order)), end)


@settings(max_examples=100, deadline=None)
@given(instances(max_layers=1, max_experts=6), st.integers(0, 2**32 - 1))
def test_dual_ascent_is_below_every_holder_set(instance: LatencyInstance, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = layers_of(instance)[0].levels
    split = rng.random((levels.num_questions * instance.num_ingresses, instance.num_experts))
    price = rng.random(instance.num_places)
    sets = holder_sets(instance)
    if len(sets.holds):
        exact = (split.T @ set_costs(instance, 0, levels, sets).misses.T + sets.holds @ price).min(axis=1)
        assert (least_cost(split, price, levels) <= exact + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(instances(max_layers=2, max_experts=5))
def test_polish_stays_feasible_and_never_gets_worse(instance: LatencyInstance) -> None:
    if (placed := any_placement(instance)) is None:
        return
    layers = layers_of(instance)
    repairs = [Repair(instance, layer) for layer in range(len(layers))]
    polish = Polish(instance, layers, repairs, placed.transpose(1, 2, 0))
    before = polish.wait
    polish.run(lambda: False)
    after = polish.hold.transpose(2, 0, 1)
    assert violations(instance, after) == []
    assert polish.wait <= before + 1e-12
    assert polish.wait == pytest.approx(float(instance.tokens_per_s @ waits(instance, after)))


@settings(max_examples=20, deadline=None)
@given(instances())
def test_the_seed_decides(instance: LatencyInstance) -> None:
    one, two = (solve_latency(instance, schedule=QUICK, limits=Limits(time_s=1e6, seed=3)) for _ in range(2))
    assert (one.objective, one.bound) == (two.objective, two.bound)
    if one.placed is not None:
        np.testing.assert_array_equal(one.placed, two.placed)
