"""What a placement costs: the one definition that every solver's claim is checked against.

Decides the objectives:

latency
    Seconds waited per second: ``sum_i T_i * mean over recorded events of sum_l max over the K chosen experts of c``.
    A layer waits for the slowest of its experts. The default.
additive-latency
    ``sum d c``: waits added up over experts, an upper bound on the above; needs shares only, no events. With a
    `balance` W, plus ``W sum_l max_m`` of the seconds of compute that node m spends on layer l.
remote-calls
    ``sum d`` over calls served elsewhere, DanceMoE's proxy.

Solvers minimise these for a given trunk. What a plan costs is more: the seconds of compute and hops of every token's
path, which the trunk alone decides, and of its part of a prompt (`prompts`), are added by `plan_cost` and counted in
what a `Judgement` predicts.

Must not know any solver. A placement is bool ``[P, L, E]``.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from planner.prefill import prompt_path_seconds, prompt_rest_seconds
from planner.problem import Bools, Events, Floats, Ints, Problem

ObjectiveName = Literal["latency", "additive-latency", "remote-calls"]
OBJECTIVES: Final[tuple[ObjectiveName, ...]] = get_args(ObjectiveName)

_TIE_BREAK: Final = 1e-6  # remote-calls: of two placements with as many calls, the one with less latency


@dataclass(frozen=True, eq=False)
class Routing:
    """Which replica serves a caller.

    Attributes
    ----------
    holder
        Place that serves most of a caller's calls for an expert, int64 ``[N, L, E]``.
    share
        Share of the calls that each place serves, float64 ``[N, P, L, E]``; None where `holder` serves all.
    """

    holder: Ints
    share: Floats | None = None


def unit_cost(problem: Problem, objective: ObjectiveName) -> Floats:
    """Cost of one call from node n served at place p, float64 ``[N, P]``.

    The additive objectives are demand times this; `latency` takes the highest of an event's calls.
    """
    if objective != "remote-calls":
        return problem.cost_s
    remote = _is_remote(problem).astype(np.float64)
    highest = problem.cost_s.max(initial=0.0)
    tie_break = _TIE_BREAK / highest if highest else 0.0
    return remote + tie_break * problem.cost_s


def _is_remote(problem: Problem) -> Bools:
    """Whether a place lies on another node than the caller, bool ``[N, P]``."""
    remote: Bools = problem.place_node[None, :] != np.arange(problem.num_nodes)[:, None]
    return remote


def nearest(problem: Problem, placed: Bools, objective: ObjectiveName) -> Routing:
    """Route every call to the cheapest replica; the first place where several cost the same."""
    unit = unit_cost(problem, objective)
    holder = np.empty((problem.num_nodes, problem.layers, problem.experts), dtype=np.int64)
    for node in range(problem.num_nodes):
        holder[node] = np.where(placed, unit[node][:, None, None], np.inf).argmin(axis=0)
    return Routing(holder)


def placement_cost(problem: Problem, routing: Routing, objective: ObjectiveName) -> float:
    """Objective value: `latency` over recorded events, else demand times unit cost over callers and experts.

    Where calls are split between replicas, a call of `latency` waits for the mean of them.
    """
    if objective == "latency":
        return float(problem.tokens_per_s @ _mean_waits(problem, routing))
    unit = unit_cost(problem, objective)
    extra = 0.0
    if objective == "additive-latency" and problem.balance:
        extra = problem.balance * float(layer_load(problem, routing).max(axis=1).sum())
    if routing.share is None:
        return float((problem.caller_demand * _looked_up(unit, routing)).sum()) + extra
    return float(np.einsum("nle,np,nple->", problem.caller_demand, unit, routing.share)) + extra


def path_seconds(problem: Problem) -> Floats:
    """Seconds that a token of each ingress computes and hops on its path, float64 ``[I]``, by trunk and links alone.

    Its part of what a prompt's path takes is counted, too.
    """
    layers, trunk = np.arange(problem.layers), problem.trunk_node
    hops = problem.hop_s[trunk, np.roll(trunk, -1, axis=1)]
    seconds = (problem.compute_s[trunk, layers] + hops).sum(axis=1)
    return np.asarray(seconds + _per_token(problem, prompt_path_seconds(problem)))


def prompt_part_seconds(problem: Problem, routing: Routing) -> Floats:
    """Seconds of a prompt beside those of its path that count for a token of each ingress, float64 ``[I]``."""
    return _per_token(problem, prompt_rest_seconds(problem, routing.holder, routing.share))


def _per_token(problem: Problem, prompt_s: Floats) -> Floats:
    return prompt_s if problem.prompts is None else np.asarray(prompt_s / problem.prompts.answer_tokens)


def prompt_seconds(problem: Problem, routing: Routing) -> Floats:
    """Seconds until the first token of an answer, float64 ``[I]``; 0 where an ingress has no prompts."""
    return prompt_path_seconds(problem) + prompt_rest_seconds(problem, routing.holder, routing.share)


def path_cost(problem: Problem, objective: ObjectiveName) -> float:
    """Seconds per second that compute and hops add to an objective; nothing to remote calls."""
    return 0.0 if objective == "remote-calls" else float(problem.tokens_per_s @ path_seconds(problem))


def plan_cost(problem: Problem, routing: Routing, objective: ObjectiveName) -> float:
    """Objective value of a plan: that of its placement, compute and hops of its paths, and its prompts."""
    cost = placement_cost(problem, routing, objective) + path_cost(problem, objective)
    if problem.prompts is None or objective == "remote-calls":
        return cost
    return cost + float(problem.tokens_per_s @ prompt_part_seconds(problem, routing))


def _mean_waits(problem: Problem, routing: Routing) -> Floats:
    """Seconds that a token of each ingress waits over all layers, float64 ``[I]``."""
    return np.asarray(layer_waits(problem, routing).sum(axis=1))


def layer_waits(problem: Problem, routing: Routing) -> Floats:
    """Seconds that a token of each ingress waits in each layer, float64 ``[I, L]``."""
    wait, layers = _looked_up(problem.cost_s, routing), np.arange(problem.layers)
    return np.array(
        [
            wait[trunk, layers][layers[None, :, None], events].max(axis=2).mean(axis=0)
            for trunk, events in zip(problem.trunk_node, problem.events, strict=True)
        ]
    )


def layer_calls(problem: Problem, routing: Routing) -> Floats:
    """Return the calls of a token of each ingress in each layer, one to each other node that serves it, ``[I, L]``."""
    holder_node, layers = problem.place_node[routing.holder], np.arange(problem.layers)
    return np.array(
        [
            _messages(events, holder_node[trunk, layers] != trunk[:, None], holder_node[trunk, layers]).mean(axis=0)
            for trunk, events in zip(problem.trunk_node, problem.events, strict=True)
        ]
    )


def _looked_up(table: Floats, routing: Routing) -> Floats:
    """Value ``table[n, place]`` of the place that serves each call, or its mean over shares, ``[N, L, E]``."""
    if routing.share is not None:
        return np.asarray(np.einsum("np,nple->nle", table, routing.share))
    return np.asarray(table[np.arange(len(table))[:, None, None], routing.holder])


def node_load(problem: Problem, routing: Routing) -> Floats:
    """Seconds of compute per second that calls cost each node, float64 ``[N]``."""
    per_place = _demand_per_pair(problem, routing).sum(axis=0) * problem.service_s
    return np.bincount(problem.place_node, weights=per_place, minlength=problem.num_nodes).astype(np.float64)


def layer_load(problem: Problem, routing: Routing) -> Floats:
    """Seconds of compute per second that calls of each layer cost each node, float64 ``[L, N]``."""
    load = np.zeros((problem.layers, problem.num_nodes))
    for place, node in enumerate(problem.place_node):
        served = routing.holder == place if routing.share is None else routing.share[:, place]
        load[:, node] += (problem.caller_demand * served).sum(axis=(0, 2)) * problem.service_s[place]
    return load


def link_load(problem: Problem, routing: Routing) -> Floats:
    """Bytes per second that calls put on each link, both directions together, float64 ``[U]``."""
    per_place = _demand_per_pair(problem, routing)
    pairs = np.zeros((problem.num_nodes, problem.num_nodes))
    np.add.at(pairs.T, problem.place_node, per_place.T)
    calls = pairs[problem.hop_caller, problem.hop_holder]
    crossing = np.bincount(problem.hop_link, weights=calls, minlength=len(problem.link_limit))
    return crossing.astype(np.float64) * problem.call_bytes


def _demand_per_pair(problem: Problem, routing: Routing) -> Floats:
    """Return calls per second from each node to each place, float64 ``[N, P]``."""
    demand = problem.caller_demand
    if routing.share is not None:
        return np.asarray(np.einsum("nle,nple->np", demand, routing.share))
    callers = np.broadcast_to(np.arange(problem.num_nodes)[:, None, None], demand.shape)
    flat = (callers * problem.num_places + routing.holder).ravel()
    total = np.bincount(flat, weights=demand.ravel(), minlength=problem.num_nodes * problem.num_places)
    return total.astype(np.float64).reshape(problem.num_nodes, problem.num_places)


@dataclass(frozen=True, eq=False)
class Judgement:
    """What tokens meet under a placement, by ingress and over all.

    Attributes
    ----------
    remote_calls, any_remote, wait_s, prompt_s, latency_s, bytes_per_token
        By ingress, float64 ``[I]``: share of calls served elsewhere; share of (token, layer) events with at least one
        call elsewhere; seconds a token waits, each layer for the slowest of its calls; seconds until the first token, 0
        without prompts; waits, the compute and hops of a token's path, and its part of the prompt; bytes over the
        network, those of hops too.
    remote_call_share, predicted_latency_s, mean_bytes_per_token
        Means over all tokens that enter; the latency is waits, compute, hops and prompts.
    any_remote_share
        Mean over ingresses.
    """

    remote_calls: Floats
    any_remote: Floats
    wait_s: Floats
    prompt_s: Floats
    latency_s: Floats
    bytes_per_token: Floats
    remote_call_share: float
    any_remote_share: float
    predicted_latency_s: float
    mean_bytes_per_token: float


def judge(problem: Problem, routing: Routing) -> Judgement:
    """Evaluate a placement on the problem's recorded events."""
    away = _is_remote(problem).astype(np.float64)
    remote, wait = _looked_up(away, routing), _looked_up(problem.cost_s, routing)
    holder_node = problem.place_node[routing.holder]
    layers = np.arange(problem.layers)
    rows = []
    for trunk, share, events in zip(problem.trunk_node, problem.share, problem.events, strict=True):
        remote_here, wait_here, holder_here = (table[trunk, layers] for table in (remote, wait, holder_node))
        calls = float((share * remote_here).sum() / max(share.sum(), 1e-300))
        rows.append((calls, *_event_means(events, remote_here, wait_here, holder_here != trunk[:, None], holder_here)))
    calls_, any_remote, waits, messages = np.array(rows).T
    weights = problem.tokens_per_s / problem.tokens_per_s.sum()
    num_hops = (problem.trunk_node != np.roll(problem.trunk_node, -1, axis=1)).sum(axis=1)
    sent = messages * problem.call_bytes + num_hops * problem.hop_bytes
    latency = waits + path_seconds(problem) + prompt_part_seconds(problem, routing)
    return Judgement(
        remote_calls=calls_,
        any_remote=any_remote,
        wait_s=waits,
        prompt_s=prompt_seconds(problem, routing),
        latency_s=latency,
        bytes_per_token=sent,
        remote_call_share=float(weights @ calls_),
        any_remote_share=float(any_remote.mean()),
        predicted_latency_s=float(weights @ latency),
        mean_bytes_per_token=float(weights @ sent),
    )


def _event_means(events: Events, remote: Floats, wait: Floats, away: Bools, holder: Ints) -> tuple[float, float, float]:
    """Any-remote share, seconds waited and messages per token over events ``[T, L, K]``; tables are ``[L, E]``."""
    layers = np.arange(events.shape[1])[None, :, None]
    local = (1.0 - remote)[layers, events].prod(axis=2)
    slowest = wait[layers, events].max(axis=2)
    messages = _messages(events, away, holder).sum(axis=1)
    return float(1.0 - local.mean()), float(slowest.sum(axis=1).mean()), float(messages.mean())


def _messages(events: Events, away: Bools, holder: Ints) -> Ints:
    """Return how many other nodes serve each event ``[T, L, K]``, int64 ``[T, L]``; tables are ``[L, E]``."""
    layers = np.arange(events.shape[1])[None, :, None]
    nodes = np.sort(np.where(away, holder, -1)[layers, events], axis=2)  # -1: served here, so no message
    first = np.ones_like(nodes, dtype=bool)
    first[:, :, 1:] = nodes[:, :, 1:] != nodes[:, :, :-1]
    return np.asarray((first & (nodes >= 0)).sum(axis=2))
