"""Experts of one token, or of a few, where all of them are at hand: as for any number, in fewer operations.

Decides nothing that `runtime.experts` does not: rows are to the bit what that makes of them, and added in the same
order. Whatever is out of the ordinary (experts to be loaded, combining in order) is not for here. Must not know who
asks. Axes: T tokens, R rows (one row is one token at one expert), K experts of a token, D hidden, F ffn.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.copies import Copy
from runtime.experts import ExpertCall, Rows, TierRows, activation_of, execute_call, expert_math, group_bounds
from runtime.pool import ExpertWeights
from runtime.slots import Residency
from schemas.store import ExpertForm

FEW_ROWS: Final = 64
"""More of them ask for a whole product by expert anyway."""

FewMath = Callable[[Sequence[ExpertWeights], torch.Tensor, list[int] | None], torch.Tensor]
"""(weights of experts, x [R, D], where the rows of each expert begin and end) -> [R, D], not yet weighted; with None,
every expert gets the one row of x. Valid until the same thread asks again."""


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
    copies = residency.take(picked.layer, picked.experts)
    return None if copies is None else compute_taken(residency, picked, copies, hidden, tier_rows)


def compute_taken(
    residency: Residency,
    picked: Picked,
    copies: Sequence[Copy],
    hidden: torch.Tensor,
    tier_rows: TierRows | None = None,
) -> torch.Tensor:
    """Do what `compute_token` does with copies that `Residency.take` gave, whose use it ends."""
    layer, experts, values = picked
    try:
        if tier_rows is not None:
            for copy in copies:
                tier_rows[copy.tier] = tier_rows.get(copy.tier, 0) + 1
        residency.observe_token(layer, experts, values)
        weights = torch.from_numpy(values).view(1, -1)
        rows = few_math(residency.layout.form)([residency.weights(copy) for copy in copies], hidden, None)
        return torch.mm(weights if hidden.is_cpu else weights.to(hidden.device), rows.float())
    finally:
        residency.end(layer, copies)


def compute_few(
    residency: Residency, layer: int, rows: Rows, hidden: torch.Tensor, tier_rows: TierRows | None = None
) -> torch.Tensor | None:
    """Return partial sums of at most `FEW_ROWS` rows, [T, D] float32; None, with nothing done, if one is not at hand.

    In inference mode. Arguments are those of `runtime.experts.compute_rows`.
    """
    bounds = group_bounds(rows.expert)
    copies = residency.take(layer, rows.expert[bounds[:-1]].tolist())
    if copies is None:
        return None
    try:
        if tier_rows is not None:
            for copy, start, end in zip(copies, bounds, bounds[1:], strict=False):
                tier_rows[copy.tier] = tier_rows.get(copy.tier, 0) + end - start
        residency.observe(layer, rows.chosen.token, rows.chosen.expert, rows.chosen.weight)
        token = torch.from_numpy(rows.token).to(hidden.device)
        weights = [residency.weights(copy) for copy in copies]
        answers = few_math(residency.layout.form)(weights, hidden[token], bounds).float() * rows.weight.unsqueeze(1)
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return total.index_add_(0, token, answers)
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
    if call.combine == "partial" and len(call.expert) <= FEW_ROWS:
        hidden = call.hidden.to(residency.device)
        with torch.inference_mode():
            if len(hidden) == 1:
                picked = Picked(call.layer, call.expert.tolist(), call.weight.numpy())
                total = compute_token(residency, picked, hidden)
            else:
                rows = Rows(call.token, call.expert, call.weight.to(residency.device))
                total = compute_few(residency, call.layer, rows, hidden)
        if total is not None:
            return total.cpu()
    return execute_call(residency, call)


@cache
def few_math(form: ExpertForm) -> FewMath:
    """Return the function of a form."""
    return _one_by_one(form) if form.kind == "gpt_oss" else _swiglu(form)


def _one_by_one(form: ExpertForm) -> FewMath:
    math = expert_math(form)

    def forward(weights: Sequence[ExpertWeights], x: torch.Tensor, bounds: list[int] | None) -> torch.Tensor:
        if bounds is None:
            return torch.cat([math(each, x) for each in weights])
        rows = zip(weights, bounds, bounds[1:], strict=False)
        return torch.cat([math(each, x[start:end]) for each, start, end in rows])

    return forward


def _swiglu(form: ExpertForm) -> FewMath:
    """Gate and up of each expert, all gates at once, down of each: Mixtral, OLMoE, Qwen, DeepSeek."""
    activation = activation_of(form.activation)
    desks = threading.local()

    def forward(weights: Sequence[ExpertWeights], x: torch.Tensor, bounds: list[int] | None) -> torch.Tensor:
        first = weights[0].down
        key = len(weights) if bounds is None else len(x), first.shape, first.dtype, first.device
        try:
            desk: _Desk = desks.by_key[key]
        except (AttributeError, KeyError):
            desk = _make_desk(key[0], weights[0])
            desks.by_key = {**getattr(desks, "by_key", {}), key: desk}
        given = _Lines(x, desk.lines(x) if bounds is not None else desk.lines(x) * key[0])
        _multiply([each.gate_up for each in weights], given, desk.gate_up, bounds)
        torch.mul(activation(desk.gate), desk.up, out=desk.gated.whole)
        _multiply([each.down for each in weights], desk.gated, desk.answers, bounds)
        return desk.answers.whole

    return forward


class _Lines(NamedTuple):
    """A matrix, and its rows as a desk takes them."""

    whole: torch.Tensor
    rows: Sequence[torch.Tensor]


class _Desk(NamedTuple):
    """Memory that a thread computes in, and views of it: to make them anew takes longer than a small product.

    Attributes
    ----------
    lines
        Cuts a matrix into its rows: 1-D in float32; [1, n] in half precision, in which torch's product of a matrix and
        a vector rounds otherwise than that of matrices, and is slow.
    """

    lines: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    gate_up: _Lines  # [R, 2 F]
    gate: torch.Tensor  # [R, F]
    up: torch.Tensor  # [R, F]
    gated: _Lines  # [R, F]
    answers: _Lines  # [R, D]


def _make_desk(count: int, weights: ExpertWeights) -> _Desk:
    """Return memory for so many rows of experts like this one."""
    size, ffn = weights.down.shape
    lines = torch.unbind if weights.down.dtype == torch.float32 else _thin
    gate_up, gated, answers = (
        _Lines(whole, lines(whole)) for whole in (weights.down.new_empty((count, n)) for n in (2 * ffn, ffn, size))
    )
    gate, up = gate_up.whole.chunk(2, -1)
    return _Desk(lines, gate_up, gate, up, gated, answers)


def _thin(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.unbind(matrix.unsqueeze(1))


def _multiply(weights: Sequence[torch.Tensor], x: _Lines, out: _Lines, bounds: list[int] | None) -> None:
    """Multiply rows by weights [n, m] into `out`, one row each or those between `bounds`."""
    if bounds is None:
        for each, row, result in zip(weights, x.rows, out.rows, strict=True):
            _multiply_row(each, row, result)
        return
    for each, start, end in zip(weights, bounds, bounds[1:], strict=False):
        if end == start + 1:
            _multiply_row(each, x.rows[start], out.rows[start])
        else:
            torch.mm(x.whole[start:end], each.t(), out=out.whole[start:end])


def _multiply_row(weights: torch.Tensor, row: torch.Tensor, out: torch.Tensor) -> None:
    if row.ndim == 1:
        torch.mv(weights, row, out=out)
    else:
        torch.mm(row, weights.t(), out=out)
