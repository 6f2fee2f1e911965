"""Wherever the trunk goes: at every step of the plan experts, trunks and KV caches of then fit each node together."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.assemble import placement_records, trunk_paths
from planner.departure import Departure
from planner.errors import InfeasibleProblem, UnsafePlan
from planner.migration import Ground
from planner.rooms import Rooms, expert_room
from planner.steps import migration_steps
from schemas.paths import path_memory
from schemas.topology import TIERS
from tests.planning import EXPERT_BYTES, line, model_spec, node, problem_of, topology_of
from tests.property.test_migration import random_placement

NAMES = ("a", "b", "c")
MODEL = model_spec(
    layers=3, experts=2, top_k=1, trunk_layer_bytes=100, embedding_bytes=60, input_bytes=30, head_bytes=40,
    kv_bytes_per_token_layer=5, decoder_layers=4, moe_layers=(1, 2, 3),
)  # fmt: skip


@st.composite
def moves(draw):
    """A topology and two plans' worth of paths and placements on it, all of which fit on their own."""
    nodes = [
        node(
            name,
            device=draw(st.integers(4, 14)),
            host=draw(st.sampled_from([0, 0, 3])),
            rate=10 if name == "a" or draw(st.booleans()) else None,
        )
        for name in NAMES
    ]
    topology = topology_of(nodes, line(*NAMES), context={"tokens": 10, "sessions": 1}, trunk={"mode": "move"})
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    try:
        problem = problem_of(topology, MODEL)
        both = [problem.with_trunk(rng.integers(0, 3, problem.trunk_node.shape)) for _ in range(2)]
    except InfeasibleProblem:
        assume(False)
    full = draw(st.sampled_from([0.0, 0.5, 1.0]))
    placed = []
    for each in both:
        allowed = np.ones((each.num_places, MODEL.layers * MODEL.experts), dtype=bool)
        held = random_placement(rng, Ground(each.place_node, each.slots, allowed), full=full)
        assume(held is not None)
        placed.append(placement_records(each, held.reshape(-1, MODEL.layers, MODEL.experts)))
    return topology, both, placed


def require_room(topology, paths, held):
    for each in topology.nodes:
        tier = "device" if each.memory.device else "host"
        used = dict.fromkeys(TIERS, 0)
        used[tier] = path_memory(each.id, paths, MODEL, topology.context).total
        for name, place, *_ in held:
            used[place] += EXPERT_BYTES * (name == each.id)
        for place in TIERS:
            assert used[place] <= getattr(each.memory, place), (each.id, place)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(moves())
def test_every_step_fits_and_keeps_every_expert(drawn):
    topology, (before, after), (now, then) = drawn
    old, new = (tuple(trunk_paths(each, MODEL.moe_layer_indices, 4)) for each in (before, after))
    allowed = Departure(None, None, before).allows(after.trunk_node)
    try:
        steps, stages, trunk_stage = migration_steps(after, now, then, Rooms.between(after.room, MODEL, old, new))
    except UnsafePlan:
        beside = expert_room(after.room, MODEL, (*old, *new))
        assert (beside < 0).any() or (beside // EXPERT_BYTES).sum() <= MODEL.layers * MODEL.experts
        return
    assert allowed
    held = {(replica.node, replica.tier, replica.layer, replica.expert) for replica in now}
    for step in steps:
        key = (step.node, step.tier, step.layer, step.expert)
        if step.action == "switch":
            assert {key[2:] for key in held} == {(layer, expert) for layer in range(3) for expert in range(2)}
        elif step.action == "replicate":
            held.add(key)
        else:
            held.remove(key)
        switch = trunk_stage
        paths = old if step.stage < switch else (*old, *new) if step.stage == switch else new
        require_room(topology, paths, held)
    assert {key[2:] for key in held} == {(layer, expert) for layer in range(3) for expert in range(2)}
    assert held == {(replica.node, replica.tier, replica.layer, replica.expert) for replica in then}
    assert stages == max((step.stage for step in steps), default=0) >= trunk_stage >= 1


def test_a_node_without_room_for_both_trunks_is_named():
    nodes = [node("a", device=12, rate=10), node("b", device=8), node("c", device=9)]
    rest = {"context": {"tokens": 10, "sessions": 1}, "trunk": {"mode": "move"}}
    problem = problem_of(topology_of(nodes, line(*NAMES), **rest), MODEL)
    halves = [problem.with_trunk(np.array([trunk])) for trunk in ([1, 0, 0], [0, 0, 1])]
    old, new = (tuple(trunk_paths(each, MODEL.moe_layer_indices, 4)) for each in halves)
    roomy, small = (
        problem_of(topology_of([nodes[0], node("b", device=room), nodes[2]], line(*NAMES), **rest), MODEL).room
        for room in (6, 5)
    )
    assert Rooms.between(roomy, MODEL, old, new).both[1].tolist() == [90, 0, 0]
    told = r"^node b: while tokens change their paths, the trunks before and after \(360 B\) .* 10 B missing"
    with pytest.raises(UnsafePlan, match=told):
        Rooms.between(small, MODEL, old, new)
