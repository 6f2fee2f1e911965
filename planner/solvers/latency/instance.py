"""What the latency solver is given, as arrays, and the objective it minimises.

Decides the form of the wait. Must not know how it is minimised. Axes: I ingresses, T recorded tokens, L layers,
E experts, K chosen, P places (a tier of a node), N nodes.

A token that enters at i waits, in layer l, for the slowest of its K experts::

    wait(i, t, l) = max over chosen e of  min over places p that hold (l, e) of  c[i, l, p]
    objective     = sum over i of  tokens_per_s[i] * mean over t of  sum over l of  wait(i, t, l)

`c` has the round trip, the bytes of one call over the narrowest link, compute at the holder and the tier. Experts of
one event at one holder share a call whose hidden state and partial sum are sent once, so its bytes do not grow with
their number and the maximum over experts is the maximum over calls; only their compute, one after another at the
holder, is counted once.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Events = NDArray[np.int16]


class InvalidInstance(ValueError):
    """The arrays do not describe a placement problem; names every fault."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(faults))


@dataclass(frozen=True, eq=False, kw_only=True)
class LatencyInstance:
    """One problem; build it with `latency_instance`, which checks it.

    Attributes
    ----------
    events
        Chosen experts of each ingress, int16 ``[T, L, K]`` each.
    tokens_per_s
        Weight of each ingress, float64 ``[I]``.
    cost_s
        Seconds added to a token of an ingress by a call to a place, float64 ``[I, L, P]``.
    capacity
        Experts that fit into each place, int64 ``[P]``.
    node_of_place
        Node of each place, int64 ``[P]``, numbered from 0. A node holds an expert in one of its places at most.
    required
        Nodes that must hold each expert.
    allowed, forced
        Whether a place may, must hold an expert, bool ``[P, L, E]``.
    any_tier
        Where an expert is forced into a place, though any other place of its node would do: search keeps to `forced`,
        the bound does not. bool ``[P, L, E]``.
    """

    events: tuple[Events, ...]
    tokens_per_s: Floats
    cost_s: Floats
    capacity: Ints
    node_of_place: Ints
    num_experts: int
    required: int
    allowed: Bools
    forced: Bools
    any_tier: Bools

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.cost_s.shape[1])

    @property
    def num_ingresses(self) -> int:
        """I."""
        return len(self.events)

    @property
    def num_places(self) -> int:
        """P."""
        return len(self.capacity)

    @cached_property
    def on_node(self) -> Bools:
        """Whether a place belongs to a node, bool ``[P, N]``."""
        nodes = np.arange(int(self.node_of_place.max(initial=-1)) + 1)
        return np.asarray(self.node_of_place[:, None] == nodes)

    @cached_property
    def is_pinned(self) -> bool:
        """Whether any expert is forced into or kept out of a place."""
        return bool(self.forced.any() or not self.allowed.all())


def latency_instance(
    events: tuple[Events, ...],
    tokens_per_s: ArrayLike,
    cost_s: ArrayLike,
    capacity: ArrayLike,
    *,
    node_of_place: ArrayLike,
    num_experts: int,
    required: int = 1,
    allowed: Bools | None = None,
    forced: Bools | None = None,
    any_tier: Bools | None = None,
) -> LatencyInstance:
    """Check the arrays and build the instance.

    Parameters
    ----------
    cost_s
        Seconds, ``[I, P]`` (the same in every layer) or ``[I, L, P]`` (where the trunk of a layer runs elsewhere).
    allowed, forced, any_tier
        ``[P, L, E]``; by default everything is allowed and nothing forced.

    Raises
    ------
    InvalidInstance
        With every fault found.
    """
    costs, slots = np.asarray(cost_s, dtype=np.float64), np.asarray(capacity, dtype=np.int64)
    faults = _event_faults(events, num_experts)
    if faults:
        raise InvalidInstance(faults)
    layers = events[0].shape[1]
    if costs.ndim == 2:
        costs = np.repeat(costs[:, None, :], layers, axis=1)
    shape = (len(slots), layers, num_experts)
    instance = LatencyInstance(
        events=tuple(events),
        tokens_per_s=np.asarray(tokens_per_s, dtype=np.float64),
        cost_s=costs,
        capacity=slots,
        node_of_place=np.asarray(node_of_place, dtype=np.int64),
        num_experts=num_experts,
        required=required,
        allowed=np.ones(shape, dtype=bool) if allowed is None else allowed,
        forced=np.zeros(shape, dtype=bool) if forced is None else forced,
        any_tier=np.zeros(shape, dtype=bool) if any_tier is None else any_tier,
    )
    faults = _array_faults(instance, shape)
    if faults:
        raise InvalidInstance(faults)
    return instance


def _event_faults(events: tuple[Events, ...], num_experts: int) -> list[str]:
    if not events:
        return ["no ingress: give the events of at least one"]
    faults = []
    for ingress, chosen in enumerate(events):
        if chosen.ndim != 3 or not chosen.size:
            faults.append(f"events of ingress {ingress}: shape {chosen.shape}, need [T, L, K] with T, L, K > 0")
        elif chosen.min() < 0 or chosen.max() >= num_experts:
            faults.append(f"events of ingress {ingress}: experts {chosen.min()}..{chosen.max()} of {num_experts}")
        elif chosen.shape[1] != events[0].shape[1]:
            faults.append(f"events of ingress {ingress}: {chosen.shape[1]} layers, ingress 0 has {events[0].shape[1]}")
    return faults


def _array_faults(instance: LatencyInstance, shape: tuple[int, int, int]) -> list[str]:
    faults = []
    places, layers, _ = shape
    wanted = {
        "tokens_per_s": (instance.num_ingresses,),
        "cost_s": (instance.num_ingresses, layers, places),
        "node_of_place": (places,),
        "allowed": shape,
        "forced": shape,
        "any_tier": shape,
    }
    for name, want in wanted.items():
        if (got := getattr(instance, name).shape) != want:
            faults.append(f"{name}: shape {got}, need {want}")
    if faults:
        return faults
    for name in ("tokens_per_s", "cost_s"):
        values = getattr(instance, name)
        if not np.isfinite(values).all() or (values < 0).any():
            faults.append(f"{name}: has negative or non-finite values")
    if instance.tokens_per_s.sum() <= 0:
        faults.append("tokens_per_s: all zero, so that every placement is as good as any other")
    if (instance.capacity < 0).any() or (instance.node_of_place < 0).any():
        faults.append("capacity and node_of_place: negative values")
    elif (instance.forced & ~instance.allowed).any():
        faults.append("forced: an expert is forced into a place that does not allow it")
    elif _forced_twice(instance):
        faults.append("forced: an expert is forced into two places of one node")
    if instance.required < 1:
        faults.append(f"required: {instance.required}, need at least 1")
    return faults


def _forced_twice(instance: LatencyInstance) -> bool:
    per_node = np.einsum("ple,pn->nle", instance.forced.astype(np.int64), instance.on_node.astype(np.int64))
    return bool((per_node > 1).any())


def token_waits(instance: LatencyInstance, placed: Bools) -> list[Floats]:
    """Seconds that each recorded token waits over all layers, float64 ``[T]`` by ingress, from bool ``[P, L, E]``.

    The definition that bound and incumbent are checked against: it reads the events as they were recorded.
    """
    layers = np.arange(instance.num_layers)[None, :, None]
    found = []
    for chosen, cost in zip(instance.events, instance.cost_s, strict=True):
        nearest = np.where(placed, cost.T[:, :, None], np.inf).min(axis=0)  # [L, E]
        found.append(nearest[layers, chosen].max(axis=2).sum(axis=1))
    return found


def waits(instance: LatencyInstance, placed: Bools) -> Floats:
    """Mean seconds that a token of each ingress waits over all layers, float64 ``[I]``, from bool ``[P, L, E]``."""
    return np.array([waited.mean() for waited in token_waits(instance, placed)])
