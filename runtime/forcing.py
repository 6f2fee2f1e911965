"""Running text with its own tokens while a policy chooses experts from what would be at hand: its cost, its savings.

Decides nothing: a policy chooses, an eviction makes room, this counts. Each layer chooses token after token in decode
order among what its cache, or a plan, has at hand then, so that a whole text takes a few forwards. Must not know
budgets.

Axes: N pieces, T tokens, L layers, E experts, K top-k.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.policy.eviction import FAST, STEADY_FAST_SHARE, STEADY_SLOW, Bools, Floats, Ints
from runtime.policy.quality import Controller
from runtime.policy.routing import Choice, Exact, MassBudget, Probed, Routing
from runtime.policy.uses import Estimates, Uses
from runtime.routers import RouterRule, rank_experts, router_rule, routers_of

WARMUP: Final = 64  # tokens until a cold cache is what the text asks for
_BATCH: Final = 8  # pieces of one forward
_KEPT: Final = 64

Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a router returns: logits [T, E], weights [T, K], index [T, K]."""


@dataclass(frozen=True, eq=False)
class Supply:
    """What is at hand in each layer while text runs: a cache's content, or what a plan places here.

    Attributes
    ----------
    capacity
        Experts of each layer that the cache holds, at first none; its eviction is ``steady``, or ``lru``.
    masks
        Instead of a cache: whether each expert is at hand, bool [L, E].
    uses
        What the cache evicts by instead of ``steady``.
    """

    layers: int
    experts: int
    capacity: int = 0
    masks: Bools | None = None
    uses: Uses | None = None

    def holding(self, top_k: int, *, is_lru: bool) -> "Sequence[Placed | Cached]":
        """Return what is at hand in each layer before the text begins."""
        if self.masks is not None:
            return [Placed(resident) for resident in self.masks]
        estimates = Estimates(self.uses) if self.uses is not None else None
        return [
            Cached(
                self.experts,
                self.capacity,
                top_k,
                is_lru=is_lru,
                expected=partial(estimates.advance, layer) if estimates is not None else None,
            )
            for layer in range(self.layers)
        ]


class Placed:
    """Experts that stay where they are; what is missing is called, and waited for once, however much it is."""

    warmup = 0

    def __init__(self, resident: Bools) -> None:
        self.resident = resident

    def begin(self, _: Ints, __: Floats) -> None:
        """Take in what the router chose for the next tokens. Does not modify."""

    def request(self, _: int, experts: list[int]) -> int:
        """Return whether a token's experts have to be waited for. Does not modify."""
        return int(not self.resident[experts].all())


class Cached:
    """One layer's cache, evicting as `runtime.policy.eviction` does, with the worth of all tokens computed at once.

    Parameters
    ----------
    expected
        Says what keeping each expert is worth after each of some tokens, [T, E], of what they chose and its scores,
        [T, K].
    """

    warmup = WARMUP

    def __init__(
        self,
        experts: int,
        capacity: int,
        top_k: int,
        *,
        is_lru: bool = False,
        expected: Callable[[Ints, Floats], NDArray[Any]] | None = None,
    ) -> None:
        self.resident: Bools = np.zeros(experts, dtype=bool)
        self._expected = expected
        self._capacity, self._top_k, self._is_lru = capacity, top_k, is_lru
        self._rates = np.zeros((2, experts))
        self._used = [-1] * experts
        self._now = 0
        self._worth: list[list[float]] = []

    def begin(self, ids: Ints, scores: Floats) -> None:
        """Take in what the router chose for the next tokens, and its scores, [T, C]. Modifies."""
        if self._is_lru:
            return
        if self._expected is not None:
            self._worth = self._expected(ids[:, : self._top_k], scores[:, : self._top_k]).tolist()
            return
        decay = np.array([[FAST], [STEADY_SLOW]])
        worth = np.empty((len(ids), len(self.resident)))
        for token, chosen in enumerate(ids[:, : self._top_k]):
            self._rates *= decay
            self._rates[:, chosen] += 1 - decay
            worth[token] = STEADY_FAST_SHARE * self._rates[0] + (1 - STEADY_FAST_SHARE) * self._rates[1]
        self._worth = worth.tolist()

    def request(self, token: int, experts: list[int]) -> int:
        """Load what is missing of a token's experts, of those begun; return how many. Modifies."""
        self._now += 1
        for expert in experts if self._is_lru else ():
            self._used[expert] = self._now
        loads = [expert for expert in experts if not self.resident[expert]]
        if not loads:
            return 0
        held = np.flatnonzero(self.resident).tolist()
        worth = self._used if self._is_lru else self._worth[token]
        free = sorted((expert for expert in held if expert not in experts), key=worth.__getitem__)
        self.resident[free[: max(0, len(held) + len(loads) - self._capacity)]] = False
        self.resident[loads] = True
        return len(loads)


@dataclass
class Run:
    """What one pass over the text led to.

    Attributes
    ----------
    nll
        Mean negative log-likelihood of each piece, float64 [N].
    divergence
        Mean KL divergence from the exact run; nats.
    waits
        Loads, or waiting events, per token and layer [L].
    lost
        Lost share of top-K mass per token by layer [L], each token's times its factor (`routing.Choice`).
    slopes
        KL divergence for each unit of cost that probes gave up, by forward; empty where nothing was probed.
    """

    nll: Floats
    divergence: float
    waits: Floats
    lost: Floats
    slopes: tuple[float, ...] = ()


class Kept(NamedTuple):
    """The likeliest successors of a piece's tokens, [T, 64] each: any vocabulary fits into memory."""

    log_prob: torch.Tensor
    token: torch.Tensor


@dataclass
class Bench:
    """A model, text and what is at hand: runs the text under any policy.

    Attributes
    ----------
    pieces
        Token ids int64 [N, T + 1]: each token's successor is what it should predict.
    """

    model: Any
    pieces: torch.Tensor
    supply: Supply
    top_k: int
    on_run: Callable[[], None] = lambda: None
    _exact: list[Kept] = field(default_factory=list)

    def run(
        self,
        policy: Routing,
        *,
        stride: int = 1,
        keep: bool = False,
        is_lru: bool = False,
        account: Controller | None = None,
    ) -> Run:
        """Run the text.

        Parameters
        ----------
        stride
            Run only every so-manieth piece.
        keep
            Whether to keep the predictions, as those that later runs diverge from, instead of any before.
        is_lru
            Evict what was least recently used.
        account
            Told of probes, by which it scales what the policy may give up, from forward to forward: `policy` is a
            `MassBudget` then. What is given up is not paid from it.
        """
        text, rule = self.pieces[::stride], router_rule(self.model.config)
        self._exact = [] if keep else self._exact
        choosers = [
            _Chooser(layer, rule, policy, held, self.top_k)
            for layer, held in enumerate(self.supply.holding(self.top_k, is_lru=is_lru))
        ]
        routers = routers_of(self.model)
        hooks = [router.register_forward_hook(each) for router, each in zip(routers, choosers, strict=True)]
        nll: list[torch.Tensor] = []
        slopes: list[float] = []
        divergence = 0.0
        try:
            with torch.inference_mode():
                for number, batch in enumerate(torch.split(text, _BATCH)):
                    first = number * _BATCH * stride
                    if account is not None and isinstance(policy, MassBudget):
                        for each in choosers:
                            each.begin(policy, account)
                    predicted = self.model(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
                    nll.append(-predicted.gather(-1, batch[:, 1:, None])[..., 0].double().mean(1))
                    if keep:
                        self._exact += [
                            Kept(*kept)
                            for kept in zip(*predicted.topk(min(_KEPT, predicted.shape[-1] - 1), dim=-1), strict=True)
                        ]
                    elif self._exact:
                        exact = self._exact[first : first + len(batch) * stride : stride]
                        divergence += sum(map(_divergence, exact, predicted))
                    if account is not None:
                        slope = self._probe(batch, predicted, choosers, account)
                        slopes += [slope] if 2 * len(batch) >= _BATCH or not slopes else []
        finally:
            for hook in hooks:
                hook.remove()
        tokens = text.shape[0] * (text.shape[1] - 1)
        waits, lost = (np.array([getattr(each, name) for each in choosers]) / tokens for name in ("waits", "lost"))
        self.on_run()
        return Run(torch.cat(nll).numpy(), divergence / tokens, waits, lost, tuple(slopes))

    def _probe(
        self, batch: torch.Tensor, predicted: torch.Tensor, choosers: "list[_Chooser]", account: Controller
    ) -> float:
        """Run pieces once more with a little more given up for some tokens; returns its slope. Modifies the account."""
        for each in choosers:
            each.is_probing = True
        probed = self.model(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        tokens = sorted(choosers[0].probes)
        want, got = predicted.flatten(0, 1)[tokens], probed[tokens]
        diverged = (want.exp() * (want - got)).sum(-1).tolist()
        costs = [sum(each.probes[token].cost for each in choosers) for token in tokens]
        for divergence, cost in zip(diverged, costs, strict=True):
            account.probe(divergence, cost)
        return float(sum(diverged) / max(sum(costs), 1e-12))


@dataclass
class _Probe:
    """A token that is run once more: what was at hand, and what was given up then."""

    resident: Bools
    cost: float = 0.0


@dataclass
class _Chooser:
    """A hook on a layer's router that lets a policy choose instead, token by token."""

    layer: int
    rule: RouterRule
    policy: Routing
    held: Placed | Cached
    top_k: int
    seen: int = 0
    waits: float = 0.0
    lost: float = 0.0
    probe: Probed | None = None
    probe_every: int = 0
    probes: dict[int, _Probe] = field(default_factory=dict)
    is_probing: bool = False
    _given: Output | None = None

    def begin(self, budget: MassBudget, account: Controller) -> None:
        """Give up as much as an account allows in the next forward, and be probed after it. Modifies."""
        self.policy = budget.scaled(account.scale)
        self.probe, self.probe_every = Probed(self.policy, budget), account.allowance.probe_every
        self.probes, self.is_probing = {}, False

    def __call__(self, router: Any, _: Any, output: Output) -> Output:
        """Return what the router returned, changed where the policy chose otherwise."""
        if self.is_probing:
            return self._probed(router, output)
        ranked, scores = rank_experts(self.rule, router, output[0], output[2], width=output[0].shape[-1])
        ids, values = ranked.numpy(), scores.double().numpy()
        changed: dict[int, Choice] = {}
        at_hand = self.held.resident  # changes as experts come and go
        self.held.begin(ids, values)
        for token, chosen in enumerate(ids[:, : self.top_k].tolist()):
            if self.probe is not None and token % self.probe_every == self.probe_every // 2:
                self.probes[token] = _Probe(at_hand.copy())
            if all(map(at_hand.__getitem__, chosen)):
                self.held.request(token, chosen)
                continue
            policy = self.policy if self.seen + token >= self.held.warmup else Exact()
            choice = policy.choose(self.layer, ids[token], values[token], at_hand, self.top_k)
            self.waits += self.held.request(token, choice.experts.tolist())
            if choice.lost > 0:
                self.lost += choice.factor * choice.lost
                changed[token] = choice
        self.seen += len(ids)
        self._given = _rewritten(self.rule, output, changed, scores[:, : self.top_k].sum(-1))
        return self._given

    def _probed(self, router: Any, output: Output) -> Output:
        """Return what the last forward returned, but for the tokens that are probed. Modifies their cost."""
        if self._given is None or self.probe is None:
            return output
        tokens = sorted(self.probes)
        ranked, scores = rank_experts(
            self.rule, router, output[0][tokens], output[2][tokens], width=output[0].shape[-1]
        )
        changed = {}
        for token, ids, values in zip(tokens, ranked.numpy(), scores.double().numpy(), strict=True):
            choice = self.probe.choose(self.layer, ids, values, self.probes[token].resident, self.top_k)
            self.probes[token].cost = choice.probed
            changed[token] = choice
        mass = self._given[1].new_zeros(len(output[0]))
        mass[tokens] = scores[:, : self.top_k].sum(-1).to(mass)
        return _rewritten(self.rule, self._given, changed, mass)


def _rewritten(rule: RouterRule, output: Output, changed: dict[int, Choice], mass: torch.Tensor) -> Output:
    """Return the router's output with the changed tokens' choices; mass is that of the router's own, [T]."""
    logits, weights, index = output
    if not changed:
        return output
    index, weights, width = index.clone(), weights.clone(), index.shape[1]
    rows = torch.tensor(list(changed))
    index[rows] = torch.from_numpy(np.stack([_filled(choice.experts, width) for choice in changed.values()])).to(index)
    scores = torch.from_numpy(np.stack([_filled(choice.scores, width, 0.0) for choice in changed.values()])).float()
    weights[rows] = rule.weights(scores, mass[rows, None].float()).to(weights)
    return logits, weights, index


def _filled(values: NDArray[Any], width: int, filler: float | None = None) -> NDArray[Any]:
    """Fill a choice of fewer than K up to [K], by its own first value where none is given."""
    return np.concatenate([values, np.full(width - len(values), values[0] if filler is None else filler, values.dtype)])


def _divergence(exact: Kept, predicted: torch.Tensor) -> float:
    """Return the KL divergence of a piece summed over tokens, nats; what is not kept counts as one token."""
    got = predicted.gather(-1, exact.token)
    want_rest, got_rest = ((1 - each.exp().sum(-1)).clamp_min(1e-6) for each in (exact.log_prob, got))
    kept = (exact.log_prob.exp() * (exact.log_prob - got)).sum(-1)
    return float((kept + want_rest * (want_rest / got_rest).log()).sum())


def cut_pieces(texts: Iterable[Sequence[int]], *, window: int, max_tokens: int) -> torch.Tensor:
    """Join token ids and cut at most `max_tokens` into pieces, int64 [N, window + 1]; neighbours share one token."""
    ids: list[int] = []
    for text in texts:
        ids += text
        if len(ids) > max_tokens:
            break
    starts = range(0, min(len(ids) - 1, max_tokens) - window + 1, window)
    return torch.tensor([ids[start : start + window + 1] for start in starts], dtype=torch.int64).view(-1, window + 1)
