"""One machine alone: a whole model whose experts are loaded from disk as they are asked for, within a budget.

Decides what a budget must have room for: trunk, KV cache and one layer's experts of one token; and that an answer goes
on on the processor when its device is lost. Flow: directory → trunk and residency that executes every expert from its
record → `Segment`. Must not know who wants text.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple

import torch

from runtime.ahead import learnt_from
from runtime.cuda.devices import available_host_bytes, first_words, free_bytes, is_device_fault, usable_device
from runtime.engine import Segment
from runtime.errors import BudgetTooSmall, InvalidStore, RuntimeFault
from runtime.generation import generate
from runtime.loading import load_trunk
from runtime.models import Model, open_model
from runtime.packed import Repacked, Unpacked
from runtime.precision import packed_layout, unpack_parts
from runtime.predictors import read_uses
from runtime.reads import CACHED, Reads, ReadWay, reads_of
from runtime.records import CheckpointExpert, RecordFile, Source
from runtime.routing import EpochBoard, Routing
from runtime.slots import Caching, Key, Residency
from runtime.tensors import torch_dtype
from schemas.checkpoint import read_checkpoint
from schemas.model import HeldDtype, ModelSpec
from schemas.precision import LowPrecision, PackedLayout, Precision
from schemas.store import RECORDS_NAME
from schemas.units import format_bytes

log = logging.getLogger(__name__)

_LOAD_S: Final = 1e-4  # of a load, beside reading
_TRIES: Final = 5

_SPARE_DEVICE: Final = 0.9  # of what is free: activations, captured graphs and kernels need some
_SPARE_HOST: Final = 0.7


class Alone:
    """A model on this machine, on a device for as long as that lasts, and on the processor then.

    Parameters
    ----------
    device
        A CUDA device, or cpu.
    options
        Of `open_alone`.

    Attributes
    ----------
    segment
        Runs the model now.
    fallen
        Why it is not run on the device that was asked for; "" where it is.
    """

    def __init__(self, path: Path, *, device: str = "cpu", **options: Any) -> None:
        self._path = path
        self._options = options
        self._device, self.fallen = usable_device(device)
        self.segment = self._open()

    def _open(self) -> Segment:
        try:
            return open_alone(self._path, device=self._device, **self._options)
        except (RuntimeFault, RuntimeError) as error:
            if not self._falls(error):
                raise
        return open_alone(self._path, **self._options)

    def _falls(self, error: BaseException) -> bool:
        """Whether an error is the device's, so that the processor takes over. Modifies."""
        cause = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error
        if self._device == "cpu" or not is_device_fault(cause):
            return False
        self.fallen = f"{self._device} failed: {first_words(cause)}"
        log.warning("%s; the processor computes instead", self.fallen)
        self._device = "cpu"
        return True

    def generate(self, prompt_ids: Sequence[int], *, max_tokens: int, **options: Any) -> Iterator[int]:
        """Yield tokens as `generate` does; what was said before a device was lost is read again, and goes on."""
        made: list[int] = []
        while True:
            try:
                for token in generate(self.segment, [*prompt_ids, *made], max_tokens=max_tokens - len(made), **options):
                    made.append(token)
                    yield token
            except (RuntimeFault, RuntimeError) as error:
                if not self._falls(error):
                    raise
            else:
                return
            self.segment = open_alone(self._path, **self._options)


def open_alone(
    path: Path,
    *,
    device: str = "cpu",
    dtype: HeldDtype = "checkpoint",
    budget: int | None = None,
    host_budget: int | None = None,
    max_tokens: int,
    precision: Precision = "checkpoint",
    is_packed: bool | None = None,
    eviction: str = "rates",
    prefetch: bool = True,
    predictor: Path | None = None,
    uses: Path | None = None,
    reads: ReadWay = "cached",
    workers: int = 2,
) -> Segment:
    """Load the trunk of a checkpoint directory or store, with every expert executed here.

    Parameters
    ----------
    device
        Where trunk, KV cache and experts are computed: cpu or a CUDA device that can be used.
    budget
        Bytes of the device that trunk, KV cache and experts may take; all that the model needs if None, of a CUDA
        device as much of that as is free.
    host_budget
        Bytes of host memory that keep experts for a CUDA device, pinned; those that it has no room for, as far as there
        is memory, if None.
    max_tokens
        That the KV cache has room for.
    precision
        In which every expert is executed.
    is_packed
        Hold experts packed in memory, and unpack them whenever they are used; None: where that pays, by what reading
        and unpacking take on this machine now. Either way the same bits come out.
    predictor
        A file of `agent learn` that guesses what to load ahead; by default the next layer's router does, and in
        captured decode on a CUDA device always.
    uses
        A file of `agent learn --kind uses`, by which experts are evicted instead of by `eviction`.
    reads
        How records of a store come from the disk: through the page cache, or past it.

    Raises
    ------
    BudgetTooSmall
        Says how much is needed.
    InvalidInput
        The predictor, or `uses`, was learnt from another model.
    """
    model = open_model(path, dtype)
    spec = model.spec
    ahead = learnt_from(predictor, spec) if predictor is not None else None
    foreseen = read_uses(uses, spec)
    decoder = range(spec.num_decoder_layers)
    trunk_bytes = spec.range_bytes(decoder) + spec.kv_bytes_per_token_layer * len(decoder) * max_tokens
    if budget is None:
        budget = trunk_bytes + spec.total_expert_bytes
        if device != "cpu":
            budget = min(budget, int(_SPARE_DEVICE * free_bytes(device)))
    low = None if precision == "checkpoint" else packed_layout(model.layout, precision)
    way = reads_of(reads)
    sources = expert_sources(path, model, way)
    if is_packed is None and low is not None:
        first = next(iter(sources))
        times = _times(
            packed_source(model, first, low.precision, way) or Repacked(sources[first], model.layout, low), low
        )
        room = max(0, budget - trunk_bytes) / (spec.layers * spec.experts)
        is_packed = packing_pays(times, fit=room / spec.expert_bytes, fit_packed=room / low.bytes)
        is_packed |= budget < trunk_bytes + spec.top_k * spec.expert_bytes
    held = low if low is not None and is_packed else None
    _require(spec, budget, trunk_bytes, held.bytes if held is not None else spec.expert_bytes)
    in_host = 0
    if device != "cpu":
        lacking = max(0, trunk_bytes + spec.total_expert_bytes - budget)
        wanted = spec.total_expert_bytes if lacking else 0
        in_host = min(wanted, int(_SPARE_HOST * available_host_bytes())) if host_budget is None else host_budget
    residency = Residency(
        model.layout,
        {"device": budget - trunk_bytes, "host": in_host},
        device=device,
        reads=way,
        max_slots=spec.layers * spec.experts,
        caching=Caching(
            spec.layers, spec.experts, eviction=eviction, uses=foreseen, prefetch=prefetch, workers=workers
        ),
        precision=held.precision if held is not None else None,
    )
    for key, source in sources.items():
        stored = None if low is None else packed_source(model, key, low.precision, way)
        _place(residency, key, source, low=low, stored=stored)
    board = EpochBoard(Routing.all_local(1, layers=spec.layers, experts=spec.experts))
    return Segment(load_trunk(path, dtype=dtype, device=device), residency, board, ahead=ahead)


def _place(residency: Residency, key: Key, source: Source, *, low: PackedLayout | None, stored: Source | None) -> None:
    """Let an expert be executed from its record: in a low precision, from the one `stored` in it where there is one."""
    if low is None:
        residency.place(key, source)
    elif residency.packed is not None:
        residency.place(key, source)
        if stored is not None:
            residency.place_packed(key, low.precision, stored)
    else:
        remade = Unpacked(Repacked(source, residency.layout, low), residency.layout, low)
        residency.place(key, remade if stored is None else Unpacked(stored, residency.layout, low))
        residency.add_source(key, remade)


class Times(NamedTuple):
    """What it takes to read a packed record, and to unpack one; seconds."""

    read_s: float
    unpack_s: float


def packing_pays(times: Times, *, fit: float, fit_packed: float) -> bool:
    """Whether experts that are held packed are computed sooner, unpacking at every use, than weights that are missing.

    A third of what does not fit is taken to be missing when it is asked for: with a quarter of the experts at hand .24
    to .32 were (`tests.bench.precision`). Packed, a use takes ``unpack + missing × read``, else
    ``missing × (read + unpack)``.

    Parameters
    ----------
    fit, fit_packed
        Share of the experts that have room as weights, and packed.

    >>> packing_pays(Times(read_s=300e-6, unpack_s=30e-6), fit=0.25, fit_packed=1.0)
    True
    >>> packing_pays(Times(read_s=1e-3, unpack_s=4e-3), fit=0.25, fit_packed=1.0)
    False
    """
    missing, missing_packed = (max(0.0, 1 - share) / 3 for share in (fit, fit_packed))
    return times.unpack_s + missing_packed * times.read_s < missing * (times.read_s + times.unpack_s)


def _times(source: Source, low: PackedLayout) -> Times:
    """Measure, the quickest of a few tries of unpacking, and the first read: what is read next is not in memory yet."""
    record = bytearray(low.bytes)
    began = perf_counter()
    source.read_into([memoryview(record)], check=False)
    read_s = perf_counter() - began + _LOAD_S
    parts = [torch.empty(part.shape, dtype=torch_dtype(low.dtype)) for part in low.parts]
    tries = []
    for _ in range(_TRIES):
        began = perf_counter()
        unpack_parts(torch.frombuffer(record, dtype=torch.uint8), low, parts)
        tries.append(perf_counter() - began)
    return Times(read_s, min(tries))


def _require(spec: ModelSpec, budget: int, trunk_bytes: int, expert_bytes: int) -> None:
    """Refuse a budget without room for the trunk and one layer's experts of a token."""
    needed = trunk_bytes + spec.top_k * expert_bytes
    if budget < needed:
        why = (
            f"{format_bytes(trunk_bytes)} for trunk and KV cache, and {spec.top_k} experts of "
            f"{format_bytes(expert_bytes)} that a token needs in a layer"
        )
        raise BudgetTooSmall("device", budget=budget, needed=needed, why=why)


def packed_source(model: Model, key: Key, precision: LowPrecision, reads: Reads = CACHED) -> Source | None:
    """Return where the record of an expert in a low precision is; None where the model has none."""
    packed = model.store.manifest.packed_as(precision) if model.store is not None else None
    if model.store is None or packed is None:
        return None
    record = packed.records[key[0] * model.spec.experts + key[1]]
    return RecordFile(model.store.path / RECORDS_NAME, record.sha256, record.offset, reads)


def expert_sources(path: Path, model: Model, reads: Reads = CACHED) -> dict[Key, Source]:
    """Return where the record of every expert is; raises `InvalidStore` in a card, which has none."""
    if model.store is not None:
        file = model.store.path / RECORDS_NAME
        return {key: RecordFile(file, found.sha256, found.offset, reads) for key, found in model.store.by_key.items()}
    if model.manifest is not None:
        raise InvalidStore(f"{path}: holds no {RECORDS_NAME}; name a store or checkpoint that does")
    checkpoint = read_checkpoint(path)
    spec = model.spec
    keys = [(layer, expert) for layer in range(spec.layers) for expert in range(spec.experts)]
    return {key: CheckpointExpert(checkpoint, model.layout, key) for key in keys}
