"""What happened while tokens were served: routing per layer and expert, calls, waits, times.

Decides how it is summed: each step counts for itself, and is added to the node's counters when it ends. Must not know
who reads them. Times are seconds.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.topology import Tier

LAYER_FIGURES: Final = (
    *("tokens", "device_rows", "host_rows", "disk_rows", "remote_rows", "calls", "local_s", "wait_s"),
    "replaced_rows",
)


@dataclass
class Counts:
    """Sums over some tokens that entered at this node.

    Attributes
    ----------
    routed
        [L, E] int64: tokens routed to each expert.
    tokens, steps
        Tokens and forwards.
    events, remote_events
        (token, layer) pairs, and those with at least one expert computed elsewhere.
    rows, remote_rows
        (token, layer, expert) evaluations, and those computed elsewhere.
    tier_rows
        Local evaluations by the tier that the expert was found in.
    replaced_rows, spared_events, lost_mass
        Evaluations that another expert made, or none; (token, layer) pairs that wait for nobody because of it; and the
        share of the router's top-K mass that was given up, summed over pairs.
    low_rows
        Evaluations in a lower precision than the node's own.
    local_calls, remote_calls
        Groups of evaluations computed at once: by layer here, by layer and holder elsewhere.
    trunk_s, local_s, wait_s
        Time in the trunk, in local experts, and waiting for answers after that.
    layers
        [L, figures] float64: what of it fell to each layer, a column for each of `LAYER_FIGURES`.
    """

    routed: NDArray[np.int64]
    tokens: int = 0
    steps: int = 0
    events: int = 0
    remote_events: int = 0
    rows: int = 0
    remote_rows: int = 0
    replaced_rows: int = 0
    spared_events: int = 0
    lost_mass: float = 0.0
    low_rows: int = 0
    tier_rows: dict[Tier, int] = field(default_factory=dict)
    local_calls: int = 0
    remote_calls: int = 0
    trunk_s: float = 0.0
    local_s: float = 0.0
    wait_s: float = 0.0
    _chosen: list[NDArray[np.integer[Any]]] = field(default_factory=list, repr=False, compare=False)
    layers: NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _few: list[int] = field(default_factory=list, repr=False, compare=False)
    _marks: list[tuple[float, ...]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self.layers = np.zeros((len(self.routed), len(LAYER_FIGURES)))

    @property
    def hit_rate(self) -> float | None:
        """Share of all evaluations whose expert was in a device slot of this node; None before the first."""
        return self.tier_rows.get("device", 0) / self.rows if self.rows else None

    @property
    def remote_call_share(self) -> float | None:
        """Share of evaluations computed elsewhere; None before the first."""
        return self.remote_rows / self.rows if self.rows else None

    @property
    def any_remote_share(self) -> float | None:
        """Share of (token, layer) pairs with at least one expert computed elsewhere; None before the first."""
        return self.remote_events / self.events if self.events else None

    @property
    def lost_mass_share(self) -> float | None:
        """Mean share of the top-K router mass given up by a (token, layer) pair; None before the first."""
        return self.lost_mass / self.events if self.events else None

    def count_layer(
        self, layer: int, expert: NDArray[np.integer[Any]], *, tokens: int, remote_rows: int, remote_tokens: int
    ) -> None:
        """Count one layer of a forward; `expert` [R] names the expert of each row. Modifies."""
        self._chosen.append(expert + layer * self.routed.shape[1])
        self.events += tokens
        self.remote_events += remote_tokens
        self.rows += len(expert)
        self.remote_rows += remote_rows

    def count_sizes(self, layer: int, sizes: NDArray[np.integer[Any]], *, tokens: int) -> int:
        """Count one layer of a forward by the rows of each expert [E], all of them here; returns the rows. Modifies."""
        rows = int(sizes.sum())
        self.routed[layer] += sizes
        self.events += tokens
        self.rows += rows
        return rows

    def count_token(self, layer: int, experts: list[int], *, remote_rows: int) -> None:
        """Count one layer of one token, as `count_layer` does. Modifies."""
        first = layer * self.routed.shape[1]
        self._few.extend([first + expert for expert in experts])
        self.events += 1
        self.remote_events += remote_rows > 0
        self.rows += len(experts)
        self.remote_rows += remote_rows

    def end_layer(self, layer: int) -> None:
        """Note the sums so far: what was added since the last layer ended fell to this one. Modifies."""
        tiers = self.tier_rows
        device, host, disk = tiers.get("device", 0), tiers.get("host", 0), tiers.get("disk", 0)
        calls = self.remote_calls
        self._marks.append((layer, self.events, device, host, disk, self.remote_rows, calls, self.local_s, self.wait_s))

    def count_replaced(self, layer: int, rows: int) -> None:
        """Count evaluations of a layer that another expert made, or none. Modifies."""
        self.replaced_rows += rows
        self.layers[layer, -1] += rows

    def settle(self) -> None:
        """Bring `routed` and `layers` up to date: it is cheaper at once than layer by layer. Modifies."""
        self._settle([self])

    def _settle(self, parts: "Sequence[Counts]") -> None:
        """Add to `routed` and `layers` what parts have only noted; several cost hardly more than one."""
        marks = [mark for part in parts if part._marks for mark in (_NO_MARK, *part._marks)]
        few = [each for part in parts for each in part._few]
        chosen = [each for part in parts for each in part._chosen]
        if marks:
            rows = np.array(marks, dtype=np.float64)  # [marks, 1 + figures]; each part's begin at zero
            layer, added = rows[1:, 0].astype(np.intp), np.diff(rows[:, 1:], axis=0)
            is_mark = layer >= 0
            np.add.at(self.layers[:, :-1], layer[is_mark], added[is_mark])
        if few or chosen:
            flat = np.bincount(np.concatenate([*chosen, np.array(few, dtype=np.int64)]), minlength=self.routed.size)
            self.routed += flat.reshape(self.routed.shape)
        for part in parts:
            part._marks, part._few, part._chosen = [], [], []

    def add(self, others: "Sequence[Counts]") -> None:
        """Add other sums to these. Modifies all of them."""
        self._settle(others)
        for other in others:
            self.routed += other.routed
            self.layers += other.layers
            for tier, rows in other.tier_rows.items():
                self.tier_rows[tier] = self.tier_rows.get(tier, 0) + rows
        for name in _PLAIN:
            setattr(self, name, sum([getattr(other, name) for other in others], getattr(self, name)))


class TierCounts:
    """What a node found where and loaded, by layer, for tokens that entered anywhere. Guarded by whoever counts.

    Attributes
    ----------
    found
        [L] by tier: experts lent from memory of this tier.
    loads, load_bytes, waited_s
        [L]: experts read into memory, their bytes, and seconds that steps waited for that.
    prefetched, prefetch_hits
        [L]: experts loaded ahead, and those of them that were asked for.
    brought, brought_bytes, guest_hits
        [L]: experts of other nodes that were brought here, their bytes, and how often such were found in memory.
    """

    def __init__(self, layers: int) -> None:
        self.found: dict[Tier, list[int]] = {"device": [0] * layers, "host": [0] * layers}
        self.loads = [0] * layers
        self.load_bytes = [0] * layers
        self.waited_s = [0.0] * layers
        self.prefetched = [0] * layers
        self.prefetch_hits = [0] * layers
        self.brought = [0] * layers
        self.brought_bytes = [0] * layers
        self.guest_hits = [0] * layers
        self.evictions = 0

    def load(self, layer: int, num_bytes: int) -> None:
        """Count a load. Modifies."""
        self.loads[layer] += 1
        self.load_bytes[layer] += num_bytes

    def bring(self, layer: int, num_bytes: int) -> None:
        """Count an expert of another node that was brought here. Modifies."""
        self.brought[layer] += 1
        self.brought_bytes[layer] += num_bytes

    @property
    def hit_rate(self) -> float | None:
        """Share of experts that were found in memory; None before the first was asked for."""
        hits = sum(map(sum, self.found.values()))
        asked = hits + sum(self.loads)
        return hits / asked if asked else None


_PLAIN = (
    *("tokens", "steps", "events", "remote_events", "rows", "remote_rows", "local_calls", "remote_calls"),
    *("replaced_rows", "spared_events", "lost_mass", "low_rows", "trunk_s", "local_s", "wait_s"),
)


_NO_MARK: Final = (-1, *[0.0] * (len(LAYER_FIGURES) - 1))  # before the marks of a step
_ENDED: Final = 16  # steps whose sums are added at once: a third of the time of one by one


class Counters:
    """The sums of a node. Thread-safe."""

    def __init__(self, layers: int, experts: int) -> None:
        self._shape = (layers, experts)
        self._lock = threading.Lock()
        self._total = self.fresh()
        self._ended: list[Counts] = []

    def fresh(self) -> Counts:
        """Return empty sums for one step. Does not modify."""
        return Counts(np.zeros(self._shape, dtype=np.int64))

    def add(self, counts: Counts) -> None:
        """Add the sums of a step that ended. Modifies."""
        with self._lock:
            self._ended.append(counts)
            if len(self._ended) >= _ENDED:
                self._add_ended()

    def _add_ended(self) -> None:
        self._total.add(self._ended)
        self._ended = []

    def snapshot(self) -> Counts:
        """Return a copy of the sums so far. Does not modify."""
        with self._lock:
            self._add_ended()
            copied = replace(
                self._total,
                routed=self._total.routed.copy(),
                tier_rows=dict(self._total.tier_rows),
                _chosen=[],
                _few=[],
            )
            copied.layers += self._total.layers
            return copied
