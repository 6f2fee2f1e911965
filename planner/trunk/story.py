"""What a token meets on its path, layer by layer, and why that path was chosen.

Decides the sentence that a plan keeps. Must not know how the path was found. Flow: problem + routing + trials →
`PathSummary` per ingress.
"""

from collections.abc import Sequence

import numpy as np

from planner.objective import Routing, layer_calls, layer_waits, prompt_seconds
from planner.problem import Floats, Ints, Problem
from planner.trunk.trials import STAY, Trial
from schemas.plan import LayerCost, PathSummary
from schemas.units import format_bytes, format_seconds


def path_summaries(problem: Problem, routing: Routing, trials: Sequence[Trial] = ()) -> tuple[PathSummary, ...]:
    """Return what every decoder layer of each ingress's path costs, and why the path is as it is."""
    waits, calls, prompts = layer_waits(problem, routing), layer_calls(problem, routing), problem.prompts
    prompt_s = prompt_seconds(problem, routing)
    return tuple(
        PathSummary(
            ingress=problem.node_ids[node],
            layers=_layer_costs(problem, problem.trunk_node[row], waits[row], calls[row]),
            why=_why(problem, row, waits[row], float(prompt_s[row]), trials),
            prompt_tokens=None if prompts is None else int(prompts.tokens[row]),
            prompt_s=None if prompts is None else float(prompt_s[row]),
        )
        for row, node in enumerate(problem.ingress_node.tolist())
    )


def hop_seconds_of(problem: Problem, trunk: Ints) -> Floats:
    """Seconds of the hop behind each layer of a path ``[L]``, the last one back to the first, float64 ``[L]``."""
    return np.asarray(problem.hop_s[trunk, np.roll(trunk, -1)])


def _layer_costs(problem: Problem, trunk: Ints, waits: Floats, calls: Floats) -> tuple[LayerCost, ...]:
    hops, first = hop_seconds_of(problem, trunk), problem.room.decoder_first
    costs = []
    for layer, node in enumerate(trunk.tolist()):
        decoders = range(int(first[layer]), int(first[layer + 1]))
        with_experts = int(problem.room.decoder_of[layer])
        costs += [
            LayerCost(
                layer=decoder,
                node=problem.node_ids[node],
                compute_s=float(problem.trunk_s[node] + (problem.chosen_s[node] if decoder == with_experts else 0.0)),
                wait_s=float(waits[layer]) if decoder == with_experts else 0.0,
                hop_s=float(hops[layer]) if decoder == decoders[-1] else 0.0,
                calls=float(calls[layer]) if decoder == with_experts else 0.0,
            )
            for decoder in decoders
        ]
    return tuple(costs)


def _why(problem: Problem, row: int, waits: Floats, prompt_s: float, trials: Sequence[Trial]) -> str:
    """One sentence: what the path costs, what staying would, and which memory made it split."""
    part_s = prompt_s / int(problem.prompts.answer_tokens[row]) if problem.prompts else 0.0
    trunk = problem.trunk_node[row]
    home, hops = int(problem.ingress_node[row]), hop_seconds_of(problem, trunk)
    compute, count = float(problem.compute_s[trunk, np.arange(problem.layers)].sum()), int((hops > 0).sum())
    told = (
        f"{format_seconds(compute + float(hops.sum() + waits.sum()) + part_s)} a token: {format_seconds(compute)} of "
        "compute, "
        f"{_hops(count)}{f' of {format_seconds(float(hops.sum()))}' if count else ''}, "
        f"{format_seconds(float(waits.sum()))} of waits"
        f"{f', {format_seconds(part_s)} of its prompt' if part_s else ''}"
    )
    if (trunk == home).all():
        return f"stays at {problem.node_ids[home]}: {told}" + _rivals(row, trials, "moving")
    return f"{told}{_rivals(row, trials, STAY)}; {_memory(problem, np.unique(trunk), home)}"


def _hops(count: int) -> str:
    return "no hop" if count == 0 else "1 hop" if count == 1 else f"{count} hops"


def _rivals(row: int, trials: Sequence[Trial], kind: str) -> str:
    """Tell of the trunk at the ingress, or of the best of the others."""
    chosen = [trial for trial in trials if (trial.name == STAY) == (kind == STAY)]
    known = [float(trial.latency_s[row]) for trial in chosen if trial.latency_s is not None]
    if known:
        where = "with the trunk at its ingress" if kind == STAY else "on the best other path tried"
        return f"; {format_seconds(min(known))} {where}"
    return "; at the ingress trunk and experts do not fit" if chosen and kind == STAY else ""


def _memory(problem: Problem, visited: Ints, home: int) -> str:
    """Say which memory made the path what it is: that of the largest node on it against a whole model."""
    room = problem.room
    everything = room.trunk_bytes(np.ones(problem.layers, dtype=bool))
    whole = int(everything + room.kv_bytes.sum()) + problem.layers * problem.experts * problem.expert_bytes
    names = [problem.node_ids[node] for node in visited.tolist()]
    largest = int(visited[room.room_bytes[visited].sum(axis=1).argmax()])
    have = int(room.room_bytes[largest].sum())
    if len(names) > 1:
        return (
            f"split over {', '.join(names)}: the model with its KV cache takes {format_bytes(whole)}, "
            f"{problem.node_ids[largest]} has {format_bytes(have)}"
        )
    here = int(room.room_bytes[home].sum())
    return (
        f"{names[0]} has {format_bytes(have)} for a model of {format_bytes(whole)}, {problem.node_ids[home]} "
        f"{format_bytes(here)}"
    )
