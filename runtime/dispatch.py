"""One layer of one forward: the router's choice split by holder, remote calls begun, local experts run, all combined.

Decides what is computed where (from the step's `Routing`) and in which order results are added. Flow: rows sorted as
eager experts would compute them → calls through the port → local rows meanwhile → sum. Must not know sockets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import perf_counter
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.ahead import Foresight
from runtime.counters import Counts
from runtime.errors import CallFailed, ExpertUnavailable
from runtime.experts import Combine, ExpertCall, Rows, compute_rows, execute_call
from runtime.few import FEW_ROWS, Picked, compute_few, compute_taken, compute_token, pick, shares, token_call
from runtime.importance import NOBODY, Substitution
from runtime.lending import Low
from runtime.menu import Menu
from runtime.policy.menu import Rates
from runtime.routing import LOCAL, Routing
from runtime.slots import Residency
from runtime.streaming import Ahead
from runtime.timeline import Recorder, recorder
from schemas.precision import LowPrecision

__all__ = ["Combine", "Dispatcher", "ExpertCall", "ExpertCaller", "NoCaller", "PendingCall", "execute_call"]


_FEW_TOKENS: Final = 4  # more of them ask for most experts anyway


class PendingCall(Protocol):
    """A call under way."""

    def result(self) -> torch.Tensor:
        """Block until the answer is there; raises a `RuntimeFault` naming layer, expert and holder."""
        ...


class ExpertCaller(Protocol):
    """The port through which experts of other nodes are called. Used by one thread at a time."""

    def begin(self, call: ExpertCall) -> PendingCall:
        """Send a call and return at once. The tensors of `call` do not change until its result is taken."""
        ...


class NoCaller:
    """The port of a node that has no peers."""

    def begin(self, call: ExpertCall) -> PendingCall:
        """Fail: there is nobody to call."""
        raise CallFailed(call.layer, tuple(sorted(set(call.expert.tolist()))), call.holder, "this node has no peers")


class _Sent(NamedTuple):
    call: ExpertCall
    pending: PendingCall
    rows: NDArray[np.intp]  # which of the forward's rows
    token: NDArray[np.integer[Any]]  # [T'] which of the forward's tokens
    began: float


@dataclass
class Dispatcher:
    """Runs the routed experts of every layer of one step.

    Attributes
    ----------
    turn
        Which of the routing's variants layer 0 uses; the next layer uses the next.
    substitution
        Chooses other experts than the router did, where some are not at hand; exact if None.
    ahead
        Guesses what the next layer will ask for, so that it can be loaded meanwhile.
    rates
        How long calls took lately; shared by the steps of a node.
    timeline
        Takes a span for every layer's local experts and every wait for other nodes, where somebody wants them.
    spent_s
        Time in `run` so far, so that the rest of the step's time is the trunk's.
    logits
        [B, V], where whoever ran the layers has run the head too.
    """

    residency: Residency
    routing: Routing
    caller: ExpertCaller
    counts: Counts
    combine: Combine = "partial"
    turn: int = 0
    substitution: Substitution | None = None
    ahead: Foresight | None = None
    rates: Rates = field(default_factory=Rates)
    timeline: Recorder | None = field(default_factory=recorder)
    spent_s: float = field(default=0.0, init=False)
    logits: torch.Tensor | None = field(default=None, init=False)

    @cached_property
    def menu(self) -> Menu:
        """What may be done about experts that are not at hand."""
        return Menu(self.residency, self.routing, self.rates)

    def run(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts.

        Parameters
        ----------
        layer
            Counted among layers with experts.
        hidden, top_k_index, top_k_weights
            [T, D], [T, K] int64, [T, K].

        Returns
        -------
        torch.Tensor
            [T, D] in the dtype of `hidden`.
        """
        began = perf_counter()
        if self.ahead is not None:
            self.ahead.see(layer, top_k_index)
        combined = None
        if hidden.shape[0] == 1 and self.combine == "partial":
            combined = self._run_token(layer, hidden, top_k_index, top_k_weights)
        if combined is None:
            combined = self._run_rows(layer, hidden, top_k_index, top_k_weights)
        self.spent_s += perf_counter() - began
        self.counts.end_layer(layer)
        return combined

    def _run_token(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Do what `_run_rows` does for one token, whose partial sums are added, where nothing is to be decided.

        None, with nothing done, where an expert that is computed here is not at hand, or a policy has a say.
        """
        picked, planned = pick(layer, top_k_index, top_k_weights), self.routing.planned(self.turn + layer, layer)
        if any(map(planned.__getitem__, picked.experts)):
            return self._share_token(picked, planned, hidden)
        self._look_ahead(layer, hidden)
        local = self._run_token_here(picked, hidden)
        if local is None:
            return None
        self.counts.count_token(layer, picked.experts, remote_rows=0)
        self.counts.local_calls += 1
        return local.to(hidden.dtype)

    def _share_token(self, picked: Picked, planned: list[int], hidden: torch.Tensor) -> torch.Tensor | None:
        """Call the holders of one token's experts, compute the rest here, add everything up; None as `_run_token`."""
        layer, experts, others = picked.layer, picked.experts, shares(planned, picked.experts)
        if self.substitution is not None or self.menu.is_open(layer, experts) or others[0].holder < LOCAL:
            return None
        mine = others.pop(0).positions if others[0].holder == LOCAL else []
        sent = []
        for share in others:
            name, theirs = self.routing.holders[share.holder - 1], picked.some(share.positions)
            call = token_call(name, self.routing.epoch, theirs, hidden)
            sent.append(_Sent(call, self.caller.begin(call), np.array(share.positions), call.token, perf_counter()))
        self.counts.count_token(layer, experts, remote_rows=len(experts) - len(mine))
        self.counts.remote_calls += len(sent)
        self.counts.local_calls += bool(mine)
        self._look_ahead(layer, hidden)
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if mine:
            here = picked.some(mine)
            local = self._run_token_here(here, hidden)
            if local is None:
                weight = torch.from_numpy(here.weights).to(hidden.device)
                rows = Rows(np.zeros(len(mine), dtype=np.int64), np.array(here.experts), weight)
                local = self._run_local(layer, hidden, rows, None)
            total = local if local is not None else total
        for each in sent:
            total = total + self._answer(each)
        return total.to(hidden.dtype)

    def _run_token_here(self, picked: Picked, hidden: torch.Tensor) -> torch.Tensor | None:
        """Compute experts of one token here, [1, D] float32; None, with nothing done, if one is not at hand."""
        began = perf_counter()
        answer = compute_token(self.residency, picked, hidden, self.counts.tier_rows)
        if answer is None and self.substitution is not None and (low := self.substitution.any_low) is not None:
            copies = self.residency.take(picked.layer, picked.experts, low)
            if copies is not None:
                self.substitution.note_low(picked.layer, sum(len(copy.key) == 3 for copy in copies))
                answer = compute_taken(self.residency, picked, copies, hidden, self.counts.tier_rows)
        if answer is not None:
            self._note_local(picked.layer, began, len(picked.experts))
        return answer

    def _look_ahead(self, layer: int, hidden: torch.Tensor) -> None:
        """Let what the next layer will probably ask for be loaded meanwhile."""
        if self.ahead is not None and self.residency.is_caching and hidden.shape[0] <= _FEW_TOKENS:
            self.residency.prefetch(layer + 1, partial(self.ahead.guess, layer + 1, hidden))

    def _following(self, layer: int, hidden: torch.Tensor) -> Ahead | None:
        """Return what a prompt's next layer will ask for, to be loaded when this layer's loads are on their way."""
        if self.ahead is None or not self.residency.is_caching or hidden.shape[0] <= _FEW_TOKENS:
            return None
        return Ahead(layer + 1, partial(self.ahead.guess, layer + 1, hidden))

    def _run_rows(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Do what `run` does for any number of tokens."""
        tables = self.routing.tables
        holders = tables[(self.turn + layer) % len(tables), layer]  # [E]
        if self.substitution is None:
            rows = _sorted_rows(top_k_index, top_k_weights)
        else:
            at_hand = self.menu.at_hand(layer, holders)
            given, weights = self.substitution.apply(layer, top_k_index, top_k_weights, at_hand)
            rows = _present_rows(given, weights)
            if given is not top_k_index:  # what stood in once is not what text asks for
                rows = rows._replace(routed=_sorted_rows(top_k_index, top_k_weights))
        holder = holders[rows.expert]
        if hidden.shape[0] > _FEW_TOKENS or not self.menu.is_open(layer, rows.expert.tolist()):
            return self._run_sorted(layer, hidden, rows, holder)
        low = self.substitution.may_be_low(self._is_known_low(layer)) if self.substitution is not None else {}
        with self.menu.settled(layer, rows.expert.tolist(), holder.tolist(), low) as settled:
            return self._run_sorted(layer, hidden, rows, np.array(settled, dtype=np.int32))

    def _run_sorted(self, layer: int, hidden: torch.Tensor, rows: Rows, holder: NDArray[np.int32]) -> torch.Tensor:
        """Compute rows where it was decided, `holder` [R]."""
        if not self.routing.is_complete and (holder < LOCAL).any():
            missing = int(rows.expert[holder < LOCAL][0])
            raise ExpertUnavailable(layer, missing, f"any node in epoch {self.routing.epoch}")
        local = not holder.any()
        sent = [] if local else self._begin(layer, hidden, rows, holder)
        self._count(layer, rows, holder, sent, tokens=hidden.shape[0])
        self._look_ahead(layer, hidden)
        return self._combine(layer, hidden, rows, holder, sent)

    def _begin(self, layer: int, hidden: torch.Tensor, rows: Rows, holder: NDArray[np.int32]) -> list[_Sent]:
        """Begin one call per holder, in holder order."""
        sent = []
        for index in np.unique(holder[holder > LOCAL]):
            mine = np.flatnonzero(holder == index)
            name = self.routing.holders[index - 1]
            call, token = self._call(layer, name, hidden, rows, mine)
            sent.append(_Sent(call, self.caller.begin(call), mine, token, perf_counter()))
        return sent

    def _call(
        self, layer: int, holder: str, hidden: torch.Tensor, rows: Rows, mine: NDArray[np.intp]
    ) -> tuple[ExpertCall, NDArray[np.integer[Any]]]:
        """Make the call for rows `mine`, with just the tokens they need."""
        token, position = rows.token[mine], rows.token[mine]
        if hidden.shape[0] > 1:
            token, position = np.unique(token, return_inverse=True)
            hidden = hidden[torch.from_numpy(token)]
        else:
            token = token[:1]
        call = ExpertCall(
            holder=holder,
            epoch=self.routing.epoch,
            layer=layer,
            combine=self.combine,
            hidden=hidden.cpu(),
            token=position.astype(np.int32),
            expert=rows.expert[mine].astype(np.int32),
            weight=rows.weight[torch.from_numpy(mine)].cpu(),
        )
        return call, token

    def _count(self, layer: int, rows: Rows, holder: NDArray[np.int32], sent: list[_Sent], *, tokens: int) -> None:
        remote_rows = remote_tokens = 0
        if sent:
            remote_rows = sum(len(each.rows) for each in sent)
            remote_tokens = 1 if tokens == 1 else len(np.unique(rows.token[holder > LOCAL]))
        self.counts.count_layer(layer, rows.expert, tokens=tokens, remote_rows=remote_rows, remote_tokens=remote_tokens)
        self.counts.remote_calls += len(sent)
        self.counts.local_calls += remote_rows < len(rows.expert)

    def _combine(
        self, layer: int, hidden: torch.Tensor, rows: Rows, holder: NDArray[np.int32], sent: list[_Sent]
    ) -> torch.Tensor:
        """Run the local rows, take the answers, add everything up."""
        mine = np.flatnonzero(holder == LOCAL) if sent else None  # None: all rows
        local = self._run_local(layer, hidden, rows, mine)
        if self.combine == "partial":
            total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if local is None else local
            for each in sent:
                answer = self._answer(each)
                if len(answer) == len(hidden):
                    total = total + answer
                else:
                    total.index_add_(0, torch.from_numpy(each.token).to(total.device), answer)
            return total.to(hidden.dtype)
        if mine is None and local is not None:
            ordered = local
        else:
            ordered = torch.empty((len(rows.token), hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
            if local is not None and mine is not None:
                ordered[torch.from_numpy(mine)] = local
            for each in sent:
                ordered[torch.from_numpy(each.rows)] = self._answer(each)
        token = torch.from_numpy(rows.token).to(hidden.device)
        return torch.zeros_like(hidden).index_add_(0, token, ordered)

    def _run_local(
        self, layer: int, hidden: torch.Tensor, rows: Rows, mine: NDArray[np.intp] | None
    ) -> torch.Tensor | None:
        """Compute rows `mine` (all if None) here; None where there are none."""
        if mine is not None and not len(mine):
            return None
        began = perf_counter()
        if mine is not None:
            here = rows.weight[torch.from_numpy(mine)]
            rows = Rows(rows.token[mine], rows.expert[mine], here, rows.routed)
        answer = None
        if self.combine == "partial" and len(hidden) > 1 and len(rows.expert) <= FEW_ROWS:
            answer = compute_few(self.residency, layer, rows, hidden, self.counts.tier_rows)
        if answer is None:
            answer = compute_rows(
                self.residency,
                layer,
                rows,
                hidden,
                combine=self.combine,
                tier_rows=self.counts.tier_rows,
                low=self._low(layer, rows),
                ahead=self._following(layer, hidden),
            )
        self._note_local(layer, began, len(rows.expert))
        return answer

    def _low(self, layer: int, rows: Rows) -> Low | None:
        """Return which of the experts computed here may be had in low precision."""
        given = self.substitution
        if given is None or given.precision is None or not given.is_low:
            return None
        is_known = self._is_known_low(layer)
        if not self.residency.slack.prefers_low():  # what is here is used, and no more is brought
            is_known = partial(self._is_here_low, layer, given.precision)
        return given.take_low(layer, rows.expert, is_known)

    def _is_here_low(self, layer: int, precision: LowPrecision, expert: int) -> bool:
        return self.residency.precision_of((layer, expert)) == precision

    def _is_known_low(self, layer: int) -> Callable[[int], bool]:
        """Return what says whether an expert of a layer may be had in the precision of the substitution."""
        precision = self.substitution.precision if self.substitution is not None else None
        return lambda expert: precision in self.residency.low_precisions((layer, expert))

    def _note_local(self, layer: int, began: float, num_rows: int) -> None:
        now = perf_counter()
        self.counts.local_s += now - began
        if self.timeline is not None:
            self.timeline.add("experts here", f"layer {layer}", began, now, rows=num_rows)

    def _answer(self, sent: _Sent) -> torch.Tensor:
        began = perf_counter()
        answer = sent.pending.result()
        now = perf_counter()
        self.counts.wait_s += now - began
        call = sent.call
        self.menu.note_call(call.holder, call.layer, call.expert.tolist(), now - sent.began, now - began)
        if self.timeline is not None:
            about = f"layer {sent.call.layer} at {sent.call.holder}"
            self.timeline.add("waits for other nodes", about, began, now, rows=len(sent.rows))
        if tuple(answer.shape) != call.answer_shape or answer.dtype != call.answer_dtype:
            reason = f"answer is {answer.dtype} {tuple(answer.shape)}, expected {call.answer_dtype} {call.answer_shape}"
            raise CallFailed(call.layer, tuple(sorted(set(call.expert.tolist()))), call.holder, reason)
        return answer.to(self.residency.device)


def _sorted_rows(top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Rows:
    """Sort [T, K] choices into rows: by expert, then position in the top k, then token, as eager experts do."""
    num_tokens = top_k_index.shape[0]
    if num_tokens > 1:
        top_k_index, top_k_weights = top_k_index.t(), top_k_weights.t()
    chosen = top_k_index.reshape(-1).cpu().numpy()  # [K * T], position by position
    order = chosen.argsort(kind="stable")
    weight = top_k_weights.reshape(-1)[torch.from_numpy(order)].float()
    return Rows(order % num_tokens, chosen[order], weight)


def _present_rows(top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Rows:
    """Sort choices into rows, without those that nobody computes."""
    rows = _sorted_rows(top_k_index, top_k_weights)
    first = int((rows.expert == NOBODY).sum())
    return rows if not first else Rows(rows.token[first:], rows.expert[first:], rows.weight[first:])
