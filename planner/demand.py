"""How often each expert is asked for, from recorded traces or from counters of a running cluster.

Decides what a usable trace is and what share of tokens activates an expert. Must not know nodes or links.
Flow: file → `Trace` → chosen experts ``[T, L, K]`` → activation share ``[L, E]``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from schemas.activation import ActivationCounts, NodeCounts, TraceHeader, read_trace_header
from schemas.files import Fault, InvalidFile
from schemas.model import ModelSpec


@dataclass(frozen=True)
class Trace:
    """A recorded trace.

    Attributes
    ----------
    expert_ids
        Candidates of each token in each layer, best first; the first K were chosen. int16 ``[T, L, C]``.
    scores
        Router scores of the candidates. float16 ``[T, L, C]``.
    sequence
        Which text each token belongs to. int32 ``[T]``.
    """

    header: TraceHeader
    expert_ids: NDArray[np.int16]
    scores: NDArray[np.float16]
    sequence: NDArray[np.int32]

    @property
    def chosen(self) -> NDArray[np.int16]:
        """The experts that were executed, int16 ``[T, L, K]``."""
        return self.expert_ids[:, :, : self.header.top_k]

    def split(self, share: float) -> tuple["Trace", "Trace"]:
        """Return the first `share` of the tokens and the rest, each with at least one token."""
        cut = min(max(int(len(self.sequence) * share), 1), len(self.sequence) - 1)
        return self._part(slice(None, cut)), self._part(slice(cut, None))

    def _part(self, rows: slice) -> "Trace":
        tokens = len(self.sequence[rows])
        header = self.header.model_copy(update={"tokens": tokens})
        return Trace(header, self.expert_ids[rows], self.scores[rows], self.sequence[rows])


def read_trace(path: Path, model: ModelSpec) -> Trace:
    """Read a trace that was recorded on `model`.

    Raises
    ------
    InvalidFile
        Truncated or malformed file, a trace of another model, or expert ids that the model does not have.
    """
    header = read_trace_header(path)
    if faults := list(_model_faults(header, model)):
        raise InvalidFile(path, faults)
    arrays = load_file(path)
    trace = Trace(header, arrays["expert_ids"], arrays["scores"], arrays["sequence"])
    if faults := list(_id_faults(trace)):
        raise InvalidFile(path, faults)
    return trace


def _model_faults(header: TraceHeader, model: ModelSpec) -> Iterator[Fault]:
    for name in ("layers", "experts", "top_k"):
        have, want = getattr(header, name), getattr(model, name)
        if have != want:
            yield Fault(
                name,
                f"the trace was recorded on {header.model!r} with {name} {have}, but model {model.id!r} has {want}; "
                "record it again with `agent trace`",
            )
    least = -(-model.experts // model.top_k)  # with fewer tokens most experts are never seen, whatever the routing
    if header.tokens < least:
        wished = tokens_for(_WISHED, min(model.top_k / model.experts, 0.999))
        yield Fault(
            "expert_ids",
            f"the trace has {header.tokens} tokens, too few to plan by: {least} are the least in which all "
            f"{model.experts} experts can occur, {wished} tell how often they do to ±{_WISHED:.0%}; record more with "
            "`agent trace`",
        )


def _id_faults(trace: Trace) -> Iterator[Fault]:
    chosen, experts = trace.chosen, trace.header.experts
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= experts:
        yield Fault("expert_ids", f"has expert {low if low < 0 else high}, outside 0 … {experts - 1}")
    ordered = np.sort(chosen, axis=2)
    if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
        token, layer, _ = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])[0]
        yield Fault("expert_ids", f"token {token} chose an expert of layer {layer} twice")


_SURE: Final = 1.96  # standard errors of a 95 % interval
_TOLERATED: Final = 0.25  # relative error of a share above which a reader is warned
_WISHED: Final = 0.1


def share_error(tokens: int, share: float) -> float:
    """Relative half-width of the 95 % interval of an activation share counted on so many tokens (binomial).

    >>> round(share_error(1000, 0.125), 3)
    0.164
    """
    return _SURE * math.sqrt((1 - share) / (share * tokens))


def tokens_for(error: float, share: float) -> int:
    """Tokens after which `share_error` is no more than `error`; real tokens are alike, so take rather more.

    >>> tokens_for(0.1, 0.125)
    2690
    """
    return math.ceil((1 - share) / share * (_SURE / error) ** 2)


def short_traces(traces: Mapping[str, Trace]) -> Iterator[str]:
    """Yield a line about each trace that leaves the share of an average expert uncertain."""
    for workload, trace in traces.items():
        header = trace.header
        share = header.top_k / header.experts
        error = share_error(header.tokens, share) if share < 1 else 0.0
        if error > _TOLERATED:
            yield (
                f"workload {workload}: {header.tokens} tokens tell how often an expert is chosen to ±{error:.0%}; "
                f"±{_TOLERATED:.0%} needs {tokens_for(_TOLERATED, share)} tokens, ±{_WISHED:.0%} needs "
                f"{tokens_for(_WISHED, share)}; record more with `agent trace`"
            )


def activation_share(chosen: NDArray[np.int16], experts: int) -> NDArray[np.float64]:
    """Share of tokens that activate each expert, float64 ``[L, E]``, from chosen experts ``[T, L, K]``.

    >>> activation_share(np.array([[[0, 1]], [[0, 2]]], np.int16), 3)
    array([[1. , 0.5, 0.5]])
    """
    tokens, layers, _ = chosen.shape
    flat = (np.arange(layers)[None, :, None] * experts + chosen).ravel()
    counts = np.bincount(flat, minlength=layers * experts).astype(np.float64)
    return np.asarray(counts.reshape(layers, experts) / max(tokens, 1))


def counted_share(counts: NodeCounts) -> NDArray[np.float64]:
    """Share of tokens that activate each expert, float64 ``[L, E]``, as one ingress counted it."""
    counted = np.array(counts.counts, dtype=np.float64)
    return np.asarray(counted / max(counts.tokens, 1))


def counter_faults(counters: ActivationCounts, model: ModelSpec, *, cluster: str, nodes: set[str]) -> Iterator[Fault]:
    """Yield what makes counters useless for planning this cluster."""
    if counters.cluster != cluster:
        yield Fault("cluster", f"counted on cluster {counters.cluster!r}, but the topology is {cluster!r}")
    for name in ("layers", "experts", "top_k"):
        have, want = getattr(counters, name), getattr(model, name)
        if have != want:
            yield Fault(name, f"counted {name} {have} on {counters.model!r}, but model {model.id!r} has {want}")
    for index, node in enumerate(counters.nodes):
        if node.node not in nodes:
            yield Fault(f"nodes[{index}].node", f"there is no node {node.node!r} in the topology")
        shape = {len(row) for row in node.counts}
        if len(node.counts) != counters.layers or shape != {counters.experts}:
            yield Fault(f"nodes[{index}].counts", f"is not {counters.layers} rows of {counters.experts} counts")
