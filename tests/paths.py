"""Small clusters whose trunk may move, and a brute force over paths and placements that shares no code with the planner."""

from itertools import product

import numpy as np

from planner.errors import InfeasibleProblem
from planner.problem import build_problem
from tests.planning import EXPERT_BYTES, SIZES, model_spec, node, random_events, topology_of

LATENCIES_MS = (0.1, 1, 5, 20)
SLOWNESS_US = (20, 200, 2000)
SOFTWARE = ("call_overhead_us", "hop_overhead_us")


def random_cluster(seed, *, nodes=6, layers=5, experts=4, ingresses=6, tokens=12, prompt_tokens=0, mixed=False):
    """A problem of up to that size with uneven memory, links and speeds; None where not even a trunk fits.

    Software of calls and hops takes time in every other one. `mixed`: nodes hold experts in precisions of their own.
    """
    rng, software = np.random.default_rng(seed), np.random.default_rng((seed, 1)) if seed % 2 else None
    count, layers, experts = (int(rng.integers(2, most + 1)) for most in (nodes, layers, experts))
    model = model_spec(
        layers=layers,
        experts=experts,
        top_k=int(rng.integers(1, min(3, experts) + 1)),
        trunk_layer_bytes=int(rng.integers(0, 60)),
        embedding_bytes=int(rng.integers(0, 60)),
        kv_bytes_per_token_layer=int(rng.integers(0, 3)),
    )
    share = rng.uniform(0.3, 2, count)
    total = layers * experts * EXPERT_BYTES * rng.uniform(1.1, 2.5) + model.trunk_bytes * rng.uniform(1, count)
    given = list(_nodes(rng, (total * share / share.sum()).astype(int).tolist(), ingresses, software, prompt_tokens))
    if mixed:
        lows = np.random.default_rng((seed, 2)).choice(list(SIZES), count)
        given = [{**document, "precision": str(low)} for document, low in zip(given, lows, strict=True)]
    topology = topology_of(
        given,
        list(_links(rng, count)),
        trunk={"mode": "move"},
        context={"tokens": 8, "sessions": 1},
    )
    try:
        events = [random_events(rng, model, tokens) for item in topology.nodes if item.ingress]
        return build_problem(topology, model, events, sizes=SIZES)
    except InfeasibleProblem:
        return None


def _nodes(rng, rooms, ingresses, software, prompt_tokens):
    for number, room in enumerate(rooms):
        slow = int(rng.choice(SLOWNESS_US))
        enters = number == 0 or (number < ingresses and rng.random() < 0.5)
        document = node(
            f"n{number}",
            rate=int(rng.choice([5, 20])) if enters else None,
            expert_us=slow,
            host_expert_us=2 * slow,
            trunk_layer_us=slow,
            **({name: float(software.choice([0, 300, 3000])) for name in SOFTWARE} if software else {}),
        )
        if enters:
            document["ingress"] |= {"prompt_tokens": prompt_tokens, "answer_tokens": 8}
        host = int(room * 0.4) if rng.random() < 0.3 else 0
        yield {**document, "memory": {"device": room - host, "host": host, "disk": 0}}


def _links(rng, count):
    for first in range(count):
        for second in range(first):
            if first == second + 1 or rng.random() < 0.6:
                yield {
                    "between": [f"n{first}", f"n{second}"],
                    "latency": f"{rng.choice(LATENCIES_MS):g} ms",
                    "bandwidth": "100 Mbit/s",
                }


def least_cost(problem):
    """Least seconds per second over all paths and placements of nodes with one tier each; None where nothing fits."""
    slots_of, best = {}, None
    for rows in product(product(range(problem.num_nodes), repeat=problem.layers), repeat=len(problem.ingress_node)):
        slots = _slots(problem, rows)
        if slots is None:
            continue
        slots_of.setdefault(slots, list(_placements(problem, slots)))
        for held in slots_of[slots]:
            cost = sum(
                rate * _token_seconds(problem, row, held, events)
                for rate, row, events in zip(problem.tokens_per_s, rows, problem.events, strict=True)
            )
            best = cost if best is None else min(best, cost)
    return best


def _slots(problem, rows):
    room = problem.room
    slots = []
    for number in range(problem.num_nodes):
        runs = {layer for row in rows for layer, at in enumerate(row) if at == number}
        taken = sum(int(room.layer_bytes[layer]) for layer in runs)
        taken += sum(int(room.kv_bytes[layer]) for row in rows for layer, at in enumerate(row) if at == number)
        starts, ends = 0 in runs, problem.layers - 1 in runs
        taken += room.both_bytes if starts and ends else room.input_bytes * starts + room.head_bytes * ends
        left = int(room.room_bytes[number].sum()) - taken
        if left < 0:
            return None
        slots.append(left // int(problem.room.record_bytes[number, 0]))
    return tuple(slots)


def _placements(problem, slots):
    names = range(problem.num_nodes)
    choices = [set_ for set_ in product((False, True), repeat=problem.num_nodes) if any(set_)]
    for held in product(choices, repeat=problem.layers * problem.experts):
        if all(sum(one[number] for one in held) <= slots[number] for number in names):
            yield held


def _token_seconds(problem, row, held, events):
    total = 0.0
    for layer, here in enumerate(row):
        total += problem.compute_s[here, layer] + problem.hop_s[here, row[(layer + 1) % len(row)]]
    for token in events:
        for layer, chosen in enumerate(token):
            here = row[layer]
            total += max(
                min(problem.cost_s[here, at] for at in np.flatnonzero(held[layer * problem.experts + expert]))
                for expert in chosen.tolist()
            ) / len(events)
    return total
