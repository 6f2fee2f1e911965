"""Whom a node asks for which expert, per epoch, and which steps still use an older answer.

Decides nothing: it is the plan's routes as arrays, and a count of running steps. Must not know tensors or sockets.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from schemas.placement import Route

LOCAL: Final = 0
NOBODY: Final = -1
_GOLDEN: Final = 0.6180339887498949
_VARIANTS: Final = 64  # shares are kept to 1/64


@dataclass(frozen=True, eq=False)
class Routing:
    """A snapshot: who computes each expert for this node's tokens in one epoch.

    Attributes
    ----------
    holders
        Other nodes that are called, in the fixed order in which partial sums are added.
    tables
        [V, L, E] int32: 0 here, i at ``holders[i - 1]``, -1 nobody. One variant unless routes are split by shares;
        then variants are used in turn, so that each holder gets its share.
    others
        [L, E] int32: another node that has what is held here, at ``holders[i - 1]``, or -1; None if nothing has.
    """

    epoch: int
    holders: tuple[str, ...]
    tables: NDArray[np.int32]
    others: NDArray[np.int32] | None = None

    def planned(self, turn: int, layer: int) -> list[int]:
        """Return one variant's row of `tables` as a list, [E]: what is looked up one by one is quicker in one."""
        key = turn % len(self.tables), layer
        found = self._rows.get(key)
        if found is None:
            found = self._rows[key] = self.tables[key].tolist()
        return found

    @cached_property
    def _rows(self) -> dict[tuple[int, int], list[int]]:
        return {}

    @cached_property
    def is_complete(self) -> bool:
        """Whether every expert is held by somebody."""
        return bool((self.tables != NOBODY).all())

    @cached_property
    def is_local(self) -> bool:
        """Whether every expert is held here."""
        return bool((self.tables == LOCAL).all())

    @classmethod
    def build(
        cls,
        epoch: int,
        *,
        layers: int,
        experts: int,
        local: Iterable[tuple[int, int]],
        routes: Iterable[Route] = (),
        others: Mapping[tuple[int, int], tuple[str, ...]] | None = None,
    ) -> "Routing":
        """Make the snapshot of one node from the (layer, expert) keys it holds and its own routes.

        Routes win over what is held here: another node may be quicker than this one's disk. A route whose holder is
        its own ingress means this node. What is held here and has no route needs no call; `others` tells who else could
        be called for it, best first.
        """
        split: dict[tuple[int, int], list[Route]] = defaultdict(list)
        for route in routes:
            split[route.layer, route.expert].append(route)
        local = frozenset(local)
        spare = {key: names[0] for key, names in (others or {}).items() if key in local and names}
        own = {route.ingress for each in split.values() for route in each}
        named = {route.holder for each in split.values() for route in each}
        holders = tuple(sorted((named | set(spare.values())) - own))
        index = {holder: position for position, holder in enumerate(holders, start=1)} | dict.fromkeys(own, LOCAL)
        variants = _VARIANTS if any(len(each) > 1 for each in split.values()) else 1
        tables = np.full((variants, layers, experts), NOBODY, dtype=np.int32)
        for layer, expert in local:
            tables[:, layer, expert] = LOCAL
        for (layer, expert), each in split.items():
            ranked = sorted(each, key=lambda route: route.holder)
            shares = np.cumsum([route.share for route in ranked])
            draws = (np.arange(variants) * _GOLDEN) % 1.0 * shares[-1]
            picks = np.minimum(np.searchsorted(shares, draws, side="right"), len(ranked) - 1)
            tables[:, layer, expert] = np.array([index[route.holder] for route in ranked])[picks]
        table = np.full((layers, experts), NOBODY, dtype=np.int32)
        for key, name in spare.items():
            table[key] = index[name] or NOBODY
        return cls(epoch, holders, tables, table if spare else None)

    @classmethod
    def all_local(cls, epoch: int, *, layers: int, experts: int) -> "Routing":
        """Make the snapshot of a node that holds every expert."""
        return cls(epoch, (), np.zeros((1, layers, experts), dtype=np.int32))


class EpochBoard:
    """The routing of the current epoch, and how many steps run under each. Thread-safe.

    A step calls `begin` and `end`; whoever retires an epoch waits until no step of an older one is running.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._running: Counter[int] = Counter()
        self._changed = threading.Condition()

    @property
    def current(self) -> Routing:
        """The routing that a step beginning now would use."""
        return self._routing

    def install(self, routing: Routing) -> None:
        """Let steps that begin from now on use `routing`. Modifies."""
        with self._changed:
            self._routing = routing

    def begin(self) -> Routing:
        """Begin a step: return the current routing and count the step in its epoch. Modifies."""
        with self._changed:
            self._running[self._routing.epoch] += 1
            return self._routing

    def end(self, routing: Routing) -> None:
        """End a step begun with `routing`. Modifies."""
        with self._changed:
            self._running[routing.epoch] -= 1
            if not self._running[routing.epoch]:
                del self._running[routing.epoch]
                self._changed.notify_all()

    def oldest_running(self) -> int | None:
        """Return the oldest epoch that a running step uses, or None."""
        with self._changed:
            return min(self._running, default=None)

    def running_before(self, epoch: int) -> int:
        """Return how many steps of epochs before `epoch` are running."""
        with self._changed:
            return self._count_before(epoch)

    def wait_drained(self, epoch: int, *, timeout_s: float) -> bool:
        """Wait until no step of an epoch before `epoch` is running; False when time is up first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count_before(epoch), timeout_s)

    def _count_before(self, epoch: int) -> int:
        return sum(count for each, count in self._running.items() if each < epoch)
