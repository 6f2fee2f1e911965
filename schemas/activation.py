"""Activation statistics: the header of a recorded trace, and the counters that agents report while serving.

Decides what both files say about their origin and shape. The arrays of a trace (``expert_ids [T, L, C] int16``,
``scores [T, L, C] float16``, ``sequence [T] int32``, and perhaps ``guesses [T, L, K] int16``) are read by whoever needs
them; only the header is known here.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from schemas.base import FrozenModel
from schemas.checkpoint import InvalidCheckpoint, TensorEntry, read_safetensors_header, read_safetensors_metadata
from schemas.files import Fault, InvalidFile
from schemas.topology import NodeId

TRACE_FORMAT: Final = "expertmesh-trace-1"
MOST_EXPERTS: Final = 32767  # ids are int16


class TraceHeader(FrozenModel):
    """Metadata of a trace file and the shape of its arrays.

    Attributes
    ----------
    tokens, layers, experts, candidates, top_k
        T, L, E, C ≥ K and K: per token and layer the C best-ranked experts are recorded, the first K were chosen.
    """

    format: Literal["expertmesh-trace-1"]
    model: str
    workload: str
    created: str
    layers: Annotated[int, Field(ge=1)]
    experts: Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
    top_k: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=0)]
    candidates: Annotated[int, Field(ge=1)]


class NodeCounts(FrozenModel):
    """Routing that one ingress counted: `counts[layer][expert]` tokens routed there, of `tokens` tokens."""

    node: NodeId
    tokens: Annotated[int, Field(ge=0)]
    counts: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...]


class ActivationCounts(FrozenModel):
    """Counters of a running cluster, as activation statistics for the next plan."""

    format: Literal["expertmesh-counters-1"] = "expertmesh-counters-1"
    cluster: str
    model: str
    layers: int
    experts: int
    top_k: int
    nodes: tuple[NodeCounts, ...]


def read_trace_header(path: Path) -> TraceHeader:
    """Read and check the header of a trace file; raises `InvalidFile`."""
    try:
        tensors = read_safetensors_header(path)
        metadata = read_safetensors_metadata(path)
    except InvalidCheckpoint as error:
        raise InvalidFile(path, [Fault("", str(error).removeprefix(f"{path}: "))]) from error
    if faults := _array_faults(tensors):
        raise InvalidFile(path, faults)
    tokens, layers, candidates = tensors["expert_ids"].shape
    text = {key: metadata[key] for key in ("format", "model", "workload", "created") if key in metadata}
    numbers = {key: int(metadata[key]) for key in ("layers", "experts", "top_k") if metadata.get(key, "").isdigit()}
    try:
        header = TraceHeader.model_validate({**text, **numbers, "tokens": tokens, "candidates": candidates})
    except ValidationError as error:
        faults = [Fault(str(item["loc"][0]), f"in the header: {item['msg']}") for item in error.errors()]
        raise InvalidFile(path, faults) from error
    if header.layers != layers or header.candidates < header.top_k or header.top_k > header.experts:
        raise InvalidFile(path, [Fault("expert_ids", f"shape {tensors['expert_ids'].shape} contradicts the header")])
    return header


def _array_faults(tensors: dict[str, TensorEntry]) -> list[Fault]:
    wanted = {"expert_ids": ("I16", 3), "scores": ("F16", 3), "sequence": ("I32", 1)}
    faults = []
    for name, (dtype, ndim) in wanted.items():
        entry = tensors.get(name)
        if entry is None:
            faults.append(Fault(name, "is missing; a trace holds expert_ids, scores and sequence"))
        elif entry.dtype != dtype or len(entry.shape) != ndim:
            faults.append(Fault(name, f"is {entry.dtype} with {len(entry.shape)} axes, expected {dtype} with {ndim}"))
    if not faults and len({tensors[name].shape[0] for name in wanted}) != 1:
        faults.append(Fault("sequence", "has another number of tokens than expert_ids or scores"))
    return faults
