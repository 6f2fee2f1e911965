"""Predictors learnt from recordings, and the files that keep them.

Decides which kinds there are, and that a file must fit the model that it guesses for. The guessing is
`runtime.policy.guessing` and `runtime.policy.learned`, of uses to come `runtime.policy.uses`. Must not know torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from runtime.errors import InvalidInput, writing
from runtime.policy.cache import Cache
from runtime.policy.eviction import Eviction, Floats, Ints
from runtime.policy.guessing import Coactivation, Predictor, Tables, best
from runtime.policy.learned import Learned, Weights, train
from runtime.policy.uses import DECAYS, SOURCES, Uses, fit
from schemas.files import Fault, InvalidFile
from schemas.model import ModelSpec
from schemas.predictor import PREDICTOR_FORMAT, GuessKind, PredictorHeader, PredictorKind, read_predictor_header

Progress = Callable[[int, int], None]
Made = Coactivation | Learned | Uses


class Lesson(NamedTuple):
    """What a predictor learns from: which experts tokens were routed to.

    Attributes
    ----------
    chosen
        ``[T, L, K]``, tokens in order.
    is_start
        ``[T]``: tokens that follow no other.
    experts
        Of a layer.
    scores
        The router's of what was chosen, ``[T, L, K]``; all alike where None.
    """

    chosen: Ints
    is_start: NDArray[np.bool_]
    experts: int
    scores: Floats | None = None

    @property
    def scores_of_choice(self) -> Floats:
        """The scores, ones where none are known."""
        return np.ones(self.chosen.shape) if self.scores is None else self.scores

    def part(self, first: int, last: int | None = None) -> "Lesson":
        """Return some of the tokens."""
        is_start = self.is_start[first:last].copy()
        is_start[:1] = True
        scores = None if self.scores is None else self.scores[first:last]
        return self._replace(chosen=self.chosen[first:last], is_start=is_start, scores=scores)


def joined(lessons: list[Lesson]) -> Lesson:
    """Return recordings of one model one after another."""
    chosen = np.concatenate([each.chosen for each in lessons])
    is_start = np.concatenate([each.is_start for each in lessons])
    return Lesson(chosen, is_start, lessons[0].experts, np.concatenate([each.scores_of_choice for each in lessons]))


def learn(kind: GuessKind, lesson: Lesson, *, progress: Progress | None = None) -> Coactivation | Learned:
    """Make what guesses the next layer's experts of a recording."""
    if kind == "learned":
        return Learned(train(*lesson[:3], progress=progress))
    made = Coactivation(lesson.chosen.shape[1], lesson.experts)
    made.fit(lesson.chosen, lesson.is_start)
    return made


def learn_uses(lesson: Lesson, *, progress: Progress | None = None) -> Uses:
    """Make what foresees uses of a recording."""
    return fit(lesson.chosen, lesson.scores_of_choice, lesson.experts, progress=progress)


def loads_share(eviction: Eviction, lesson: Lesson) -> float:
    """Return the share of a recording's choices that are loaded where a quarter of each layer has room. Modifies."""
    tokens, layers, top_k = lesson.chosen.shape
    cache = Cache(layers, lesson.experts, max(top_k, lesson.experts // 4), eviction, per_layer=True)
    loads = 0
    for token, scores in zip(lesson.chosen, lesson.scores_of_choice, strict=True):
        for layer, chosen in enumerate(token):
            eviction.observe(layer, chosen[None], scores[layer][None], top_k)
            loads += len(cache.request(layer, chosen).loads)
    return float(loads / max(1, tokens * layers * top_k))


def recall(predictor: Predictor, lesson: Lesson) -> float:
    """Return the share of a recording's choices that are among as many guesses, layer 0 left out. Modifies."""
    right = 0
    tokens, layers, top_k = lesson.chosen.shape
    for token in lesson.chosen:
        for layer, chosen in enumerate(token):
            if layer:
                right += int(np.isin(chosen, best(predictor.scores(layer), top_k)).sum())
            predictor.observe(layer, chosen[None])
    return float(right / max(1, tokens * (layers - 1) * top_k))


def write_predictor(path: Path, predictor: Made, *, model: str, top_k: int, tokens: int) -> int:
    """Write a predictor whole or not at all; returns its bytes. Raises `DiskFull` or `InvalidInput`."""
    kind, arrays = _told(predictor)
    layers, experts = arrays["used" if kind == "coactivation" else "bias"].shape
    metadata = {
        "format": PREDICTOR_FORMAT,
        "kind": kind,
        "model": model,
        "layers": str(layers),
        "experts": str(experts),
        "top_k": str(top_k),
        "tokens": str(tokens),
    }
    data = save({name: np.ascontiguousarray(array, dtype=np.float16) for name, array in arrays.items()}, metadata)
    temporary = path.with_name(f".{path.name}.new")
    with writing(path, needed=len(data)):
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return len(data)


def _told(predictor: Made) -> tuple[PredictorKind, dict[str, NDArray[np.float32]]]:
    if isinstance(predictor, Uses):
        return "uses", {name: array for name, array in predictor._asdict().items() if array.size}
    if isinstance(predictor, Learned):
        return "learned", predictor.weights._asdict()
    return "coactivation", predictor.tables._asdict()


def read_predictor(path: Path) -> tuple[PredictorHeader, Made]:
    """Read a predictor file; raises `InvalidFile` with every fault."""
    header = read_predictor_header(path)
    arrays = {name: array.astype(np.float32) for name, array in load_file(path).items()}
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if header.kind == "coactivation":
        broken += [name for name, array in arrays.items() if name not in broken and (array < 0).any()]
    if broken:
        what = "holds numbers that cannot be; learn it again"
        raise InvalidFile(path, [Fault(name, what) for name in broken])
    if header.kind == "uses":
        if (arrays["rates"].shape[1], arrays["given"].shape[1]) != (len(DECAYS), SOURCES):
            raise InvalidFile(path, [Fault("given", "is of other decays than this version's; learn it again")])
        return header, Uses.of(arrays)
    if header.kind == "learned":
        return header, Learned(Weights(**arrays))
    return header, Coactivation(header.layers, header.experts, Tables(**arrays))


def predictor_for(path: Path, *, layers: int, experts: int, top_k: int) -> Predictor:
    """Read a predictor of the next layer's experts for a model of this shape.

    Raises
    ------
    InvalidFile
        It is none, or damaged.
    InvalidInput
        It was learnt from another model, or foresees uses.
    """
    predictor = _fitting(path, (layers, experts, top_k))
    if isinstance(predictor, Uses):
        raise InvalidInput(f"{path}: says what to keep, not what to load ahead: name it as uses, or learn another kind")
    return predictor


def read_uses(path: Path | None, spec: ModelSpec) -> Uses | None:
    """Read what foresees uses of a model's experts, where a file is named; raises as `predictor_for` does."""
    if path is None:
        return None
    predictor = _fitting(path, (spec.layers, spec.experts, spec.top_k))
    if not isinstance(predictor, Uses):
        raise InvalidInput(f"{path}: says what to load ahead, not what to keep; make one with agent learn --kind uses")
    return predictor


def _fitting(path: Path, wanted: tuple[int, int, int]) -> Made:
    header, predictor = read_predictor(path)
    shape = (header.layers, header.experts, header.top_k)
    if shape != wanted:
        raise InvalidInput(
            f"{path}: was learnt from {header.model}, {_shown(shape)}, not for {_shown(wanted)}; learn one from traces "
            "of this model"
        )
    return predictor


def _shown(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers × {shape[1]} experts, top-{shape[2]}"
