"""Recording which experts a model chooses for given texts, as an activation trace, and importing other traces.

Decides what is recorded per token and layer: the K chosen experts first, then the next-ranked candidates, each with
the router's score. Flow: texts → token windows → routers of the running model → arrays → one safetensors file.
Must not know what planning does with a trace.

Scores are what the family's router ranks by, over all E experts, before any renormalisation or scaling: softmax of
the router's logits (Qwen, Mixtral, OLMoE, DeepSeek-V2, gpt-oss), sigmoid (DeepSeek-V3, whose candidates are ranked
with its correction bias added while the score is recorded without it).
"""

import datetime
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import InvalidInput, writing
from runtime.route_csv import read_route_table, route_shape
from runtime.routers import rank_experts, router_rule, routers_of
from schemas.activation import TRACE_FORMAT
from schemas.checkpoint import read_checkpoint
from schemas.model import HeldDtype

Progress = Callable[[int, int], None]

DEFAULT_WINDOW: Final = 1024  # tokens of one forward: long enough for context, short enough for any memory


@dataclass(frozen=True)
class Trace:
    """Routing of T tokens through L layers.

    Attributes
    ----------
    expert_ids
        [T, L, C] int16: the C ≥ K best-ranked experts, the first K were chosen, best first.
    scores
        [T, L, C] float16: the router's score of each.
    sequence
        [T] int32: tokens with the same number followed each other in one context.
    guesses
        [T, L, K] int16: what the gate of each layer would have chosen on the hidden state that the experts of the layer
        before it got, -1 in layer 0; None where that was not recorded.
    """

    model: str
    experts: int
    top_k: int
    workload: str
    expert_ids: NDArray[np.int16]
    scores: NDArray[np.float16]
    sequence: NDArray[np.int32]
    guesses: NDArray[np.int16] | None = None

    def write(self, path: Path, *, created: str | None = None) -> None:
        """Write the trace file whole or not at all; raises `DiskFull` or `InvalidInput`."""
        from safetensors.numpy import save

        metadata = {
            "format": TRACE_FORMAT,
            "model": self.model,
            "layers": str(self.expert_ids.shape[1]),
            "experts": str(self.experts),
            "top_k": str(self.top_k),
            "workload": self.workload,
            "created": created or datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        arrays = {"expert_ids": self.expert_ids, "scores": self.scores, "sequence": self.sequence}
        if self.guesses is not None:
            arrays["guesses"] = self.guesses
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
        with writing(path, needed=len(data)), tempfile.TemporaryDirectory(dir=path.parent) as directory:
            temporary = Path(directory) / path.name
            temporary.write_bytes(data)
            temporary.replace(path)


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    r"""Yield the texts of files: each line's ``text`` of a .jsonl file, any other file whole.

    Raises
    ------
    InvalidInput
        Naming the file and the line.
    """
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"{file}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{file}: is not UTF-8 text") from error
        if file.suffix != ".jsonl":
            yield content
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                yield _text_of(file, number, line)


def _text_of(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidInput(f'{file}: line {number}: expected {{"text": "…"}}') from error
    if not isinstance(text, str):
        raise InvalidInput(f"{file}: line {number}: text is {type(text).__name__}, expected a string")
    return text


def record_trace(
    model_dir: Path,
    texts: Iterable[str],
    *,
    workload: str,
    candidates: int | None = None,
    max_tokens: int | None = None,
    window: int = DEFAULT_WINDOW,
    dtype: HeldDtype = "checkpoint",
    has_guesses: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Run a whole checkpoint over texts and record its routing.

    Parameters
    ----------
    candidates
        C, by default 2 K, cut to E.
    max_tokens
        Stop after this many tokens; all of the texts by default.
    window
        Longer texts are cut into pieces of this many tokens, each a sequence of its own.
    has_guesses
        Record what each layer's gate would have guessed one layer before.
    progress
        Called with (tokens done, tokens in all).

    Raises
    ------
    schemas.checkpoint.InvalidCheckpoint
        The checkpoint is none, or no supported mixture of experts.
    InvalidInput
        No token to record, or C outside K … E.
    """
    checkpoint = read_checkpoint(model_dir)
    spec = checkpoint.model_spec
    width = min(2 * spec.top_k, spec.experts) if candidates is None else candidates
    if not spec.top_k <= width <= spec.experts:
        raise InvalidInput(f"{width} candidates are outside top-k … experts = {spec.top_k} … {spec.experts}")
    model, tokenizer = _load_whole(model_dir, dtype=checkpoint.dtype if dtype == "checkpoint" else dtype)
    window = min(window, getattr(model.config, "max_position_embeddings", window))
    pieces = _pieces(tokenizer, texts, window=window, max_tokens=max_tokens)
    if not pieces:
        raise InvalidInput("the texts hold no token to record; give at least one text that is not empty")
    recorded = record_pieces(model, pieces, width=width, has_guesses=has_guesses, progress=progress)
    guesses = [choice.guesses for choice in recorded if choice.guesses is not None]
    sequence = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
    return Trace(
        model=spec.id,
        experts=spec.experts,
        top_k=spec.top_k,
        workload=workload,
        expert_ids=np.concatenate([choice.expert_ids for choice in recorded]),
        scores=np.concatenate([choice.scores for choice in recorded]),
        sequence=sequence,
        guesses=np.concatenate(guesses) if guesses else None,
    )


def _load_whole(model_dir: Path, *, dtype: str) -> tuple[Any, Any]:
    from runtime.loading import load_tokenizer, load_whole

    return load_whole(model_dir, dtype=dtype), load_tokenizer(model_dir)


def _pieces(tokenizer: Any, texts: Iterable[str], *, window: int, max_tokens: int | None) -> list[list[int]]:
    pieces: list[list[int]] = []
    left = max_tokens if max_tokens is not None else 1 << 62
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"][:left]
        pieces.extend(ids[start : start + window] for start in range(0, len(ids), window))
        left -= len(ids)
        if left <= 0:
            break
    return pieces


class Choice(NamedTuple):
    """What the routers chose for T tokens: ids, scores and guesses as in `Trace`."""

    expert_ids: NDArray[np.int16]  # [T, L, C]
    scores: NDArray[np.float16]  # [T, L, C]
    guesses: NDArray[np.int16] | None = None  # [T, L, K]


def record_pieces(
    model: Any,
    pieces: list[list[int]],
    *,
    width: int,
    has_guesses: bool = False,
    progress: Progress | None = None,
) -> list[Choice]:
    """Run every piece through the model and collect what its routers chose, layer by layer."""
    layers: list[tuple[NDArray[np.int16], NDArray[np.float16]]] = []
    guesses: list[NDArray[np.int16]] = []
    rule, routers = router_rule(model.config), routers_of(model)
    following = dict(pairwise(routers))

    def on_router(router: Any, given: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        ids, scores = rank_experts(rule, router, output[0], output[2], width=width)
        layers.append((ids.numpy().astype(np.int16), scores.numpy().astype(np.float16)))
        if has_guesses and router in following:
            chosen = following[router].forward(given[0])[2]  # past the hooks: this is no routing
            guesses.append(chosen.view(len(ids), -1).numpy().astype(np.int16))

    hooks = [router.register_forward_hook(on_router) for router in routers]
    total, done, recorded = sum(len(piece) for piece in pieces), 0, []
    try:
        with torch.inference_mode():
            for piece in pieces:
                layers.clear()
                guesses.clear()
                model.model(input_ids=torch.tensor([piece]), use_cache=False)
                ids, scores = zip(*layers, strict=True)
                told = [np.full_like(guesses[0], -1), *guesses] if guesses else []
                found = np.stack(told, axis=1) if told else None
                recorded.append(Choice(np.stack(ids, axis=1), np.stack(scores, axis=1), found))
                done += len(piece)
                if progress:
                    progress(done, total)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


class ImportedTrace(NamedTuple):
    """A trace read from a CSV, and how many of its tokens were left out because rows of some layers are missing."""

    trace: Trace
    dropped_tokens: int


def import_route_csv(path: Path, *, workload: str | None = None) -> ImportedTrace:
    """Read a ``*.route.csv``: rows (turn, phase, step, layer, slot, expert, weight, …), header lines before them.

    C equals K; scores are the router weights. A sequence is a turn. Recorders that compute the last layer only for
    tokens whose logits are needed leave prefill tokens without it: such tokens are dropped and counted.

    Raises
    ------
    InvalidInput
        Naming the line.
    """
    header, table = read_route_table(path)
    model, layers, experts, top_k = route_shape(path, header)
    table = table[np.lexsort(table.T[[4, 3, 2, 1, 0]])]
    if table[:, 3].max() >= layers or table[:, 5].max() >= experts or table[:, 4].max() >= top_k or table.min() < 0:
        raise InvalidInput(f"{path}: a row leaves {layers} layers × {experts} experts, top-{top_k}")
    tokens, first, rows = np.unique(table[:, :3], axis=0, return_index=True, return_counts=True)
    whole = rows == layers * top_k
    if not whole.any():
        raise InvalidInput(f"{path}: no token has rows for all of {layers} layers × top-{top_k}")
    picked = table[(first[whole, None] + np.arange(layers * top_k)).reshape(-1)]
    shape = (int(whole.sum()), layers, top_k)
    expected = np.indices(shape)
    if (picked[:, 3].reshape(shape) != expected[1]).any() or (picked[:, 4].reshape(shape) != expected[2]).any():
        raise InvalidInput(f"{path}: a (step, layer) lists a slot twice")
    trace = Trace(
        model=model,
        experts=experts,
        top_k=top_k,
        workload=workload or path.name.removesuffix(".csv").removesuffix(".route"),
        expert_ids=picked[:, 5].reshape(shape).astype(np.int16),
        scores=picked[:, 6].reshape(shape).astype(np.float16),
        sequence=tokens[whole, 0].astype(np.int32),
    )
    return ImportedTrace(trace, int((~whole).sum()))
