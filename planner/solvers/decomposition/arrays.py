"""The placement problem as plain arrays, and what the decomposition hands back.

Decides what a well-formed problem is. Must not know topologies, traces or plans.
Axes: I ingress (the node where the trunk of the expert's layer runs), K experts, L layers, N nodes, P places, R rows;
a place is one tier of one node. Formulation: min Σ d[i,k] a[i,k,p] c[i,p] + new copies + heaviest nodes, over holders
x[k,p] ∈ {0, 1} and shares a[i,k,p] ≥ 0 with Σ_p a = 1, a ≤ x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int16]
Real = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class EvaluationRows:
    """Limits on who serves what: Σ d[i,k] a[i,k,p] weight[r,i,p] ≤ limit[r], for load and for links.

    Parameters
    ----------
    weight
        `[R, I, P]`, ≥ 0. A node's load: seconds of service per evaluation on the node's places, 0 elsewhere. A link:
        bytes per evaluation where the path from ingress i to the place's node crosses it.
    limit
        `[R]`, in the unit of `weight` per second.
    """

    weight: Floats
    limit: Floats


@dataclass(frozen=True)
class Makespan:
    """Heaviest node of each layer: adds Σ_l weight[l] · max_m Σ_{i, k of l, p of m} d[i,k] a[i,k,p] service[p].

    Parameters
    ----------
    weight
        `[L]`, ≥ 0, objective seconds per second of load.
    service
        `[P]`, seconds per evaluation.
    """

    weight: Floats
    service: Floats


@dataclass(frozen=True)
class NewCopies:
    """What replicas that are not yet there cost, and how many there may be.

    Parameters
    ----------
    price
        `[K, P]`, ≥ 0, objective seconds for expert k at place p; 0 where it is already held.
    is_new
        `[K, P]`, whether the replica would count against `limit`.
    limit
        Most new replicas; None for no limit.
    """

    price: Floats
    is_new: Bools
    limit: int | None = None


@dataclass(frozen=True)
class PlacementArrays:
    """One placement problem.

    Parameters
    ----------
    demand
        `[I, K]`, ≥ 0, evaluations per second that enter at i for expert k.
    cost
        `[I, P]`, ≥ 0, seconds added to an evaluation of ingress i that place p serves.
    capacity
        `[P]`, bytes that may hold experts.
    expert_bytes
        Bytes of one replica, the same for all.
    node_of_place
        `[P]`, node index; a node holds an expert in at most one of its places.
    layer_of_expert
        `[K]`, ascending layer index.
    required
        Distinct failure domains that must hold each expert.
    domain_of_node
        `[N]`, failure domain; None where every node is its own.
    allowed
        `[K, P]`, False bans the expert from the place; None bans nothing.
    pinned
        `[K, N]`, True forces a replica on the node, in whatever tier; None pins nothing.
    """

    demand: Floats
    cost: Floats
    capacity: Floats
    expert_bytes: float
    node_of_place: Ints
    layer_of_expert: Ints
    required: int = 1
    domain_of_node: Ints | None = None
    allowed: Bools | None = None
    pinned: Bools | None = None
    rows: EvaluationRows | None = None
    makespan: Makespan | None = None
    new_copies: NewCopies | None = None

    def __post_init__(self) -> None:
        if faults := list(_faults(self)):
            raise ValueError("; ".join(faults))

    @property
    def num_experts(self) -> int:
        """K."""
        return int(self.demand.shape[1])

    @property
    def num_places(self) -> int:
        """P."""
        return int(self.cost.shape[1])

    @property
    def num_nodes(self) -> int:
        """N."""
        return int(self.node_of_place.max()) + 1

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.layer_of_expert[-1]) + 1

    @property
    def slots(self) -> Ints:
        """Replicas that fit each place, `[P]`: rounded down, which is exact because all replicas are of one size."""
        fit = np.floor(self.capacity / self.expert_bytes * (1 + 1e-12))
        return np.clip(fit, 0, self.num_experts).astype(np.int64)

    @property
    def is_separable(self) -> bool:
        """Whether an expert's cost depends on its own holders alone: every ingress asks its cheapest holder."""
        return self.rows is None and self.makespan is None

    @property
    def domains(self) -> Ints:
        """Failure domain of each node, `[N]`."""
        return np.arange(self.num_nodes) if self.domain_of_node is None else self.domain_of_node


def _faults(arrays: PlacementArrays) -> list[str]:
    (ingresses, experts), places = arrays.demand.shape, arrays.cost.shape[1]
    nodes, faults = arrays.num_nodes, []
    shapes: list[tuple[str, Floats | Ints | Bools | None, tuple[int, ...]]] = [
        ("cost", arrays.cost, (ingresses, places)),
        ("capacity", arrays.capacity, (places,)),
        ("node_of_place", arrays.node_of_place, (places,)),
        ("layer_of_expert", arrays.layer_of_expert, (experts,)),
        ("domain_of_node", arrays.domain_of_node, (nodes,)),
        ("allowed", arrays.allowed, (experts, places)),
        ("pinned", arrays.pinned, (experts, nodes)),
    ]
    if arrays.rows is not None:
        shapes.append(("rows.weight", arrays.rows.weight, (len(arrays.rows.limit), ingresses, places)))
    if arrays.makespan is not None:
        shapes.append(("makespan.weight", arrays.makespan.weight, (arrays.num_layers,)))
        shapes.append(("makespan.service", arrays.makespan.service, (places,)))
    if arrays.new_copies is not None:
        shapes.append(("new_copies.price", arrays.new_copies.price, (experts, places)))
        shapes.append(("new_copies.is_new", arrays.new_copies.is_new, (experts, places)))
    for name, array, shape in shapes:
        if array is None:
            continue
        if array.shape != shape:
            faults.append(f"{name} has shape {array.shape}, expected {shape}")
        elif array.dtype.kind == "f" and not (np.isfinite(array).all() and (array >= 0).all()):
            faults.append(f"{name} has values that are negative, infinite or not a number")
    if not (np.isfinite(arrays.demand).all() and (arrays.demand >= 0).all()):
        faults.append("demand has values that are negative, infinite or not a number")
    if (np.diff(arrays.layer_of_expert) < 0).any():
        faults.append("layer_of_expert must ascend")
    if arrays.expert_bytes <= 0:
        faults.append(f"expert_bytes is {arrays.expert_bytes}; it must be positive")
    return faults


class Stop(StrEnum):
    """Why the decomposition stopped."""

    GAP = "gap"

    TIME = "time"
    EXHAUSTED = "exhausted"
    INTERRUPTED = "interrupted"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Serving:
    """Who serves whom, one entry per (ingress, expert, place) with a positive share.

    Parameters
    ----------
    ingress, expert, place
        `[A]`, indices, sorted by expert, then ingress, then place.
    share
        `[A]`, in (0, 1]; the shares of one (ingress, expert) add up to 1.
    """

    ingress: Ints
    expert: Ints
    place: Ints
    share: Floats


@dataclass(frozen=True)
class Incumbent:
    """A placement that keeps every constraint.

    Parameters
    ----------
    holders
        `[K, P]`, whether the place holds the expert.
    serving
        Shares of every ingress's demand.
    objective
        Seconds per second of traffic: the value of the formulation.
    """

    holders: Bools
    serving: Serving
    objective: float


@dataclass(frozen=True)
class Progress:
    """State after one step: what is held, what is proved, when."""

    seconds: float
    phase: str
    objective: float | None
    bound: float

    @property
    def gap(self) -> float | None:
        """|objective − bound| / max(|objective|, ε); None without an incumbent."""
        return None if self.objective is None else gap_of(self.objective, self.bound)


@dataclass(frozen=True)
class Outcome:
    """What the decomposition found and proved; `bound` holds for every placement, whatever the incumbent is.

    Parameters
    ----------
    memory_price
        `[P]`, seconds per byte of each place at the best bound found.
    """

    incumbent: Incumbent | None
    bound: float
    stop: Stop
    history: tuple[Progress, ...]
    memory_price: Floats

    @property
    def gap(self) -> float | None:
        """|objective − bound| / max(|objective|, ε); None without an incumbent."""
        return None if self.incumbent is None else gap_of(self.incumbent.objective, self.bound)


@dataclass(frozen=True)
class Settings:
    """How long and how far to solve.

    Parameters
    ----------
    gap
        Relative gap at which the solver stops.
    time_limit_s
        Wall-clock seconds from the call of `solve_arrays`.
    on_progress
        Called after every step with the state and the best placement so far; returning False interrupts with it.
    threads
        Threads for passes over holder sets; 0 for one per processor.
    """

    gap: float = 1e-4
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1
    on_progress: Callable[[Progress, Incumbent | None], bool] | None = None


def gap_of(objective: float, bound: float) -> float:
    """Relative gap; 0 where the bound reaches the objective (or passes it by rounding)."""
    return max(objective - bound, 0.0) / max(abs(objective), 1e-12)
