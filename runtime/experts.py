"""What an expert computes, and what a holder does with a call: the same bits as transformers' eager experts.

Decides the order of arithmetic. Axes: T tokens, R rows (one row is one token at one expert), D hidden, F ffn.
Flow: `ExpertCall` → weights borrowed → one matrix product per expert over its rows → rows, or partial sums per token.
Bits also depend on how many threads a matrix product uses: nodes whose results must equal must use the same number.
Must not know who called, nor which node it runs on.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from runtime.cuda.grouped import grouped_answers
from runtime.errors import InvalidInput, RuntimeFault
from runtime.lending import Low
from runtime.loads import Borrowed
from runtime.pool import ExpertWeights
from runtime.slots import Residency
from runtime.streaming import Ahead
from schemas.store import ExpertForm
from schemas.topology import Tier

Combine = Literal["partial", "ordered"]
ExpertMath = Callable[[ExpertWeights, torch.Tensor], torch.Tensor]
"""(weights, x [n, D]) -> [n, D], not yet weighted."""


class Rows(NamedTuple):
    """(token, expert) pairs to compute, in the order that `ExpertCall` tells."""

    token: NDArray[np.integer[Any]]  # [R]
    expert: NDArray[np.integer[Any]]  # [R]
    weight: torch.Tensor  # [R] float32
    routed: "Rows | None" = None  # what the router chose, where these are not that

    @property
    def chosen(self) -> "Rows":
        """What the router chose."""
        return self if self.routed is None else self.routed


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """Some tokens of one layer, and which experts of `holder` they need.

    Attributes
    ----------
    hidden
        [T', D], the model's dtype, in CPU memory: just the tokens needed, in their order in the forward.
    token, expert
        [R] int32: row r is token ``hidden[token[r]]`` at expert ``expert[r]``. Rows are sorted by expert; within an
        expert they keep the order in which eager experts compute them (position in the top k, then token), since
        a matrix product may round a row differently in another place.
    weight
        [R] float32: the router's weight of each row.
    combine
        ``partial``: the answer is one weighted sum per token, [T', D] float32. ``ordered``: one weighted row per
        (token, expert), [R, D] in the model's dtype.
    """

    holder: str
    epoch: int
    layer: int
    combine: Combine
    hidden: torch.Tensor
    token: NDArray[np.int32]
    expert: NDArray[np.int32]
    weight: torch.Tensor

    def check(self) -> None:
        """Refuse a call whose rows contradict its tokens or their own order, as a peer's might; raises InvalidInput."""
        rows = len(self.token)
        if not rows or len(self.expert) != rows or tuple(self.weight.shape) != (rows,):
            raise InvalidInput(f"layer {self.layer}: a call needs as many tokens, experts and weights, at least one")
        tokens, experts = self.token.tolist(), self.expert.tolist()  # quicker than arrays for the few rows of a decode
        if min(tokens) < 0 or max(tokens) >= self.hidden.shape[0]:
            raise InvalidInput(f"layer {self.layer}: a row names a token outside of {self.hidden.shape[0]}")
        if sorted(experts) != experts or len(set(zip(experts, tokens, strict=True))) != rows:
            raise InvalidInput(f"layer {self.layer}: rows are not sorted by expert, or one is there twice")

    @property
    def answer_shape(self) -> tuple[int, int]:
        """Shape of the answer."""
        return (len(self.token) if self.combine == "ordered" else self.hidden.shape[0], self.hidden.shape[1])

    @property
    def answer_dtype(self) -> torch.dtype:
        """Dtype of the answer."""
        return self.hidden.dtype if self.combine == "ordered" else torch.float32


TierRows = dict[Tier, int]
"""Rows computed from each tier."""


def execute_call(residency: Residency, call: ExpertCall, *, tier_rows: TierRows | None = None) -> torch.Tensor:
    """Compute a call from the replicas held here; see `ExpertCall.combine` for the answer.

    Parameters
    ----------
    tier_rows
        Adds the rows computed from each tier, where given.

    Raises
    ------
    ExpertUnavailable
        One of the experts is not held here.
    """
    device = residency.device
    rows = Rows(call.token, call.expert, call.weight.to(device))
    hidden = call.hidden.to(device)
    return compute_rows(residency, call.layer, rows, hidden, combine=call.combine, tier_rows=tier_rows).cpu()


def compute_rows(
    residency: Residency,
    layer: int,
    rows: Rows,
    hidden: torch.Tensor,
    *,
    combine: Combine,
    tier_rows: TierRows | None = None,
    low: Low | None = None,
    ahead: Ahead | None = None,
) -> torch.Tensor:
    """Compute rows of one layer from the replicas held here, as `execute_call` does; hidden is [T, D].

    Parameters
    ----------
    low, ahead
        Experts that may be computed in low precision, and what runs next, see `Residency.lend`.
    """
    bounds = group_bounds(rows.expert)
    residency.observe(layer, rows.chosen.token, rows.chosen.expert, rows.chosen.weight)
    with torch.inference_mode():
        if hidden.shape[0] == 1:  # a row per expert, nothing to gather
            token, gathered = None, hidden.expand(len(rows.expert), -1)
        else:
            token = torch.from_numpy(rows.token).to(hidden.device)
            gathered = hidden[token]
        experts = rows.expert[bounds[:-1]].tolist()
        sizes = () if combine == "ordered" else np.diff(bounds).tolist()
        answers = None
        if gathered.is_cuda and token is not None and not low:
            answers = grouped_answers(residency, layer, experts, bounds, gathered)
        if answers is None:
            lending = residency.lend(layer, experts, low, rows=len(rows.expert), ahead=ahead, sizes=sizes)
            answers = torch.cat(_answers(residency.layout.form, lending, gathered, bounds, tier_rows))
        elif tier_rows is not None:
            tier_rows["device"] = tier_rows.get("device", 0) + len(rows.expert)
        if combine == "ordered":
            return (answers * rows.weight.unsqueeze(1)).to(hidden.dtype)
        if token is None:
            return rows.weight.unsqueeze(0) @ answers.float()
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return total.index_add_(0, token, answers.float() * rows.weight.unsqueeze(1))


def _answers(
    form: ExpertForm,
    lending: Generator[tuple[int, Borrowed]],
    gathered: torch.Tensor,
    bounds: list[int],
    tier_rows: TierRows | None,
) -> list[torch.Tensor]:
    """Return what each expert makes of its rows, [n, D] each, in the rows' order, however the experts come.

    Weights that lie elsewhere than the rows are in host memory: rows come to them, and the processor computes.
    """
    math = expert_math(form)
    answers: list[Any] = [None] * (len(bounds) - 1)
    places = {gathered.device: gathered}
    with closing(lending):
        for index, lent in lending:
            start, end = bounds[index], bounds[index + 1]
            there = lent.weights.down.device
            if there not in places:
                places[there] = gathered.to(there)
            answers[index] = math(lent.weights, places[there][start:end])
            if tier_rows is not None:
                tier_rows[lent.tier] = tier_rows.get(lent.tier, 0) + end - start
    return [each.to(gathered.device) for each in answers]


def group_bounds(expert: NDArray[np.integer[Any]]) -> list[int]:
    """Return where the rows of each expert start, and the end.

    >>> group_bounds(np.array([3, 3, 5], dtype=np.int32))
    [0, 2, 3]
    """
    values = expert.tolist() if len(expert) <= 16 else None
    if values is not None:
        starts = [row for row, value in enumerate(values) if row == 0 or value != values[row - 1]]
        return [*starts, len(values)]
    return [0, *(np.flatnonzero(np.diff(expert)) + 1).tolist(), len(expert)]


_MATH: dict[ExpertForm, ExpertMath] = {}


def expert_math(form: ExpertForm) -> ExpertMath:
    """Return the function of a form."""
    found = _MATH.get(form)
    if found is None:
        found = _MATH[form] = _gpt_oss(form) if form.kind == "gpt_oss" else _swiglu(form)
    return found


def _swiglu(form: ExpertForm) -> ExpertMath:
    """Gate and up in one product, then down: Mixtral, OLMoE, Qwen, DeepSeek."""
    activation = activation_of(form.activation)

    def forward(weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(x, weights.gate_up).chunk(2, dim=-1)  # [n, F] each
        return functional.linear(activation(gate) * up, weights.down)  # [n, D]

    return forward


def _gpt_oss(form: ExpertForm) -> ExpertMath:
    """Gate and up interleaved, clamped, with biases; weights are not transposed."""
    alpha, limit = form.alpha, form.limit

    def forward(weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
        gate_up = x @ weights.gate_up + _present(weights.gate_up_bias)  # [n, 2F]
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate = gate.clamp(min=None, max=limit)
        up = up.clamp(min=-limit, max=limit)
        return ((up + 1) * (gate * torch.sigmoid(gate * alpha))) @ weights.down + _present(weights.down_bias)

    return forward


def _present(bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        raise RuntimeFault("experts of this form need biases, and their records hold none; prepare the store again")
    return bias


def activation_of(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an activation by its name in a config."""
    if name == "silu":
        return functional.silu
    from transformers.activations import ACT2FN

    found: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return found
