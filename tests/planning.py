"""Small placement problems drawn from all corners, and a brute force that shares no code with the planner."""

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from planner.objective import path_cost
from planner.problem import Problem, build_problem
from schemas.model import ModelSpec
from schemas.topology import Topology, topology_faults

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPERT_BYTES = 100
SIZES = {"checkpoint": EXPERT_BYTES, "int8": 53, "int4": 31}
"""Bytes of an expert by precision."""


def model_spec(*, layers=2, experts=4, top_k=2, **sizes):
    fields = {"id": "tiny", "hidden_size": 8, "itemsize": 4, "expert_bytes": EXPERT_BYTES, **sizes}
    return ModelSpec(layers=layers, experts=experts, top_k=top_k, **fields)


def node(name, *, device=0, host=0, disk=0, rate=None, **compute):
    """A node document; memory in experts."""
    memory = {"device": device, "host": host, "disk": disk}
    document = {
        "id": name,
        "memory": {tier: count * EXPERT_BYTES for tier, count in memory.items()},
        "compute": {"expert_us": 50, "host_expert_us": 100, "disk_bandwidth": "1 MB/s", **compute},
    }
    return document if rate is None else {**document, "ingress": {"workload": name, "tokens_per_s": rate}}


def line(*names, latency="2 ms", bandwidth="100 Mbit/s"):
    """Links that join nodes in a row."""
    return [
        {"between": [first, second], "latency": latency, "bandwidth": bandwidth} for first, second in pairwise(names)
    ]


def topology_of(nodes, links, **rest):
    workloads = {item["id"]: "trace" for item in nodes if "ingress" in item}
    document = {"cluster": "test", "model": "m", "nodes": nodes, "links": links, "workloads": workloads, **rest}
    return Topology.model_validate_json(json.dumps(document))


def random_events(rng, model, tokens=12):
    """Choices with favourites, int16 [T, L, K]."""
    favour = rng.dirichlet(np.full(model.experts, 0.5), size=model.layers) + 1e-6
    rows = [
        [rng.choice(model.experts, model.top_k, replace=False, p=p / p.sum()) for p in favour] for _ in range(tokens)
    ]
    return np.array(rows, dtype=np.int16)


def problem_of(topology, model, seed=0, sizes=None) -> Problem:
    rng = np.random.default_rng(seed)
    events = [random_events(rng, model) for item in topology.nodes if item.ingress]
    return build_problem(topology, model, events, sizes=sizes)


def bytes_of_places(problem, topology):
    """What an expert takes in each place where nodes hold them as `SIZES` says; disks have the checkpoint's."""
    held = [SIZES[item.precision or "checkpoint"] for item in topology.nodes]
    pairs = zip(problem.place_node.tolist(), problem.place_tier.tolist(), strict=True)
    return [EXPERT_BYTES if tier == 2 else held[number] for number, tier in pairs]


@st.composite
def mixed_problems(draw):
    """Problems whose nodes hold experts in precisions of their own, and what an expert takes in each place."""
    names = ("a", "b", "c")[: draw(st.integers(2, 3))]
    model = model_spec(layers=draw(st.integers(1, 2)), experts=draw(st.integers(2, 4)), top_k=draw(st.integers(1, 2)))
    most = model.layers * model.experts
    nodes = []
    for position, name in enumerate(names):
        room = {"device": draw(st.integers(0, most)), "disk": draw(st.sampled_from([0, 0, most]))}
        document = node(name, **room, rate=20 if position == 0 or draw(st.booleans()) else None)
        document["memory"]["device"] += draw(st.integers(0, EXPERT_BYTES - 1))  # no whole number of experts
        nodes.append({**document, "precision": draw(st.sampled_from([*SIZES, None]))})
    topology = topology_of(nodes, line(*names))
    problem = problem_of(topology, model, seed=draw(st.integers(0, 5)), sizes=SIZES)
    return problem, bytes_of_places(problem, topology)


@st.composite
def problems(draw, *, coupled=False):
    """Problems of up to three nodes and eight experts; a good part of them infeasible."""
    names = ("a", "b", "c")[: draw(st.integers(1, 3))]
    model = model_spec(layers=draw(st.integers(1, 2)), experts=draw(st.integers(2, 4)), top_k=draw(st.integers(1, 2)))
    count = model.layers * model.experts
    room = st.integers(0, count)
    nodes = []
    for position, name in enumerate(names):
        slow = draw(st.sampled_from([200, 2000, 8000])) if coupled else draw(st.sampled_from([20, 500]))
        nodes.append(
            node(
                name,
                device=draw(room),
                host=draw(st.one_of(st.just(0), room)),
                disk=draw(st.one_of(st.just(0), st.just(0), room)),
                rate=draw(st.sampled_from([5, 40])) if position == 0 or draw(st.booleans()) else None,
                expert_us=slow,
                host_expert_us=2 * slow,
            )
        )
    bandwidth = draw(st.sampled_from(["20 kbit/s", "60 kbit/s"])) if coupled else "10 Mbit/s"
    links = line(*names, latency=draw(st.sampled_from(["0 ms", "1 ms", "30 ms"])), bandwidth=bandwidth)
    if len(names) == 3 and draw(st.booleans()):
        links += [{"between": ["a", "c"], "latency": "5 ms", "bandwidth": "30 kbit/s" if coupled else "10 Mbit/s"}]
    pins = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "layer": st.integers(0, model.layers - 1),
                    "expert": st.integers(0, model.experts - 1),
                    "node": st.sampled_from(names),
                    "ban": st.booleans(),
                }
            ),
            max_size=3,
            unique_by=lambda pin: (pin["layer"], pin["expert"], pin["node"]),
        )
    )
    required = draw(st.integers(1, min(2, len(names))))
    topology = topology_of(nodes, links, pins=pins, replicas={"minimum": required})
    if list(topology_faults(topology)):
        topology = topology.model_copy(update={"pins": ()})
    return problem_of(topology, model, seed=draw(st.integers(0, 5)))


def brute_force(problem, unit, sizes=None):
    """Least cost over all placements, None where there is none; limits of compute and links are not looked at.

    A dynamic programme over experts whose state is the number of slots used at each place. `sizes` are the bytes of an
    expert in each place, where these differ.
    """
    states = {(0,) * problem.num_places: 0.0}
    demand = [[0.0] * (problem.layers * problem.experts) for _ in problem.node_ids]
    for ingress, at in enumerate(problem.ingress_node):
        for layer, expert in product(range(problem.layers), range(problem.experts)):
            rate = problem.tokens_per_s[ingress] * problem.share[ingress, layer, expert]
            demand[at][layer * problem.experts + expert] += rate
    each = sizes or [problem.expert_bytes] * problem.num_places
    slots = [int(room) // size for room, size in zip(problem.capacity_bytes.tolist(), each, strict=True)]
    for flat in range(problem.layers * problem.experts):
        options = list(_options(problem, unit, demand, flat))
        following = {}
        for used, cost in states.items():
            for places, extra in options:
                state = tuple(count + (place in places) for place, count in enumerate(used))
                if all(count <= room for count, room in zip(state, slots, strict=True)):
                    following[state] = min(following.get(state, np.inf), cost + extra)
        states = following
    return min(states.values(), default=None)


def with_paths(problem, cost, objective="additive-latency"):
    """Objective of a plan from that of its placement, None from None."""
    return None if cost is None else cost + path_cost(problem, objective)


def _options(problem, unit, demand, flat):
    layer, expert = divmod(flat, problem.experts)
    per_node = []
    for number in range(problem.num_nodes):
        places = [place for place in range(problem.num_places) if problem.place_node[place] == number]
        choices = [None, *places]
        if problem.pinned[number, layer, expert]:
            choices = places
        if problem.banned[number, layer, expert]:
            choices = [None]
        per_node.append(choices)
    for choice in product(*per_node):
        places = {place for place in choice if place is not None}
        if len(places) >= problem.required:
            yield (
                places,
                sum(
                    demand[number][flat] * min(unit[number][place] for place in places)
                    for number in range(problem.num_nodes)
                ),
            )


def write_trace(path, model, *, workload="code", tokens=60, seed=0, **header):
    """A trace file of random choices, as `agent trace` would record it."""
    rng = np.random.default_rng(seed)
    chosen = random_events(rng, model, tokens)
    metadata = {
        "format": "expertmesh-trace-1",
        "model": model.id,
        "workload": workload,
        "created": "2026-01-01",
        "layers": str(model.layers),
        "experts": str(model.experts),
        "top_k": str(model.top_k),
    }
    arrays = {
        "expert_ids": chosen,
        "scores": np.full(chosen.shape, 0.5, dtype=np.float16),
        "sequence": np.zeros(tokens, dtype=np.int32),
    }
    save_file(arrays, path, metadata={**metadata, **header})


class Workspace:
    """A folder with a model spec, traces and a topology of three nodes, each part of which a test may spoil."""

    def __init__(self, folder):
        self.folder = folder
        self.model = model_spec(layers=4, experts=8, top_k=2, trunk_layer_bytes=50, kv_bytes_per_token_layer=1)
        self.document = {
            "cluster": "test",
            "model": "model.yaml",
            "nodes": [
                node("a", device=20, rate=20),
                node("b", device=16, host=4, rate=10),
                node("c", device=12, rate=5),
            ],
            "links": line("a", "b", "c"),
            "workloads": {name: f"{name}.safetensors" for name in "abc"},
            "context": {"tokens": 16, "sessions": 1},
        }
        for seed, name in enumerate("abc"):
            write_trace(folder / f"{name}.safetensors", self.model, workload=name, seed=seed)

    def write(self, **changes):
        """Write model and topology, with top level keys changed, and return the topology's path."""
        (self.folder / "model.yaml").write_text(json.dumps(self.model.model_dump(mode="json", exclude_none=True)))
        path = self.folder / "topology.yaml"
        path.write_text(json.dumps({**self.document, **changes}))
        return path
