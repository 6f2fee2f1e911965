"""Paths of placements of one layer, from one to another, the cheapest expert first.

Decides the order in which experts change their holders. Must not know memory limits: slots have prices.

The coverage of a layer by a place grows late and then steeply (SlimCaching, arXiv 2507.06567: not submodular), so
adding experts one by one goes wrong. Dropping one by one from a full layer does not: every event still whole is seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.solvers.latency.instance import Bools, Floats, Ints
from planner.solvers.latency.patterns import Indices, Layer


class Question:
    """One question (level, ingress) along a path: which experts are missing, and in how many of each event.

    `flip` modifies it. Events that miss an expert which stays missing are left out: nothing more can happen to them.
    """

    def __init__(self, experts: Indices, weight: Floats, now: Bools, then: Bools) -> None:
        self.now, self.then = now.copy(), then
        lost = now & then
        alive = ~lost[experts].any(axis=0)
        if not (now & ~then).any():
            alive &= then[experts].any(axis=0)
        self.experts, self.weight = experts[:, alive], weight[alive]
        self.count: Ints = now[self.experts].sum(axis=0)

    def effect(self) -> Floats:
        """Tokens per second that begin (or, negative, cease) to miss something when an expert flips, ``[E]``."""
        effect = np.zeros(len(self.now))
        worse, better = self.then & ~self.now, self.now & ~self.then
        if worse.any():
            effect += np.where(worse, self._carried(self.count == 0), 0.0)
        if better.any():
            effect -= np.where(better, self._carried(self.count == 1), 0.0)
        return effect

    def _carried(self, chosen: Bools) -> Floats:
        part = self.experts[:, chosen]
        weight = np.tile(self.weight[chosen], len(part))
        return np.bincount(part.ravel(), weight, minlength=len(self.now)).astype(np.float64)

    def flip(self, expert: int) -> bool:
        """Let an expert change; tell whether any event has it."""
        hit = (self.experts == expert).any(axis=0)
        worse = bool(self.then[expert])
        self.now[expert] = worse
        if not hit.any():
            return False
        if worse:
            keep = ~hit
            self.experts, self.weight, self.count = self.experts[:, keep], self.weight[keep], self.count[keep]
        else:
            self.count = self.count - hit
        return True


@dataclass(frozen=True, eq=False)
class Path:
    """Placements of one layer between two ends, bool ``[E, P]``.

    Attributes
    ----------
    order
        Experts in the order in which they change, int64 ``[F]``.
    wait
        Seconds waited per second after each change, float64 ``[F + 1]``.
    charge
        Price of the slots after each change, float64 ``[F + 1]``.
    """

    start: Bools
    end: Bools
    order: Ints
    wait: Floats
    charge: Floats

    @property
    def total(self) -> Floats:
        """Wait and price of slots together, ``[F + 1]``."""
        return self.wait + self.charge

    def walk(self) -> Iterator[tuple[int, Bools]]:
        """Yield every placement on the way; the array is the same one each time."""
        hold = self.start.copy()
        yield 0, hold
        for position, expert in enumerate(self.order, start=1):
            hold[expert] = self.end[expert]
            yield position, hold

    def at(self, position: int) -> Bools:
        """Return the placement after so many changes."""
        hold = self.start.copy()
        changed = self.order[:position]
        hold[changed] = self.end[changed]
        return hold


def relink(layer: Layer, start: Bools, end: Bools, price: Floats) -> Path:
    """Change experts from `start` to `end` one at a time, always the one that adds least wait and price."""
    open_ = (start != end).any(axis=1)
    saving = (end.astype(np.float64) - start) @ price
    now, then = layer.levels.missing(start), layer.levels.missing(end)
    pairs = np.argwhere((now != then).any(axis=2) & (layer.levels.step > 0))
    questions = [Question(layer.experts[i], layer.weight[i], now[j, i], then[j, i]) for j, i in pairs]
    step = layer.levels.step[tuple(pairs.T)]
    effects = np.array([question.effect() for question in questions]).reshape(len(pairs), layer.num_experts)
    order, wait, charge = [], [layer.wait(start)], [float((start @ price).sum())]
    for _ in range(int(open_.sum())):
        change = step @ effects
        expert = int(np.where(open_, change + saving, np.inf).argmin())
        order.append(expert)
        open_[expert] = False
        wait.append(wait[-1] + float(change[expert]))
        charge.append(charge[-1] + float(saving[expert]))
        for row, question in enumerate(questions):
            if question.now[expert] != question.then[expert]:
                effects[row] = (
                    question.effect()
                    if question.flip(expert)
                    else np.where(np.arange(layer.num_experts) == expert, 0.0, effects[row])
                )
    return Path(start, end, np.array(order, dtype=np.int64), np.array(wait), np.array(charge))
