"""Whatever trunks there are: while one gives way to the other every prefix of the stages fits and no expert is lost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.crossing import Crowded, Grounds, plan_crossing
from planner.errors import UnsafePlan
from planner.migration import Ground
from tests.property.test_migration import random_placement, require_safe

often = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@st.composite
def crossings(draw):
    """Places whose room differs between the trunks, and placements that fit under each."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    experts = draw(st.integers(1, 8))
    place_node = np.sort(np.array(draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))))
    count = len(place_node)
    slots = [np.array(draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))) for _ in range(2)]
    both = np.maximum(np.minimum(*slots) - rng.integers(0, 2, count), 0)
    allowed = rng.random((count, experts)) < draw(st.sampled_from([1.0, 1.0, 0.8]))
    grounds = Grounds(*(Ground(place_node, room, allowed) for room in (slots[0], both, slots[1])))
    full = draw(st.sampled_from([0.0, 0.5, 1.0]))
    current = random_placement(rng, grounds.before, full=full)
    target = random_placement(rng, grounds.after, full=full)
    assume(current is not None and target is not None)
    return current, target, grounds


@often
@given(crossings(), st.integers(1, 2))
def test_every_prefix_fits_the_trunks_that_are_there(crossing, keep):
    current, target, grounds = crossing
    tight = grounds.both.slots.sum() <= current.shape[1]  # or just as many slots: nothing can change its place
    try:
        stages, switch = plan_crossing(current, target, grounds, keep=keep)
    except UnsafePlan:
        assert tight or not grounds.both.allowed.all()
        return
    held = current
    for number, stage in enumerate(stages, start=1):
        ground = grounds.before if number < switch else grounds.both if number == switch else grounds.after
        if number == switch:
            assert (ground.free(held) >= 0).all()
        held = require_safe(held, stage, ground)
    assert (held == target).all()
    assert 1 <= switch <= len(stages)


@often
@given(crossings())
def test_what_fits_beside_both_trunks_is_one_stage(crossing):
    current, target, grounds = crossing
    if ((current | target).sum(axis=1) <= grounds.both.slots).all():
        stages, switch = plan_crossing(current, target, grounds)
        assert (len(stages), switch) == (1, 1)


def test_a_last_replica_gives_way_to_the_second_trunk_and_comes_back():
    every = np.ones((2, 3), dtype=bool)
    before, both, after = (Ground(np.array([0, 1]), np.array(slots), every) for slots in ([2, 2], [1, 2], [2, 2]))
    current = np.array([[1, 1, 0], [0, 0, 1]], dtype=bool)
    stages, switch = plan_crossing(current, current, Grounds(before, both, after))
    assert (len(stages), switch) == (3, 2)
    with pytest.raises(Crowded) as told:
        plan_crossing(current, current, Grounds(before, replace(both, slots=np.array([0, 2])), after))
    assert told.value.excess.tolist() == [1, 0]
