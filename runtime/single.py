"""One token's experts where all of them are at hand: the same sums as for any number of tokens, in plain lists.

Decides the order of arithmetic for one token: a weighted sum of its experts' rows, which are to the bit what
`runtime.experts` makes of them, added in the same order. Whatever is out of the ordinary (experts to be
loaded, combining in order) is not for here. Must not know who asks. Axes: K experts of the token, D hidden, F ffn.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.experts import ExpertCall, TierRows, activation_of, execute_call, expert_math
from runtime.pool import ExpertWeights
from runtime.slots import Residency
from schemas.store import ExpertForm

TokenMath = Callable[[Sequence[ExpertWeights], torch.Tensor], torch.Tensor]
"""(weights of K experts, x [1, D]) -> [K, D], not yet weighted; valid until the same thread asks again."""


class Picked(NamedTuple):
    """Experts of one token in one layer, sorted, as rows are."""

    layer: int
    experts: list[int]
    weights: NDArray[np.float32]  # [K]

    def some(self, positions: list[int]) -> "Picked":
        """Return those at some positions, which ascend."""
        return Picked(self.layer, [self.experts[each] for each in positions], self.weights[positions])


def pick(layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Picked:
    """Return what a router chose for one token, [1, K] each."""
    experts, weights = top_k_index.tolist()[0], top_k_weights.float().cpu().numpy()[0]
    order = sorted(range(len(experts)), key=experts.__getitem__)
    return Picked(layer, [experts[each] for each in order], weights[order])


def compute_token(
    residency: Residency, picked: Picked, hidden: torch.Tensor, tier_rows: TierRows | None = None
) -> torch.Tensor | None:
    """Return the weighted sum of one token's experts, [1, D] float32; None, with nothing done, if one is not at hand.

    In inference mode.

    Parameters
    ----------
    hidden
        [1, D].
    tier_rows
        Adds the rows computed from each tier, where given.
    """
    layer, experts, values = picked
    copies = residency.take(layer, experts)
    if copies is None:
        return None
    try:
        if tier_rows is not None:
            for copy in copies:
                tier_rows[copy.tier] = tier_rows.get(copy.tier, 0) + 1
        residency.observe_token(layer, experts, values)
        weights = torch.from_numpy(values).view(1, -1)
        rows = token_math(residency.layout.form)([residency.weights(copy) for copy in copies], hidden)
        return torch.mm(weights if hidden.is_cpu else weights.to(hidden.device), rows.float())
    finally:
        residency.end(layer, copies)


class Share(NamedTuple):
    """What of one token's rows one holder computes: positions among its K experts."""

    holder: int
    positions: list[int]


def shares(planned: list[int], experts: list[int]) -> list[Share]:
    """Return what each holder computes of a token, in the order of holders.

    >>> shares([0, 2, 0, 1], [0, 2, 3])
    [Share(holder=0, positions=[0, 1]), Share(holder=1, positions=[2])]
    """
    by_holder: dict[int, list[int]] = {}
    for position, expert in enumerate(experts):
        by_holder.setdefault(planned[expert], []).append(position)
    return [Share(holder, by_holder[holder]) for holder in sorted(by_holder)]


def token_call(holder: str, epoch: int, picked: Picked, hidden: torch.Tensor) -> ExpertCall:
    """Return the call for experts of one token; it combines to a partial sum."""
    return ExpertCall(
        holder=holder,
        epoch=epoch,
        layer=picked.layer,
        combine="partial",
        hidden=hidden.cpu(),
        token=np.zeros(len(picked.experts), dtype=np.int32),
        expert=np.array(picked.experts, dtype=np.int32),
        weight=torch.from_numpy(picked.weights),
    )


def answer_call(residency: Residency, call: ExpertCall) -> torch.Tensor:
    """Compute a call as `runtime.experts.execute_call` does, the quickest way that it allows.

    Raises
    ------
    ExpertUnavailable
        One of the experts is not held here.
    """
    if call.combine == "partial" and len(call.hidden) == 1:
        picked = Picked(call.layer, call.expert.tolist(), call.weight.numpy())
        with torch.inference_mode():
            total = compute_token(residency, picked, call.hidden.to(residency.device))
        if total is not None:
            return total.cpu()
    return execute_call(residency, call)


@cache
def token_math(form: ExpertForm) -> TokenMath:
    """Return the function of a form."""
    return _one_by_one(form) if form.kind == "gpt_oss" else _swiglu(form)


def _one_by_one(form: ExpertForm) -> TokenMath:
    math = expert_math(form)

    def forward(weights: Sequence[ExpertWeights], x: torch.Tensor) -> torch.Tensor:
        return torch.cat([math(each, x) for each in weights])

    return forward


class _Desk(NamedTuple):
    """Memory that a thread computes in, and views of it: to make them anew takes longer than a small product.

    Attributes
    ----------
    multiply
        (weights, vector, out) of vectors as the views are: 1-D, or [1, n].
    """

    multiply: Callable[..., object]
    gate_up: Sequence[torch.Tensor]  # K of 2 F
    gate: torch.Tensor  # [K, F]
    up: torch.Tensor  # [K, F]
    gated: torch.Tensor  # [K, F]
    gated_rows: Sequence[torch.Tensor]  # K of F
    answers: torch.Tensor  # [K, D]
    answer_rows: Sequence[torch.Tensor]  # K of D


def _make_desk(count: int, weights: ExpertWeights) -> _Desk:
    """Return memory for so many experts like this one.

    One vector is multiplied the quickest way that gives the bits of many: in half precision torch's product with a
    vector rounds otherwise, and is slow.
    """
    size, ffn = weights.down.shape
    gate_up, gated, answers = (weights.down.new_empty((count, width)) for width in (2 * ffn, ffn, size))
    gate, up = gate_up.chunk(2, -1)
    is_plain = weights.down.dtype == torch.float32
    rows = [torch.unbind(each) if is_plain else torch.split(each, 1) for each in (gate_up, gated, answers)]
    return _Desk(torch.mv if is_plain else _multiply, rows[0], gate, up, gated, rows[1], answers, rows[2])


def _multiply(weights: torch.Tensor, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weights.t(), out=out)


def _swiglu(form: ExpertForm) -> TokenMath:
    """Gate and up of each expert, all gates at once, down of each: Mixtral, OLMoE, Qwen, DeepSeek."""
    activation = activation_of(form.activation)
    desks = threading.local()

    def forward(weights: Sequence[ExpertWeights], x: torch.Tensor) -> torch.Tensor:
        first = weights[0].down
        key = len(weights), first.shape, first.dtype, first.device
        try:
            desk: _Desk = desks.by_key[key]
        except (AttributeError, KeyError):
            desk = _make_desk(len(weights), weights[0])
            desks.by_key = {**getattr(desks, "by_key", {}), key: desk}
        multiply, x = desk.multiply, x.view_as(desk.answer_rows[0])
        for each, row in zip(weights, desk.gate_up, strict=True):
            multiply(each.gate_up, x, out=row)
        torch.mul(activation(desk.gate), desk.up, out=desk.gated)
        for each, gated, answer in zip(weights, desk.gated_rows, desk.answer_rows, strict=True):
            multiply(each.down, gated, out=answer)
        return desk.answers

    return forward
