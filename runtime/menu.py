"""The menu for experts that are not at hand, on this machine as it is now: which ways there are, and what each takes.

Decides nothing: `policy.menu` chooses among the ways; `policy.routing` and `policy.quality` have said before what may
be given up: a substitute or nobody (skipping, as AdapMoE and HOBBIT do), which nothing is waited for, or bits.
Times are moving averages of what loads and calls took lately. Must not know sockets.

===========  ==================================================================  ==========================
way          where                                                               takes
===========  ==================================================================  ==========================
here         in a slot of this node, by plan, cache or as a guest                nothing
load         from this node's host memory, disk or store into a slot             a load, one after the other
load low     the same in fewer bits, where the quality budget allows it          a shorter one
in place     in host memory beside a CUDA device, by the processor (`ways`)      by how many tokens it gets
call         at a node that holds it                                             a call, shared by all for it
bring        from a peer or the store into a slot, in the background             no step waits for it (`guests`)
===========  ==================================================================  ==========================
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.lending import Low
from runtime.policy.menu import Rates, Way, choose
from runtime.routing import LOCAL, Routing
from runtime.slots import Residency


@dataclass(frozen=True)
class Menu:
    """Ways of one step.

    Attributes
    ----------
    rates
        How long calls took lately; shared by the steps of a node.
    """

    residency: Residency
    routing: Routing
    rates: Rates

    def is_open(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether one of these experts may be computed elsewhere than the plan says."""
        if self.routing.others is not None and self.residency.is_caching:
            return True
        return self.residency.has_guest(layer, experts)

    def at_hand(self, layer: int, holders: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each expert of a layer is computed here without a wait, bool [E]; `holders` are the plan's, [E]."""
        ready = self.residency.at_hand(layer, len(holders))
        here = holders == LOCAL
        for expert in np.flatnonzero(ready & ~here).tolist():
            here[expert] = (layer, expert) in self.residency.guests
        return np.asarray(ready & here)

    @contextmanager
    def settled(
        self, layer: int, experts: Sequence[int], planned: Sequence[int], low: Low | None = None
    ) -> Iterator[list[int]]:
        """Say who computes each expert, where this node could as well as another; like `planned`.

        What is in memory here is computed here, and guests stay meanwhile; what would have to be loaded goes the way
        that is done first.

        Parameters
        ----------
        low
            Experts that will do in a low precision.
        """
        settled = self._choose(layer, experts, planned, low or {})
        triples = list(zip(experts, planned, settled, strict=True))
        guests = sorted({e for e, was, now in triples if was > LOCAL == now and (layer, e) in self.residency.guests})
        copies = self.residency.take(layer, guests) if guests else []
        if copies is None:  # one was sent away just now
            settled = [was if e in guests else now for e, was, now in triples]
        try:
            yield settled
        finally:
            if copies:
                self.residency.release(copies)

    def _choose(self, layer: int, experts: Sequence[int], planned: Sequence[int], low: Low) -> list[int]:
        chosen, undecided = list(planned), []
        ways: list[list[Way]] = []
        is_caching, guests = self.residency.is_caching, self.residency.guests
        for place, (expert, holder) in enumerate(zip(experts, planned, strict=True)):
            tier = self.residency.tier_of((layer, expert))
            if tier is None or not (is_caching or (layer, expert) in guests):
                continue
            other = holder if holder > LOCAL else self._other(layer, expert)
            here = self._here(layer, expert, low)
            if not here:
                chosen[place] = LOCAL
            elif other > LOCAL:
                undecided.append((place, other))
                ways.append([*here, self._call(other)])
        for (place, other), each, way in zip(undecided, ways, choose(ways), strict=True):
            chosen[place] = other if way == len(each) - 1 else LOCAL
        return chosen

    def _here(self, layer: int, expert: int, low: Low) -> list[Way]:
        """Return the ways of computing an expert here; none of them where nothing has to be done first."""
        ways, precision = self.residency.ways, low.get(expert)
        exact = ways.of((layer, expert), 1)
        return ways.of((layer, expert, precision), 1) if exact and precision is not None else exact

    def _other(self, layer: int, expert: int) -> int:
        """Return another node that has what is held here, or nobody."""
        return LOCAL if self.routing.others is None else int(self.routing.others[layer, expert])

    def _call(self, holder: int) -> Way:
        """Return the way to a holder; what was never tried is tried."""
        name = self.routing.holders[holder - 1]
        return Way(name, self.rates.seconds(name) or 0.0, is_shared=True)

    def note_call(self, holder: str, layer: int, experts: Sequence[int], seconds: float, waited_s: float) -> None:
        """Note what a call took, and what was waited for it; experts may come to be guests. Modifies the rates."""
        self.rates.observe(holder, seconds)
        self.residency.note_call([(layer, expert) for expert in experts], waited_s)
