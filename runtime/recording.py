"""Recorded routing in the order in which layers ran, from a trace file or a ``*.route.csv``.

Decides what such a file must hold to be replayed, and which of it predictors learn from. Must not know torch.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from runtime.errors import InvalidInput
from runtime.policy.eviction import Floats, Ints
from runtime.predictors import Lesson
from runtime.route_csv import COLUMNS, read_route_table, route_shape
from schemas.activation import read_trace_header


class Batch(NamedTuple):
    """Tokens that went through one layer together: candidates and scores ``[T, C]``, best first.

    `is_start` says that they follow no token before them; `guesses`, ``[T, K]``, are what the next layer's gate would
    have chosen on the hidden state that this layer's experts got, where that was recorded.
    """

    layer: int
    ids: Ints
    scores: Floats
    is_decode: bool
    is_start: bool = False
    guesses: Ints | None = None


@dataclass(frozen=True, eq=False)
class Recording:
    """Recorded routing in the order in which layers ran.

    Attributes
    ----------
    expert_bytes
        Bytes of one expert of each layer, float64 ``[L]``; None where the file does not say.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    batches: tuple[Batch, ...]
    expert_bytes: Floats | None = None
    model: str = ""

    @cached_property
    def decode_tokens(self) -> int:
        """Tokens that are counted; prefill only warms the cache."""
        return sum(len(batch.ids) for batch in self.batches if batch.is_decode and batch.layer == 0)

    @property
    def num_experts(self) -> int:
        """L * E."""
        return self.layers * self.experts

    @property
    def has_candidates(self) -> bool:
        """Whether more experts were recorded than were chosen."""
        return any(batch.ids.shape[1] > self.top_k for batch in self.batches)

    @property
    def has_guesses(self) -> bool:
        """Whether the guesses of the next layer's gate were recorded."""
        return any(batch.guesses is not None for batch in self.batches)

    @property
    def key_bytes(self) -> Floats | None:
        """Bytes of each expert, float64 ``[L * E]``."""
        return None if self.expert_bytes is None else np.repeat(self.expert_bytes, self.experts)

    @cached_property
    def uses(self) -> Ints:
        """Keys that the router chose, event by event, int64 ``[T * L, K]``."""
        return np.concatenate(
            [batch.layer * self.experts + batch.ids[:, : self.top_k] for batch in self.batches], axis=0
        )

    def lesson(self, decoded: int | None = None) -> Lesson:
        """Return what predictors learn from: tokens that ran through all layers.

        Parameters
        ----------
        decoded
            Take what lies before this decoded token; all by default.
        """
        chosen, is_start, scores = [], [], []
        for step in self._steps(decoded):
            tokens = min(len(batch.ids) for batch in step)  # some recorders leave out tokens of the last layer
            chosen.append(np.stack([batch.ids[len(batch.ids) - tokens :, : self.top_k] for batch in step], axis=1))
            scores.append(np.stack([batch.scores[len(batch.ids) - tokens :, : self.top_k] for batch in step], axis=1))
            is_start.append(np.arange(tokens) == (0 if step[0].is_start else -1))
        if not chosen:
            raise InvalidInput(f"{self.name}: no token before the {decoded}th decoded one has rows for every layer")
        return Lesson(np.concatenate(chosen), np.concatenate(is_start), self.experts, np.concatenate(scores)).part(0)

    def _steps(self, decoded: int | None) -> Iterator[Sequence[Batch]]:
        """Yield the layers of each step that ran all of them, up to a decoded token."""
        step: dict[int, Batch] = {}
        count = 0
        for batch in self.batches:
            if batch.layer in step or batch.layer < max(step, default=0):
                if len(step) == self.layers:
                    yield list(step.values())
                step = {}
            if batch.layer == 0 and batch.is_decode:
                count += len(batch.ids)
                if decoded is not None and count > decoded:
                    return
            step[batch.layer] = batch
        if len(step) == self.layers:
            yield list(step.values())


def read_recording(path: Path) -> Recording:
    """Read a trace file, or a ``*.route.csv`` with its prefill; raises `InvalidInput` or `InvalidFile`."""
    recording = _from_csv(path) if path.suffix == ".csv" else _from_trace(path)
    if not recording.decode_tokens:
        raise InvalidInput(f"{path}: holds no decoded token that ran layer 0: there is nothing to count")
    return recording


def _from_trace(path: Path) -> Recording:
    """Every token of a trace is taken as decoded by itself, which is how a cache meets it while an answer is made."""
    header = read_trace_header(path)
    arrays = load_file(path)
    ids, scores = arrays["expert_ids"].astype(np.int64), arrays["scores"].astype(np.float64)
    _check_choices(path, ids, scores, header.experts, header.top_k)
    guesses = _checked_guesses(path, arrays.get("guesses"), (*ids.shape[:2], header.top_k), header.experts)
    is_start = np.append(True, np.diff(arrays["sequence"]) != 0)
    batches = tuple(
        Batch(
            layer,
            ids[token, layer][None],
            scores[token, layer][None],
            is_decode=True,
            is_start=bool(is_start[token]),
            guesses=None if guesses is None or layer + 1 == header.layers else guesses[token, layer + 1][None],
        )
        for token in range(header.tokens)
        for layer in range(header.layers)
    )
    return Recording(path.name, header.layers, header.experts, header.top_k, batches, model=header.model)


def _checked_guesses(
    path: Path, guesses: NDArray[np.int16] | None, shape: tuple[int, ...], experts: int
) -> Ints | None:
    """Return recorded guesses; nobody guesses for layer 0."""
    if guesses is None:
        return None
    told = guesses[:, 1:]
    if guesses.shape != shape or (told.size and not 0 <= told.min() <= told.max() < experts):
        raise InvalidInput(f"{path}: guesses must be experts 0 … {experts - 1}, {shape}, got {guesses.shape}")
    return guesses.astype(np.int64)


def _check_choices(path: Path, ids: Ints, scores: Floats, experts: int, top_k: int) -> None:
    """Refuse candidates ``[..., C]`` that are no experts, or name one twice, and scores that are no numbers."""
    if ids.size and (ids.min() < 0 or ids.max() >= experts):
        raise InvalidInput(f"{path}: expert ids leave 0 … {experts - 1}")
    chosen = np.sort(ids[..., :top_k], axis=-1)
    if (chosen[..., 1:] == chosen[..., :-1]).any():
        token = np.argwhere((chosen[..., 1:] == chosen[..., :-1]).any(axis=-1))[0].tolist()
        raise InvalidInput(f"{path}: a token chose an expert twice, at {token}: its top {top_k} must differ")
    if not np.isfinite(scores).all():
        raise InvalidInput(f"{path}: some scores are not finite numbers")


def _from_csv(path: Path) -> Recording:
    """Rows are taken as they lie, which is how the layers ran: prefill layer by layer, decode token by token."""
    header, table = read_route_table(path)
    model, layers, experts, top_k = route_shape(path, header)
    _check_rows(path, table, layers, experts)
    slots = f"rows do not list {top_k} experts, slot by slot, for every token and layer"
    if len(table) % top_k:
        raise InvalidInput(f"{path}: {slots}: {len(table)} rows are no multiple of {top_k}; is it cut short?")
    events = table.reshape(-1, top_k, table.shape[1])
    is_wrong = (events[:, :, 4] != np.arange(top_k)).any(axis=1) | (events[:, :, :4] != events[:, :1, :4]).any((1, 2))
    if is_wrong.any():
        first = int(np.flatnonzero(is_wrong)[0]) * top_k + 1
        raise InvalidInput(f"{path}: {slots}: see rows {first} to {first + top_k - 1}, counted without the header")
    ids, scores = events[:, :, 5].astype(np.int64), events[:, :, 6]
    _check_choices(path, ids, scores, experts, top_k)
    turns, phase, step, layer = events[:, 0, :4].astype(np.int64).T.tolist()
    kinds = [(t, p, s if p else -1, n) for t, p, s, n in zip(turns, phase, step, layer, strict=True)]
    batches, starts = [], defaultdict[int, set[int]](set)
    for (turn, decode, _, layer_idx), group in groupby(range(len(events)), key=kinds.__getitem__):
        picked = list(group)
        is_start = layer_idx not in starts[turn]
        starts[turn].add(layer_idx)
        batches.append(Batch(layer_idx, ids[picked], scores[picked], decode > 0, is_start))
    return Recording(path.name, layers, experts, top_k, tuple(batches), _layer_bytes(path, layers), model)


def _check_rows(path: Path, table: Floats, layers: int, experts: int) -> None:
    """Refuse rows that name no layer or expert, naming the first."""
    whole = table[:, :6]
    is_wrong = ~np.isfinite(table).all(axis=1) | (whole < 0).any(axis=1) | (whole % 1 != 0).any(axis=1)
    is_wrong |= (table[:, 3] >= layers) | (table[:, 5] >= experts) | (table[:, 6] < 0)
    if is_wrong.any():
        number = int(np.flatnonzero(is_wrong)[0])
        told = ", ".join(f"{name} {value:g}" for name, value in zip(COLUMNS, table[number], strict=True))
        raise InvalidInput(
            f"{path}: row {number + 1}, counted without the header, says {told}; there are {layers} layers × {experts} "
            "experts, counted from 0, and weights are not negative"
        )


def _layer_bytes(path: Path, layers: int) -> Floats | None:
    """Bytes of an expert by layer, from header comments such as ``# layer=3 expert_bytes=4336640``."""
    found = {
        int(match[1]): float(match[2])
        for match in re.finditer(r"^# layer=(\d+) expert_bytes=(\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    sizes = np.array([found.get(layer, 0.0) for layer in range(layers)])
    return sizes if (sizes > 0).all() else None
