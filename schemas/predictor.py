"""What `agent learn` writes: what guesses the experts of the next layer, or of the next tokens, as a safetensors file.

Decides the header and which arrays each kind has. The arrays are read by whoever guesses; here only their types and
shapes are known, so that a file of another model or a damaged one is refused before any of it is used.

Header metadata (text): ``format: expertmesh-predictor-1``, ``kind``, ``model``, ``layers``, ``experts``, ``top_k``,
``tokens`` (learnt from). Arrays, all float16, of L layers, E experts, a window of W layers and H hidden units:

coactivation
    ``near``, ``far``, ``again`` ``[L, E, E]`` and ``used`` ``[L, E]``: counts.
learned
    ``given`` ``[L, W + 1, E, H]``, ``rates`` ``[L, E, H]``, ``hidden_bias`` ``[L, H]``, ``out`` ``[L, H, E]``, ``bias``
    ``[L, E]``: a network for each layer.
uses
    ``rates`` ``[L, D, E]``, ``given`` ``[L, S, E, H]``, ``out`` ``[L, H, E]``, ``bias`` ``[L, E]``, of D decays and S
    sources: a linear estimate for each layer. Beside them, if that is bent by a network of N hidden units, ``seen``
    ``[L, S, E, N]``, ``hidden_bias`` ``[L, N]`` and ``effect`` ``[L, N, E]``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

from pydantic import Field, ValidationError

from schemas.base import FrozenModel
from schemas.checkpoint import InvalidCheckpoint, TensorEntry, read_safetensors_header, read_safetensors_metadata
from schemas.files import Fault, InvalidFile

PREDICTOR_FORMAT: Final = "expertmesh-predictor-1"

GuessKind = Literal["coactivation", "learned"]
"""What guesses the next layer's experts."""
PredictorKind = Literal[GuessKind, "uses"]
GUESS_KINDS: Final[tuple[GuessKind, ...]] = get_args(GuessKind)
PREDICTOR_KINDS: Final[tuple[PredictorKind, ...]] = get_args(PredictorKind)

_ARRAYS: Final[Mapping[str, Mapping[str, str]]] = {
    "coactivation": {"near": "LEE", "far": "LEE", "again": "LEE", "used": "LE"},
    "learned": {"given": "LWEH", "rates": "LEH", "hidden_bias": "LH", "out": "LHE", "bias": "LE"},
    "uses": {"rates": "LDE", "given": "LSEH", "out": "LHE", "bias": "LE"},
}
_MORE_ARRAYS: Final[Mapping[str, Mapping[str, str]]] = {
    "uses": {"seen": "LSEN", "hidden_bias": "LN", "effect": "LNE"},
}
"""All of a kind's, or none."""


class PredictorHeader(FrozenModel):
    """Metadata of a predictor file.

    Attributes
    ----------
    tokens
        That it was learnt from.
    """

    format: Literal["expertmesh-predictor-1"]
    kind: PredictorKind
    model: str
    layers: Annotated[int, Field(ge=1)]
    experts: Annotated[int, Field(ge=1)]
    top_k: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]


def read_predictor_header(path: Path) -> PredictorHeader:
    """Read the header of a predictor file, having checked its arrays against it; raises `InvalidFile`."""
    try:
        tensors, metadata = read_safetensors_header(path), read_safetensors_metadata(path)
    except InvalidCheckpoint as error:
        raise InvalidFile(path, [Fault("", str(error).removeprefix(f"{path}: "))]) from error
    if metadata.get("format") != PREDICTOR_FORMAT:
        said = metadata.get("format", "nothing")
        raise InvalidFile(path, [Fault("format", f"is no predictor: says {said}; make one with agent learn")])
    numbers = {name: int(text) if text.isdigit() else text for name, text in metadata.items()}
    try:
        header = PredictorHeader.model_validate({**numbers, "model": metadata.get("model", "")})
    except ValidationError as error:
        faults = [Fault(".".join(map(str, item["loc"])), f"in the header: {item['msg']}") for item in error.errors()]
        raise InvalidFile(path, faults) from error
    if faults := list(_array_faults(header, tensors)):
        raise InvalidFile(path, faults)
    return header


def _array_faults(header: PredictorHeader, tensors: Mapping[str, TensorEntry]) -> Iterator[Fault]:
    wanted, more = _ARRAYS[header.kind], _MORE_ARRAYS.get(header.kind, {})
    if more.keys() & tensors.keys():
        wanted = {**wanted, **more}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "is missing" if name in wanted else "is not known"
        yield Fault(name, f"{what}; {header.kind} has {', '.join(wanted)}")
    sizes = {"L": header.layers, "E": header.experts}
    for name, axes in wanted.items():
        if (entry := tensors.get(name)) is None:
            continue
        if entry.dtype != "F16" or len(entry.shape) != len(axes):
            yield Fault(name, f"is {entry.dtype} with {len(entry.shape)} axes, expected F16 with {len(axes)}")
        elif any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, entry.shape, strict=True)):
            yield Fault(name, f"has the shape {entry.shape}, which contradicts the header or another array")
