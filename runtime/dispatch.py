"""One layer of one forward: the router's choice split by holder, remote calls begun, local experts run, all combined.

Decides what is computed where (from the step's `Routing`) and in which order results are added. Flow: rows sorted as
eager experts would compute them → calls through the port → local rows meanwhile → sum. Must not know sockets.
"""

from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.ahead import NextRouters
from runtime.counters import Counts
from runtime.errors import CallFailed, ExpertUnavailable
from runtime.experts import Combine, ExpertCall, Rows, compute_rows, execute_call
from runtime.importance import NOBODY, Substitution
from runtime.policy.menu import Rates, Way, choose
from runtime.routing import LOCAL, Routing
from runtime.slots import Residency
from runtime.timeline import Recorder, recorder

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
    """

    residency: Residency
    routing: Routing
    caller: ExpertCaller
    counts: Counts
    combine: Combine = "partial"
    turn: int = 0
    substitution: Substitution | None = None
    ahead: NextRouters | None = None
    rates: Rates = field(default_factory=Rates)
    timeline: Recorder | None = field(default_factory=recorder)
    spent_s: float = field(default=0.0, init=False)

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
        tables = self.routing.tables
        holders = tables[(self.turn + layer) % len(tables), layer]  # [E]
        if self.substitution is None:
            rows = _sorted_rows(top_k_index, top_k_weights)
        else:
            at_hand = (holders == LOCAL) & self.residency.at_hand(layer, len(holders))
            rows = _present_rows(*self.substitution.apply(layer, top_k_index, top_k_weights, at_hand))
        holder = holders[rows.expert]
        if self.routing.others is not None and hidden.shape[0] <= _FEW_TOKENS and self.residency.is_caching:
            holder = self._quickest(layer, rows.expert, holder)
        if not self.routing.is_complete and (holder < LOCAL).any():
            missing = int(rows.expert[holder < LOCAL][0])
            raise ExpertUnavailable(layer, missing, f"any node in epoch {self.routing.epoch}")
        local = not holder.any()
        sent = [] if local else self._begin(layer, hidden, rows, holder)
        self._count(layer, rows, holder, sent, tokens=hidden.shape[0])
        if self.ahead is not None and self.residency.is_caching and hidden.shape[0] <= _FEW_TOKENS:
            self.residency.prefetch(layer + 1, partial(self.ahead.guess, layer + 1, hidden))
        combined = self._combine(layer, hidden, rows, holder, sent)
        self.spent_s += perf_counter() - began
        self.counts.end_layer(layer)
        return combined

    def _quickest(self, layer: int, expert: NDArray[np.integer[Any]], holder: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return who computes each row, where this node could as well as another: [R] like `holder`.

        What is in memory here is computed here; what would have to be loaded goes the way that is done first.
        """
        open_rows: dict[int, tuple[int, list[Way]]] = {}
        holder = holder.copy()
        for row, (each, planned) in enumerate(zip(expert.tolist(), holder.tolist(), strict=True)):
            tier = self.residency.tier_of((layer, each))
            if tier is None or self.routing.others is None:
                continue
            other = planned if planned > LOCAL else int(self.routing.others[layer, each])
            if tier != "disk":
                holder[row] = LOCAL
            elif other > LOCAL:
                name = self.routing.holders[other - 1]
                open_rows[row] = (
                    other,
                    [
                        Way("disk", self.residency.slack.load_s),
                        Way(name, self.rates.seconds(name) or 0.0, is_shared=True),  # what was never tried is tried
                    ],
                )
        ways = choose([ways for _, ways in open_rows.values()])
        for (row, (other, _)), way in zip(open_rows.items(), ways, strict=True):
            holder[row] = other if way else LOCAL
        return holder

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
            rows = Rows(rows.token[mine], rows.expert[mine], rows.weight[torch.from_numpy(mine)])
        answer = compute_rows(
            self.residency, layer, rows, hidden, combine=self.combine, tier_rows=self.counts.tier_rows
        )
        now = perf_counter()
        self.counts.local_s += now - began
        if self.timeline is not None:
            self.timeline.add("experts here", f"layer {layer}", began, now, rows=len(rows.expert))
        return answer

    def _answer(self, sent: _Sent) -> torch.Tensor:
        began = perf_counter()
        answer = sent.pending.result()
        now = perf_counter()
        self.counts.wait_s += now - began
        self.rates.observe(sent.call.holder, now - sent.began)
        if self.timeline is not None:
            about = f"layer {sent.call.layer} at {sent.call.holder}"
            self.timeline.add("waits for other nodes", about, began, now, rows=len(sent.rows))
        call = sent.call
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
