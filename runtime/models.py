"""What ``model:`` names: a checkpoint directory, a store, or a copy of a store without its records (a card).

Decides which of them a directory is, what is known of the model without its weights, and whether a store beside it
holds the same ones. `open_model` is what an agent calls first. Must not know how a trunk is built.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidStore
from runtime.store import TOKENIZER_FILES, Store, StoredParts, layout_of, read_manifest, read_record
from runtime.trunk import CheckpointSource, RecordSource, TrunkSource
from schemas.checkpoint import read_checkpoint
from schemas.model import HeldDtype, ModelSpec
from schemas.store import MANIFEST_NAME, RECORDS_NAME, RecordLayout, StoreManifest

__all__ = ["TOKENIZER_FILES", "Model", "open_model", "open_store_of"]


@dataclass(frozen=True)
class Model:
    """A model as one directory tells it.

    Attributes
    ----------
    spec
        Its counts and bytes, as held.
    layout
        How a record of one of its experts is laid out and computed.
    config_dir
        Where config.json and the tokenizer are.
    source
        The trunk's tensors; None in a card, where they have to come from elsewhere.
    store, manifest
        Only of a store: the records, unless it is a card, and what they are.
    """

    spec: ModelSpec
    layout: RecordLayout
    config_dir: Path
    source: TrunkSource | None = None
    store: Store | None = None
    manifest: StoreManifest | None = None

    def trunk_source(self) -> TrunkSource:
        """Return the source; raises `InvalidStore` in a card."""
        if self.source is None:
            raise InvalidStore(
                f"{self.config_dir}: holds no {RECORDS_NAME}; the trunk has to come from a node that does"
            )
        return self.source


def open_model(path: Path, dtype: HeldDtype = "checkpoint") -> Model:
    """Return what a checkpoint directory, a store or a card says of its model, held as `dtype`.

    A store holds one dtype, which ``checkpoint`` means too.

    Raises
    ------
    schemas.checkpoint.InvalidCheckpoint
        No checkpoint of a supported mixture of experts.
    InvalidStore
        A store that is damaged, holds another dtype, or was made before the trunk was part of it.
    """
    if (path / MANIFEST_NAME).is_file():
        return _open_store(path, dtype)
    checkpoint = read_checkpoint(path)
    spec = checkpoint.model_spec.held_as(dtype)
    return Model(spec, layout_of(checkpoint, dtype), path, CheckpointSource(checkpoint))


def _open_store(path: Path, dtype: HeldDtype) -> Model:
    store = Store.open(path) if (path / RECORDS_NAME).exists() else None
    manifest = read_manifest(path) if store is None else store.manifest
    if dtype not in ("checkpoint", manifest.dtype):
        raise InvalidStore(
            f"{path}: holds weights as {manifest.dtype}, not {dtype}; make it again with --dtype {dtype}"
        )
    if not manifest.trunk or not (path / "config.json").is_file():
        raise InvalidStore(f"{path}: holds no trunk; name the checkpoint as model, or make the store again")
    source = None if store is None else RecordSource(StoredParts(store))
    return Model(manifest.model, manifest.layout, path, source, store, manifest)


def open_store_of(model: Model, path: Path) -> Store:
    """Open a store of a model that is named by another directory.

    Weights are compared by the first and the last expert, which nearly all further training changes: to read every one
    would take as long as to make the store.

    Raises
    ------
    InvalidStore
        It is none, or of another model, dtype or training.
    """
    store = Store.open(path)
    dtype, theirs = model.layout.dtype, store.manifest.model
    if store.manifest.dtype != dtype:
        raise InvalidStore(
            f"{path}: holds experts as {store.manifest.dtype}, not {dtype}; make it again with agent prepare "
            f"--dtype {dtype}"
        )
    if theirs.model_copy(update={"id": model.spec.id}) != model.spec:
        raise InvalidStore(
            f"{path}: holds experts of {theirs.id}, of another shape than {model.spec.id} in {model.config_dir}; make "
            "it again from that with agent prepare"
        )
    for key in ((0, 0), (theirs.layers - 1, theirs.experts - 1)):
        if store.by_key[key].sha256 != _expert_sha256(model, key):
            raise InvalidStore(
                f"{path}: layer {key[0]} expert {key[1]} has other weights there than in {model.config_dir}; make it "
                "again from that with agent prepare"
            )
    return store


def _expert_sha256(model: Model, key: tuple[int, int]) -> str:
    if model.manifest is not None:
        return next(record.sha256 for record in model.manifest.records if record.key == key)
    return hashlib.sha256(read_record(read_checkpoint(model.config_dir), model.layout, key)).hexdigest()
