"""One machine alone: a whole model whose experts are loaded from disk as they are asked for, within a budget.

Decides what a budget must have room for: trunk, KV cache and one layer's experts of one token. Flow: directory → trunk
and residency that executes every expert from its record → `Segment`. Must not know who wants text.
"""

from pathlib import Path

from runtime.engine import Segment
from runtime.errors import BudgetTooSmall, InvalidStore
from runtime.loading import load_trunk
from runtime.models import Model, open_model
from runtime.records import CheckpointExpert, RecordFile, Source
from runtime.routing import EpochBoard, Routing
from runtime.slots import Caching, Key, Residency
from schemas.checkpoint import read_checkpoint
from schemas.model import HeldDtype
from schemas.store import RECORDS_NAME
from schemas.units import format_bytes


def open_alone(
    path: Path,
    *,
    dtype: HeldDtype = "checkpoint",
    budget: int | None = None,
    max_tokens: int,
    eviction: str = "rates",
    prefetch: bool = True,
    workers: int = 2,
) -> Segment:
    """Load the trunk of a checkpoint directory or store, with every expert executed here.

    Parameters
    ----------
    budget
        Bytes that trunk, KV cache and experts may take; all that the model needs if None.
    max_tokens
        That the KV cache has room for.

    Raises
    ------
    BudgetTooSmall
        Says how much is needed.
    """
    model = open_model(path, dtype)
    spec = model.spec
    decoder = range(spec.num_decoder_layers)
    trunk_bytes = spec.range_bytes(decoder) + spec.kv_bytes_per_token_layer * len(decoder) * max_tokens
    budget = trunk_bytes + spec.total_expert_bytes if budget is None else budget
    needed = trunk_bytes + spec.top_k * spec.expert_bytes
    if budget < needed:
        why = (
            f"{format_bytes(trunk_bytes)} for trunk and KV cache, and {spec.top_k} experts of "
            f"{format_bytes(spec.expert_bytes)} that a token needs in a layer"
        )
        raise BudgetTooSmall("device", budget=budget, needed=needed, why=why)
    residency = Residency(
        model.layout,
        {"device": budget - trunk_bytes},
        max_slots=spec.layers * spec.experts,
        caching=Caching(spec.layers, spec.experts, eviction=eviction, prefetch=prefetch, workers=workers),
    )
    for key, source in expert_sources(path, model).items():
        residency.place(key, source)
    board = EpochBoard(Routing.all_local(1, layers=spec.layers, experts=spec.experts))
    return Segment(load_trunk(path, dtype=dtype), residency, board)


def expert_sources(path: Path, model: Model) -> dict[Key, Source]:
    """Return where the record of every expert is; raises `InvalidStore` in a card, which has none."""
    if model.store is not None:
        file = model.store.path / RECORDS_NAME
        return {key: RecordFile(file, found.sha256, found.offset) for key, found in model.store.by_key.items()}
    if model.manifest is not None:
        raise InvalidStore(f"{path}: holds no {RECORDS_NAME}; name a store or checkpoint that does")
    checkpoint = read_checkpoint(path)
    spec = model.spec
    keys = [(layer, expert) for layer in range(spec.layers) for expert in range(spec.experts)]
    return {key: CheckpointExpert(checkpoint, model.layout, key) for key in keys}
