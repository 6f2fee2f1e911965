"""Which constraints a placement breaks, and which a problem cannot keep at all: violations as values.

Decides what feasible means, without any solver: every plan is re-checked here whatever a solver claims. Must not
know how placements are found.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

from planner.errors import Violation
from planner.objective import Routing, link_load, node_load
from planner.problem import Bools, Floats, Problem
from schemas.units import format_bandwidth, format_bytes

_SLACK: Final = 1e-6  # relative; solvers keep rows to about 1e-7


def violations(problem: Problem, placed: Bools, routing: Routing) -> list[Violation]:
    """Return every constraint that a placement ``[P, L, E]`` with its routing breaks; empty means feasible."""
    held = problem.held(placed)
    return [
        *_coverage(problem, held),
        *_one_tier(problem, placed, held),
        *_memory(problem, placed),
        *_pins(problem, held),
        *_assignment(problem, placed, routing),
        *_load(problem, routing),
        *_links(problem, routing),
    ]


def _coverage(problem: Problem, held: Bools) -> Iterator[Violation]:
    replicas = problem.num_domains(held)
    kind = "failure domains" if problem.has_shared_domains else "nodes"
    short = np.argwhere(replicas < problem.required)
    if len(short):
        layer, expert = short[0]
        name = "coverage" if problem.required == 1 else "replicas"
        yield Violation(
            name,
            f"layer {layer} expert {expert}",
            int(replicas[layer, expert]),
            problem.required,
            kind,
            f"layer {layer} expert {expert} is held by {replicas[layer, expert]} of {problem.required} required {kind}"
            + (f", and so are {len(short) - 1} more experts held by too few" if len(short) > 1 else ""),
        )


def _one_tier(problem: Problem, placed: Bools, held: Bools) -> Iterator[Violation]:
    copies = np.zeros(held.shape, dtype=np.int64)
    np.add.at(copies, problem.place_node, placed.astype(np.int64))
    for node, layer, expert in np.argwhere(copies > 1)[:1]:
        where = f"{problem.node_ids[node]}, layer {layer} expert {expert}"
        message = f"node {where} is kept in {copies[node, layer, expert]} tiers; one replica per node is the limit"
        yield Violation("one-tier", where, int(copies[node, layer, expert]), 1, "tiers", message)


def _memory(problem: Problem, placed: Bools) -> Iterator[Violation]:
    used = placed.sum(axis=(1, 2)) * problem.place_bytes
    for place in np.flatnonzero(used > problem.capacity_bytes):
        name, value, limit = problem.place_name(int(place)), int(used[place]), int(problem.capacity_bytes[place])
        message = (
            f"{name} is given {format_bytes(value)} of experts, but has room for {format_bytes(limit)}: "
            f"{format_bytes(value - limit)} too much"
        )
        yield Violation("memory", name, value, limit, "bytes", message)


def _pins(problem: Problem, held: Bools) -> Iterator[Violation]:
    for name, broken, verb in (
        ("pin", problem.pinned & ~held, "pinned to"),
        ("ban", problem.banned & held, "banned from"),
    ):
        for node, layer, expert in np.argwhere(broken):
            where = f"layer {layer} expert {expert}"
            have, want = (0, 1) if name == "pin" else (1, 0)
            did = "does not hold it" if name == "pin" else "holds it"
            message = f"{where} is {verb} {problem.node_ids[node]}, which {did}"
            yield Violation(name, where, have, want, "replicas", message)


def _assignment(problem: Problem, placed: Bools, routing: Routing) -> Iterator[Violation]:
    """Check that callers are served in full (sum over m of a[n,k,m] = 1) and by holders only (a <= x)."""
    if routing.share is None:
        served = np.take_along_axis(placed, routing.holder, axis=0)
        broken = np.argwhere(~served & (problem.caller_demand > 0))
    else:
        total, worst = routing.share.sum(axis=1), (routing.share - placed[None]).max(axis=1, initial=-1.0)
        broken = np.argwhere(((np.abs(total - 1) > _SLACK) | (worst > _SLACK)) & (problem.caller_demand > 0))
    if len(broken):
        node, layer, expert = broken[0]
        subject = f"layer {layer} expert {expert} for {problem.node_ids[node]}"
        message = f"calls for {subject} are not served in full by nodes that hold it ({len(broken)} such)"
        yield Violation("assignment", subject, len(broken), 0, "callers", message)


def _load(problem: Problem, routing: Routing) -> Iterator[Violation]:
    load = node_load(problem, routing)
    for node in np.flatnonzero(load > problem.compute_limit * (1 + _SLACK)):
        yield load_violation(problem, int(node), float(load[node]))


def _links(problem: Problem, routing: Routing) -> Iterator[Violation]:
    load = link_load(problem, routing)
    for link in np.flatnonzero(load > problem.link_limit * (1 + _SLACK)):
        yield link_violation(problem, int(link), float(load[link]))


def load_violation(problem: Problem, node: int, load: float) -> Violation:
    """Say that a node's compute is used beyond its limit."""
    name, limit = problem.node_ids[node], float(problem.compute_limit[node])
    message = (
        f"compute of node {name} would be used to {load:.1%}, above the limit of {limit:.1%} by "
        f"{load - limit:.1%}; lower tokens_per_s, raise limits.compute or give {name} faster compute"
    )
    return Violation("load", name, load, limit, "utilisation", message)


def link_violation(problem: Problem, link: int, load: float) -> Violation:
    """Say that a link is used beyond its limit."""
    name, limit = problem.link_name(link), float(problem.link_limit[link])
    message = (
        f"link {name} would carry {format_bandwidth(load)}, above its limit of {format_bandwidth(limit)} by "
        f"{format_bandwidth(load - limit)}; lower tokens_per_s, raise limits.link or enlarge memory at its ends"
    )
    return Violation("link", name, load, limit, "bytes/s", message)


def impossible(problem: Problem) -> list[Violation]:
    """Return constraints that no placement can keep, as far as counting shows it without a search."""
    return [*_total_memory(problem), *_pinned_memory(problem), *_banned_everywhere(problem)]


def _total_memory(problem: Problem) -> Iterator[Violation]:
    """Sum over failure domains of slots must reach replicas x experts (a domain counts each expert once)."""
    wanted = problem.required * problem.layers * problem.experts
    room = np.bincount(problem.domain, weights=problem.node_slots)
    have = int(np.minimum(room, problem.layers * problem.experts).sum())
    if problem.required == 1:  # several nodes of a domain do not stand in each other's way
        have = int(problem.node_slots.sum())
    if have < wanted:
        size = _held_bytes(problem, _most_asking(problem))
        missing = (wanted - have) * size
        copies = "all experts" if problem.required == 1 else f"{problem.required} replicas of all experts"
        message = (
            f"{copies} need room for {wanted} ({format_bytes(wanted * size)}), but the nodes have "
            f"room for {have} after trunk and KV cache: {wanted - have} experts ({format_bytes(missing)}) missing; "
            f"{_enlarge(problem, missing)}"
        )
        value, limit = wanted * size, have * size
        yield Violation("replicas" if problem.required > 1 else "memory", "all nodes", value, limit, "bytes", message)


def _most_asking(problem: Problem) -> int:
    """Return the node that asks for most, among those that do not hold everything yet."""
    asked = problem.caller_demand.sum(axis=(1, 2))
    room = problem.node_slots < problem.layers * problem.experts
    return int(np.where(room, asked, -1.0).argmax())


def _held_bytes(problem: Problem, node: int) -> int:
    """Return what an expert takes in a node's fastest tier, by its precision."""
    places = np.flatnonzero(problem.place_node == node)
    return int(problem.place_bytes[places[0]]) if len(places) else problem.expert_bytes


def _enlarge(problem: Problem, missing: int) -> str:
    """Advise the node that asks for most to take what is missing."""
    node = _most_asking(problem)
    places = np.flatnonzero(problem.place_node == node)
    tier = problem.tier(places[0]) if len(places) else "device"
    advice = f"enlarge {problem.node_ids[node]}'s {tier} memory by {format_bytes(missing)}"
    return advice if problem.required == 1 else advice + ", or ask for fewer replicas"


def _pinned_memory(problem: Problem) -> Iterator[Violation]:
    pinned = problem.pinned.sum(axis=(1, 2))
    for node in np.flatnonzero(pinned > problem.node_slots):
        name, have = problem.node_ids[node], int(problem.node_slots[node])
        size = _held_bytes(problem, int(node))
        missing = int(pinned[node] - have) * size
        message = (
            f"{pinned[node]} experts are pinned to {name}, which has room for {have}; "
            f"remove {pinned[node] - have} pins or enlarge {name} by {format_bytes(missing)}"
        )
        value, limit = int(pinned[node]) * size, have * size
        yield Violation("pin", name, value, limit, "bytes", message)


def _banned_everywhere(problem: Problem) -> Iterator[Violation]:
    has_room = problem.node_slots > 0
    left = problem.num_domains(~problem.banned & has_room[:, None, None])
    kind = "failure domains" if problem.has_shared_domains else "nodes"
    open_ = len(np.unique(problem.domain[has_room]))
    if open_ < problem.required:
        full = np.flatnonzero(~has_room)
        advice = f"enlarge {problem.node_ids[int(full[0])]} or ask" if len(full) else "ask"
        message = (
            f"{problem.required} {kind} must hold each expert, but only {open_} have room for any; {advice} for fewer "
            "replicas"
        )
        yield Violation("replicas", "all nodes", problem.required, open_, kind, message)
        return
    for layer, expert in np.argwhere(left < problem.required)[:3]:
        where = f"layer {layer} expert {expert}"
        message = (
            f"{where} may be held by {left[layer, expert]} {kind} (others are banned or have no room), but "
            f"{problem.required} must hold it; lift a ban or enlarge a node without room"
        )
        yield Violation("ban", where, int(left[layer, expert]), problem.required, kind, message)


def shares_of(routing: Routing, num_places: int) -> Floats:
    """Return a routing as shares, float64 ``[N, P, L, E]``."""
    if routing.share is not None:
        return routing.share
    places = np.arange(num_places)[None, :, None, None]
    share: Floats = (routing.holder[:, None] == places).astype(np.float64)
    return share
