"""Between router and experts: other experts than the router's own, where a policy allows it and a budget is left.

Decides nothing itself: `runtime.policy` chooses, this turns router logits into ranked candidates and the choice back
into indices and weights. Flow: router's logits → `Substitution.see` → the layer's dispatch asks `Substitution.apply`
with what is at hand → indices, weights. A step without a substitution takes the exact path and pays nothing.

Axes: T tokens, E experts, K top-k, C candidates.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.counters import Counts
from runtime.policy.eviction import Bools
from runtime.policy.quality import Controller
from runtime.policy.routing import Choice, LowMissing, MassBudget, Probed, Routing
from runtime.policy.step import choose_each, choose_whole, low_experts
from runtime.routers import RouterRule, rank_experts, router_rule, routers_of
from runtime.skeleton import RoutedExperts
from schemas.precision import LowPrecision

NOBODY: Final = -1
"""Stands in an index where a token gets fewer than K experts."""

Tap = Callable[[Any, torch.Tensor], None]
Forward = Callable[["Substitution | None", bool], torch.Tensor]


@dataclass
class Substitution:
    """The substitution of one step.

    Attributes
    ----------
    is_whole
        Nothing is given up unless the layer then waits for nobody.
    lost
        Share of the top-K router mass given up, by layer, summed over tokens.
    charged
        The same, each token's times how much dearer it is than others.
    precision
        In which a missing expert may be had where the policy says so; as it is where None.
    low_rows
        Rows computed in that precision, by layer.
    replaced, spared
        Rows that another expert computes, or none; and (token, layer) events that would have waited and do not.
    probed
        What was given up only to see what that does, in the units of a budget's shares.
    """

    rule: RouterRule
    policy: Routing
    is_whole: bool
    precision: LowPrecision | None = None
    lost: dict[int, float] = field(default_factory=dict)
    charged: dict[int, float] = field(default_factory=dict)
    low_rows: dict[int, int] = field(default_factory=dict)
    replaced: dict[int, int] = field(default_factory=dict)
    spared: int = 0
    probed: float = 0.0
    _seen: tuple[Any, torch.Tensor] | None = None
    _low: list[int] = field(default_factory=list)

    def see(self, router: Any, logits: torch.Tensor) -> None:
        """Note what the router of the layer that runs next returned. Modifies."""
        self._seen = router, logits

    def apply(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, resident: Bools
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the tokens get instead of what the router chose, [T, K] each. Modifies the sums.

        Parameters
        ----------
        resident
            Whether each expert of the layer is at hand without a wait, bool [E].
        """
        self._low = []
        chosen = top_k_index.cpu().numpy()
        here = resident[chosen].all(axis=1)
        if self._seen is None or (here.all() and not isinstance(self.policy, Probed)):
            return top_k_index, top_k_weights
        router, logits = self._seen
        ids, scores = rank_experts(self.rule, router, logits, top_k_index, width=logits.shape[-1])
        choose = choose_whole if self.is_whole else choose_each
        ranked = ids.cpu().numpy(), scores.cpu().numpy().astype(np.float64)
        choices = choose(self.policy, layer, ranked, resident, chosen.shape[1])
        self._low = low_experts(choices) if self.precision is not None else []
        index, weights = top_k_index.clone(), top_k_weights.clone()
        for token, choice in enumerate(choices):
            self.probed += choice.probed
            changed = np.isin(chosen[token], choice.experts, invert=True)
            if changed.any():
                self.replaced[layer] = self.replaced.get(layer, 0) + int(changed.sum())
                self.spared += bool(resident[choice.experts].all() and not here[token])
                self.lost[layer] = self.lost.get(layer, 0.0) + choice.lost
                self.charged[layer] = self.charged.get(layer, 0.0) + choice.factor * choice.lost
                mass = float(ranked[1][token, : chosen.shape[1]].sum())
                index[token], weights[token] = self._row(choice, mass, index[token], weights[token])
        return index, weights

    @property
    def is_low(self) -> bool:
        """Whether an expert of the layer that `apply` was asked for last will do in low precision."""
        return bool(self._low)

    @property
    def any_low(self) -> LowPrecision | None:
        """The precision that will do for whatever is not at hand in a better one, so that nobody need be asked."""
        rule = self.policy
        return self.precision if isinstance(rule, LowMissing) and rule.share >= 1 else None

    def note_low(self, layer: int, rows: int) -> None:
        """Note rows computed in low precision. Modifies."""
        self.low_rows[layer] = self.low_rows.get(layer, 0) + rows

    def take_low(
        self, layer: int, experts: NDArray[np.integer[Any]], is_known: Callable[[int], bool]
    ) -> dict[int, LowPrecision]:
        """Return which experts of the layer that `apply` was asked for last are lent in low precision. Modifies sums.

        Parameters
        ----------
        experts
            Of each row computed here, [R].
        is_known
            Whether a record of an expert in this precision is.
        """
        if low := self.may_be_low(is_known):
            self.note_low(layer, int(np.isin(experts, list(low)).sum()))
        return low

    def may_be_low(self, is_known: Callable[[int], bool]) -> dict[int, LowPrecision]:
        """Return which experts of the layer that `apply` was asked for last will do in low precision."""
        if self.precision is None:
            return {}
        return dict.fromkeys(filter(is_known, self._low), self.precision)

    def count(self, counts: Counts) -> None:
        """Add the sums to a step's counts, which are modified."""
        for layer, rows in self.replaced.items():
            counts.count_replaced(layer, rows)
        counts.spared_events += self.spared
        counts.lost_mass += sum(self.lost.values())
        counts.low_rows += sum(self.low_rows.values())

    def _row(
        self, choice: Choice, mass: float, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one token's experts and weights, [K] each; nobody where there are fewer."""
        given = torch.from_numpy(choice.experts)
        row, scores = torch.full_like(index, NOBODY), torch.zeros(1, len(index))
        row[: len(given)] = given.to(index.device)
        scores[0, : len(given)] = torch.from_numpy(choice.scores).float()
        return row, self.rule.weights(scores, torch.full((1, 1), mass))[0].to(weights)


class Importance:
    """A node's substitution policy and the budget it is held to. Thread-safe.

    Parameters
    ----------
    is_whole
        See `Substitution.is_whole`: right where what is missing is asked of other nodes.
    precision
        See `Substitution.precision`.
    """

    def __init__(
        self, policy: Routing, controller: Controller, *, is_whole: bool, precision: LowPrecision | None = None
    ) -> None:
        self._policy = policy
        self._is_whole = is_whole
        self._precision = precision
        self._controller = controller
        self._lock = threading.Lock()

    @property
    def controller(self) -> Controller:
        """What has been spent; read it, do not modify it."""
        return self._controller

    def run(self, taps: "RouterTaps", forward: Forward, *, tokens: int, can_sample: bool) -> torch.Tensor:
        """Run a decode step of `tokens` sessions as the budget allows, sometimes both ways. Modifies the account.

        Parameters
        ----------
        forward
            Runs the step with a substitution (exactly if None) and returns logits or hidden states, [B, 1, …]; with
            True, on copies of what it modifies, to be thrown away.
        can_sample
            Whether `forward` returns logits.
        """
        with self._lock:
            is_open, policy = self._controller.is_open, _scaled(self._policy, self._controller.scale)
            is_sample = can_sample and self._controller.wants_sample
            wants_probe = can_sample and not is_sample and self._controller.wants_probe
        trial = self._substitution(taps, policy) if is_sample else None
        if wants_probe and isinstance(policy, MassBudget) and isinstance(self._policy, MassBudget):
            trial = self._substitution(taps, Probed(policy, self._policy))
        guess = forward(trial, True) if trial is not None else None
        substitution = self._substitution(taps, policy) if is_open and not is_sample else None
        answer = forward(substitution, False)
        with self._lock:
            given = (substitution.charged, substitution.low_rows) if substitution else ({}, {})
            self._controller.advance(tokens, taps.layers, *given)
            if guess is not None and trial is not None:
                self._learn(_divergence(answer, guess), taps.layers, None if is_sample else trial.probed / tokens)
        return answer

    def _substitution(self, taps: "RouterTaps", policy: Routing) -> Substitution:
        return Substitution(taps.rule, policy, self._is_whole, self._precision)

    def _learn(self, divergence: float, layers: tuple[int, ...], cost: float | None) -> None:
        """Tell the account how far a trial diverged; `cost` is what a probe gave up per token. Modifies."""
        if cost is None:
            self._controller.sample(divergence, layers)
        else:
            self._controller.probe(divergence, cost)

    def restart(self) -> None:
        """Warm up again: what is at hand has changed. Modifies."""
        with self._lock:
            self._controller.restart()


class RouterTaps:
    """Lets a substitution see what the routers of a model return; until it is first used, the model is as it was."""

    def __init__(self, model: Any) -> None:
        self.rule = router_rule(model.config)
        self.layers = tuple(module.layer for module in model.modules() if isinstance(module, RoutedExperts))
        self._model = model
        self._tap: ContextVar[Tap | None] = ContextVar("router tap", default=None)
        self._is_set = False
        self._lock = threading.Lock()

    @contextmanager
    def open(self, see: Tap) -> Iterator[None]:
        """Call `see` with (router, logits) for every router that runs in this thread meanwhile."""
        with self._lock:
            if not self._is_set:
                for router in routers_of(self._model):
                    router.register_forward_hook(self._on_router)
                self._is_set = True
        active = self._tap.set(see)
        try:
            yield
        finally:
            self._tap.reset(active)

    @property
    def seeing(self) -> Tap | None:
        """Who looks at the routers that run in this thread, for those who run a router without its module."""
        return self._tap.get()

    def _on_router(self, router: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        see = self._tap.get()
        if see is not None:
            see(router, output[0])


def _scaled(policy: Routing, scale: float) -> Routing:
    """Return a policy that gives up so many times as much; what has no shares stays as it is."""
    if isinstance(policy, LowMissing):
        return replace(policy, inner=_scaled(policy.inner, scale))
    return policy.scaled(scale) if isinstance(policy, MassBudget) else policy


def _divergence(exact: torch.Tensor, guess: torch.Tensor) -> float:
    """Return the mean KL divergence from exact to guessed logits, nats per token."""
    want, got = (logits.float().log_softmax(-1) for logits in (exact, guess))
    return float((want.exp() * (want - got)).sum(-1).mean())
