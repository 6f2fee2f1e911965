"""Whether a new placement is worth moving to: when to look for one, and what it must bring.

Decides in two steps. `Watcher` says when to look: enough tokens for a first plan, or a workload that changed and
enough tokens since. `decide` says whether to move: the saving that is sure to be there, over a horizon, against the
seconds that moving takes. The saving is judged on tokens that the candidate was not made from, since a placement
always looks better on its own. Pure: time, transfers and solving are the caller's. Must not know how a candidate was
found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from planner.moved import Arranged, migration_seconds, moved_bytes
from planner.objective import Routing, path_seconds, prompt_part_seconds
from planner.problem import Bools, Events, Floats, Ints, Problem
from planner.statistics import Detector, Sensitivity, count_events, detector_of


def dancemoe_adopts(cost_now_s: float, cost_then_s: float, migration_s: float) -> bool:
    """Adopt a plan only if C(P') + T_mig < C(P): DanceMoE's rule (arXiv 2508.12851), asked every five minutes there.

    Costs are those of the tokens of one such interval. It takes estimated costs at their word.
    """
    return cost_then_s + migration_s < cost_now_s


class Arrangement(NamedTuple):
    """How a cluster is arranged: placement ``[P, L, E]``, who serves whom, and where the trunk runs, int64 ``[I, L]``.

    Without a trunk of its own it is that of the problem.
    """

    placed: Bools
    routing: Routing
    trunk: Ints | None = None

    def problem(self, problem: Problem) -> Problem:
        """Return a problem with the trunk of this arrangement, which is not asked whether it fits."""
        return problem if self.trunk is None else replace(problem, trunk_node=self.trunk)


_LEAST_BATCHES: Final = 4  # to judge on; fewer give no error


@dataclass(frozen=True, kw_only=True)
class MovingRules:
    """What a move must bring.

    Attributes
    ----------
    horizon_s
        How long the workload is expected to stay as it is.
    surety
        Standard errors that are taken off an estimated saving before it counts.
    margin
        A move must bring this much more than it costs, so that two placements of about equal worth do not alternate.
    least_gain
        Share of the seconds that tokens take now that a move must save.
    max_bytes
        Most bytes that a move may bring to nodes; None for no limit.
    """

    horizon_s: float = 300.0
    surety: float = 2.0
    margin: float = 0.25
    least_gain: float = 0.01
    max_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether to move and why. All figures in seconds that tokens wait, over the horizon.

    Attributes
    ----------
    benefit_s, sure_benefit_s
        Expected; less the standard errors that rules ask for.
    cost_s
        Seconds of transfers.
    uncertain
        More tokens may change a decision not to move.
    """

    move: bool
    uncertain: bool
    benefit_s: float
    sure_benefit_s: float
    cost_s: float
    moved_bytes: int
    reason: str


def token_waits(problem: Problem, routing: Routing, events: Sequence[Events]) -> list[Floats]:
    """Seconds that each token waits for experts, float64 ``[T]`` by ingress: each layer for its slowest call."""
    if routing.share is None:
        wait = problem.cost_s[np.arange(problem.num_nodes)[:, None, None], routing.holder]
    else:
        wait = np.einsum("np,nple->nle", problem.cost_s, routing.share)
    layers = np.arange(problem.layers)
    return [
        wait[trunk, layers][layers[None, :, None], seen].max(axis=2).sum(axis=1)
        for trunk, seen in zip(problem.trunk_node, events, strict=True)
    ]


def _token_seconds(problem: Problem, arranged: Arrangement, batches: Sequence[Sequence[Events]]) -> Floats:
    """Seconds of a token, waits, its path and its part of a prompt, by batch and ingress, float64 ``[B, I]``."""
    there = arranged.problem(problem)
    waits = [[part.mean() for part in token_waits(there, arranged.routing, batch)] for batch in batches]
    return np.asarray(np.array(waits) + path_seconds(there) + prompt_part_seconds(there, arranged.routing))


def saving(
    problem: Problem, now: Arrangement, then: Arrangement, batches: Sequence[Sequence[Events]]
) -> tuple[float, float, float]:
    """Seconds saved per second, their standard error, and seconds that tokens take now per second.

    Parameters
    ----------
    batches
        By batch, then ingress. Tokens of a batch may be alike, so the error is taken between batches.
    """
    before, after = (_token_seconds(problem, arranged, batches) for arranged in (now, then))
    saved = (before - after) @ problem.tokens_per_s  # [batches]
    count = len(saved)
    # Student's t is wider than the normal by this factor: few batches say little about their own spread
    error = float(saved.std(ddof=1) * np.sqrt((count - 1) / (count - 3) / count)) if count > 3 else np.inf
    return float(saved.mean()), error, float((before @ problem.tokens_per_s).mean())


def decide(
    problem: Problem,
    *,
    now: Arrangement,
    then: Arrangement,
    judged_on: Sequence[Sequence[Events]],
    rules: MovingRules,
    cost_s: float | None = None,
) -> Decision:
    """Decide whether to move from one arrangement to another.

    Parameters
    ----------
    judged_on
        Batches, by ingress each, that `then` was not made from.
    cost_s
        Seconds that moving costs; those of its transfers one after the other where None.
    """
    saved, error, waited = saving(problem, now, then, judged_on)
    benefit, doubt = saved * rules.horizon_s, rules.surety * error * rules.horizon_s
    there = Arranged(now.placed, now.trunk), Arranged(then.placed, then.trunk)
    price = migration_seconds(problem, *there) if cost_s is None else cost_s
    moved = moved_bytes(problem, *there)
    hurdle = max(price * (1 + rules.margin), rules.least_gain * waited * rules.horizon_s)
    if rules.max_bytes is not None and moved > rules.max_bytes:
        move, uncertain, reason = False, False, f"would move {moved} bytes, above the limit of {rules.max_bytes}"
    elif benefit - doubt > hurdle:
        move, uncertain, reason = (
            True,
            False,
            f"saves {benefit - doubt:.3g} s for sure, against {price:.3g} s of moving",
        )
    elif benefit + doubt > hurdle:
        move, uncertain, reason = False, True, f"saves {benefit:.3g} s, give or take {doubt:.3g} s: not sure enough"
    else:
        move, uncertain, reason = False, False, f"saves {benefit:.3g} s, less than the {hurdle:.3g} s it must bring"
    return Decision(
        move=move,
        uncertain=uncertain,
        benefit_s=benefit,
        sure_benefit_s=benefit - doubt,
        cost_s=price,
        moved_bytes=moved,
        reason=reason,
    )


@dataclass(frozen=True, eq=False)
class Watcher:
    """When to look for a new placement: what was routed since the last change, and a detector per ingress.

    Attributes
    ----------
    recent
        Batches since the last known change, by ingress each; the oldest go when there are too many.
    wanted
        Tokens of each ingress that a look needs; 0 while there is no cause to look.
    unlooked
        Tokens over all ingresses since the last look. Drift that is too slow for detectors is met by a look now and
        then.
    """

    experts: int
    sensitivity: Sensitivity
    look_tokens: int
    review_tokens: int
    most_batches: int
    detectors: tuple[Detector, ...]
    recent: tuple[tuple[Events, ...], ...]
    wanted: int
    unlooked: int = 0

    @property
    def tokens(self) -> int:
        """Tokens seen since the last change at the ingress with fewest."""
        return min(sum(len(batch[ingress]) for batch in self.recent) for ingress in range(len(self.detectors)))

    @property
    def ready(self) -> bool:
        """Whether to look for a new placement now."""
        asked = 0 < self.wanted <= self.tokens or self.unlooked >= self.review_tokens
        return asked and len(self.recent) >= 2 * _LEAST_BATCHES

    @property
    def halves(self) -> tuple[tuple[tuple[Events, ...], ...], tuple[tuple[Events, ...], ...]]:
        """Batches to make a candidate from, and batches to judge it on: every other one."""
        return self.recent[0::2], self.recent[1::2]

    def after(self, batch: tuple[Events, ...]) -> "Watcher":
        """Return the watcher after a batch of events by ingress."""
        counted = [count_events(events, self.experts) for events in batch]
        seen = tuple(
            detector.after(window, self.sensitivity) if window.tokens else detector
            for detector, window in zip(self.detectors, counted, strict=True)
        )
        recent = (*self.recent, batch)[-self.most_batches :]
        fresh = sum(len(events) for events in batch)
        grown = replace(self, detectors=seen, recent=recent, unlooked=self.unlooked + fresh)
        changed = [detector for detector in seen if detector.has_changed(self.sensitivity)]
        return grown._restarted(max(detector.since for detector in changed)) if changed else grown

    def after_look(self, decision: Decision | None) -> "Watcher":
        """Return the watcher after a look: it waits for a change, or for twice the tokens where more may tell."""
        again = decision is not None and decision.uncertain and self.tokens * 2 <= self._most_tokens()
        return replace(self, wanted=2 * self.tokens if again else 0, unlooked=0)

    def _most_tokens(self) -> int:
        return self.tokens * self.most_batches // max(len(self.recent), 1)

    def _restarted(self, batches: int) -> "Watcher":
        """Forget what was before the last `batches`, and look again once there is enough of the new."""
        recent = self.recent[-batches:]
        fresh = replace(
            self,
            detectors=tuple(detector_of(count_events(events, self.experts)) for events in recent[0]),
            recent=recent[:1],
            wanted=self.look_tokens,
        )
        for batch in recent[1:]:
            fresh = fresh.after(batch)
        return fresh


def watch(
    first: tuple[Events, ...],
    experts: int,
    sensitivity: Sensitivity | None = None,
    *,
    look_tokens: int = 1024,
    review_tokens: int = 200_000,
    most_batches: int = 256,
) -> Watcher:
    """Begin to watch with a first batch of events by ingress; the first look comes after `look_tokens` of each."""
    return Watcher(
        experts=experts,
        sensitivity=sensitivity or Sensitivity(),
        look_tokens=look_tokens,
        review_tokens=review_tokens,
        most_batches=most_batches,
        detectors=tuple(detector_of(count_events(events, experts)) for events in first),
        recent=(first,),
        wanted=look_tokens,
    )


def joined(batches: Sequence[Sequence[Events]]) -> tuple[Events, ...]:
    """Join batches into one array of events ``[T, L, K]`` per ingress."""
    return tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))


Solve = Callable[[Problem], Arrangement]


def look(
    watcher: Watcher, problem: Problem, now: Arrangement, solve: Solve, rules: MovingRules
) -> tuple[Decision, Arrangement, Watcher]:
    """Make a candidate from half of what was seen lately, judge it on the other half, and decide.

    Parameters
    ----------
    solve
        Finds an arrangement for a problem.

    Returns
    -------
    tuple
        The decision, the arrangement to be in force from now on, and the watcher after the look.
    """
    placing, judging = watcher.halves
    candidate = solve(problem.judged_on(joined(placing)))
    decision = decide(problem, now=now, then=candidate, judged_on=judging, rules=rules)
    return decision, candidate if decision.move else now, watcher.after_look(decision)
