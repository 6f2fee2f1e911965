"""Whatever placement there is and whatever is wanted: every prefix of the stages is safe, and they arrive."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.errors import UnsafePlan
from planner.migration import Ground, plan_stages

often = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def random_placement(rng, ground, *, full):
    """A covering placement that fits, or None: experts dealt to random places, then duplicates."""
    held = np.zeros(ground.allowed.shape, dtype=bool)
    for expert in rng.permutation(held.shape[1]):
        room = np.flatnonzero(ground.allowed[:, expert] & (held.sum(axis=1) < ground.slots))
        if not room.size:
            return None
        held[rng.choice(room), expert] = True
    for place in rng.permutation(len(held)):
        for expert in rng.permutation(held.shape[1]):
            here = held[ground.place_node == ground.place_node[place], expert].any()
            fits = held[place].sum() < ground.slots[place] and ground.allowed[place, expert]
            if fits and not here and rng.random() < full:
                held[place, expert] = True
    return held


@st.composite
def migrations(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    experts = draw(st.integers(1, 8))
    place_node = np.sort(np.array(draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))))
    slots = np.array(draw(st.lists(st.integers(0, 5), min_size=len(place_node), max_size=len(place_node))))
    allowed = rng.random((len(place_node), experts)) < draw(st.sampled_from([1.0, 1.0, 0.8]))
    ground = Ground(place_node, slots, allowed)
    full = draw(st.sampled_from([0.0, 0.5, 1.0]))
    current, target = (random_placement(rng, ground, full=full) for _ in range(2))
    assume(current is not None and target is not None)
    if draw(st.integers(0, 9)) == 0:
        current = np.zeros_like(current)
    return current, target, ground


def require_safe(held, stage, ground):
    """What must hold at every moment of a stage: replicate … switch … drop, in any order within each kind."""
    union = held | stage.replicate
    assert not (held & stage.replicate).any()
    assert not (stage.drop & ~union).any()
    assert (union.sum(axis=1) <= np.maximum(ground.slots, held.sum(axis=1))).all()
    assert not (stage.replicate & ~ground.allowed).any()
    after = stage.after(held)
    nodes = ground.nodes(after)
    assert (nodes.any(axis=0) >= held.any(axis=0)).all()
    for node in range(len(nodes)):
        assert (after[ground.place_node == node].sum(axis=0) <= 1).all()
    return after


@often
@given(migrations(), st.integers(1, 2))
def test_every_prefix_is_safe_and_the_target_is_reached(migration, keep):
    current, target, ground = migration
    try:
        stages = plan_stages(current, target, ground, keep=keep)
    except UnsafePlan:
        assert (ground.free(current) == 0).all() or not ground.allowed.all()
        assert (ground.nodes(current).sum(axis=0) == 1).all() or not ground.allowed.all()
        return
    held = current
    for stage in stages:
        held = require_safe(held, stage, ground)
    assert (held == target).all()


@often
@given(migrations())
def test_what_fits_at_once_is_one_stage(migration):
    current, target, ground = migration
    if ((current | target).sum(axis=1) <= ground.slots).all():
        stages = plan_stages(current, target, ground)
        assert len(stages) == int((current != target).any())


@often
@given(migrations())
def test_required_replicas_are_kept_where_there_is_room(migration):
    current, target, ground = migration
    roomy = Ground(ground.place_node, np.full_like(ground.slots, ground.allowed.shape[1] * 2), ground.allowed)
    before = ground.nodes(current).sum(axis=0)
    for stage in plan_stages(current, target, roomy, keep=2):
        current = require_safe(current, stage, roomy)
        wanted = np.minimum(before, np.minimum(2, ground.nodes(target).sum(axis=0)))
        assert (ground.nodes(current).sum(axis=0) >= wanted).all()


def test_two_full_nodes_swap_over_a_third():
    ground = Ground(np.array([0, 1, 2]), np.array([1, 1, 1]), np.ones((3, 2), dtype=bool))
    current = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    target = np.array([[0, 1], [1, 0], [0, 0]], dtype=bool)
    stages = plan_stages(current, target, ground)
    held = current
    for stage in stages:
        held = require_safe(held, stage, ground)
    assert (held == target).all()
    assert len(stages) == 3


def test_a_duplicate_gives_way_where_no_slot_is_free():
    ground = Ground(np.array([0, 1, 2]), np.array([1, 1, 2]), np.ones((3, 4), dtype=bool))
    current = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], dtype=bool)
    swapped = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]], dtype=bool)
    with pytest.raises(UnsafePlan, match="give any node room"):
        plan_stages(current, swapped, ground)
    current[2], swapped[2] = [1, 0, 1, 0], [1, 0, 1, 0]
    experts = [0, 1, 2]  # expert 3 does not exist here, expert 0 is held twice
    few = Ground(ground.place_node, ground.slots, ground.allowed[:, experts])
    held = current[:, experts]
    for stage in plan_stages(held, swapped[:, experts], few):
        held = require_safe(held, stage, few)
    assert (held == swapped[:, experts]).all()


def test_ten_thousand_replicas_are_planned_in_seconds():
    rng = np.random.default_rng(1)
    place_node, count = np.arange(8), 6144
    ground = Ground(place_node, np.full(8, 1300), np.ones((8, count), dtype=bool))
    current, target = (random_placement(rng, ground, full=0.0) for _ in range(2))
    held = current
    for stage in plan_stages(current, target, ground):
        held = require_safe(held, stage, ground)
    assert (held == target).all()
