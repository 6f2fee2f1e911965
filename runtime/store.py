"""Records at rest: one content-addressed run of bytes per (layer, expert, precision) and part of the trunk, made once.

Decides how a record is laid out in its file. Flow: checkpoint tensors → one record after the other → records.bin and
manifest.json in a temporary directory, beside the checkpoint's config and tokenizer → renamed. A copy of a store
without its records.bin tells everything but the weights. Must not know which node holds which record.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from runtime.errors import DiskFull, InvalidInput, InvalidStore, writing
from runtime.precision import pack_record, packed_layout
from runtime.skeleton import Held, build_skeleton, conform, held_tensors
from runtime.tensors import pack, torch_dtype
from runtime.trunk import CheckpointSource, PartKey, part_keys, part_of
from schemas.checkpoint import DTYPE_NAMES, Checkpoint, InvalidCheckpoint, TensorEntry, read_checkpoint
from schemas.files import InvalidFile, load_json
from schemas.model import DTYPE_ITEMSIZE, HeldDtype, ModelSpec
from schemas.precision import LowPrecision, PackedLayout
from schemas.store import (
    MANIFEST_NAME,
    RECORD_ALIGNMENT,
    RECORDS_NAME,
    ExpertForm,
    PackedRecords,
    Part,
    RecordLayout,
    StoredTrunkPart,
    StoreManifest,
    StoreRecord,
    manifest_faults,
)

Progress = Callable[[int, int], None]

TOKENIZER_FILES: Final = ("tokenizer*", "vocab*", "*.model", "tekken.json")
_CONFIG_FILES: Final = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    "chat_template*",
)
_GPT_OSS_ROLES: Final = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


class Store:
    """An opened store. Reading does not modify it; one instance may be read from several threads."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a store; raises `InvalidStore` if it is none or has been cut short."""
        manifest = read_manifest(path)
        try:
            size = (path / RECORDS_NAME).stat().st_size
        except OSError as error:
            raise InvalidStore(f"{path}: {RECORDS_NAME} cannot be read: {error.strerror}") from error
        end = max(record.offset + record.bytes for record in _stored(manifest))
        if size < end:
            raise InvalidStore(
                f"{path / RECORDS_NAME}: truncated: {size} bytes, its manifest promises {end}; make it again"
            )
        return cls(path, manifest)

    @cached_property
    def by_sha256(self) -> Mapping[str, StoreRecord | StoredTrunkPart]:
        """Records of experts and of the trunk's parts by content; equal experts share one entry."""
        return {record.sha256: record for record in _stored(self.manifest)}

    @cached_property
    def by_key(self) -> Mapping[tuple[int, int], StoreRecord]:
        """Records by (layer, expert)."""
        return {record.key: record for record in self.manifest.records}

    @cached_property
    def trunk(self) -> Mapping[PartKey, StoredTrunkPart]:
        """Parts of the trunk by (part, decoder layer); none in a store made before the trunk travelled."""
        return {part.key: part for part in self.manifest.trunk}

    def read(self, sha256: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return a record, or `length` bytes of it from `offset`; raises KeyError for a record that is not here."""
        record = self.by_sha256[sha256]
        count = record.bytes - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > record.bytes:
            raise InvalidInput(f"record {sha256[:12]}…: {count} bytes at {offset} leave its {record.bytes} bytes")
        with (self.path / RECORDS_NAME).open("rb") as stream:
            return os.pread(stream.fileno(), count, record.offset + offset)


def _stored(manifest: StoreManifest) -> list[StoreRecord | StoredTrunkPart]:
    packed = (record for each in manifest.packed for record in each.records)
    return [*manifest.records, *manifest.trunk, *packed]


class StoredParts(Mapping[PartKey, bytes]):
    """The trunk records of a store, each read, and checked, when it is asked for: what a `RecordSource` takes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getitem__(self, key: PartKey) -> bytes:
        part = self._store.trunk[key]
        where = f"{self._store.path / RECORDS_NAME}: {part.part} {part.layer} of the trunk"
        try:
            data = self._store.read(part.sha256)
        except OSError as error:
            raise InvalidStore(f"{where} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise InvalidStore(f"{where} is damaged: its sha256 is another than promised; make the store again")
        return data

    def __iter__(self) -> Iterator[PartKey]:
        return iter(self._store.trunk)

    def __len__(self) -> int:
        return len(self._store.trunk)


def read_manifest(path: Path) -> StoreManifest:
    """Read the manifest of a store, or of a copy without its records; raises `InvalidStore`."""
    try:
        return load_json(path / MANIFEST_NAME, StoreManifest, manifest_faults)
    except InvalidFile as error:
        raise InvalidStore(f"{path}: not a usable store; make it again with `agent prepare`\n{error}") from error


def layout_of(checkpoint: Checkpoint, dtype: HeldDtype = "checkpoint") -> RecordLayout:
    """Return how a record of this model is laid out at `dtype`, and how its experts compute."""
    first = next(iter(checkpoint.expert_tensors.values()))
    shapes = {role: entry.shape for role, entry in first.items()}
    named: list[tuple[Any, tuple[int, ...]]]
    try:
        if checkpoint.family == "gpt_oss":
            named = [(role, shapes[role]) for role in _GPT_OSS_ROLES]
        elif "gate_up_proj" in shapes:
            named = [(role, shapes[role]) for role in ("gate_up_proj", "down_proj")]
        else:
            ffn, hidden = shapes["gate_proj"]
            named = [("gate_up_proj", (2 * ffn, hidden)), ("down_proj", shapes["down_proj"])]
    except KeyError as error:
        raise InvalidCheckpoint(f"{checkpoint.path}: experts lack their {error.args[0]}") from error
    hidden_size = checkpoint.model_spec.hidden_size
    if named[0][1][0 if checkpoint.family == "gpt_oss" else 1] != hidden_size:
        raise InvalidCheckpoint(
            f"{checkpoint.path}: experts have {named[0][0]} {list(named[0][1])}, which contradicts hidden_size "
            f"{hidden_size} in config.json; fetch both again"
        )
    held: Any = checkpoint.dtype if dtype == "checkpoint" else dtype
    parts: list[Part] = []
    offset = 0
    for name, shape in named:
        part = Part.model_construct(name=name, shape=tuple(shape), offset=offset)
        parts.append(part)
        offset += part.elements * DTYPE_ITEMSIZE[held]
    return RecordLayout(form=_form(checkpoint), dtype=held, bytes=offset, parts=tuple(parts))


def _form(checkpoint: Checkpoint) -> ExpertForm:
    config = checkpoint.config
    if checkpoint.family == "gpt_oss":
        defaults = ExpertForm(kind="gpt_oss")
        alpha, limit = config.get("swiglu_alpha", defaults.alpha), config.get("swiglu_limit", defaults.limit)
        return ExpertForm(kind="gpt_oss", alpha=float(alpha), limit=float(limit))
    return ExpertForm(kind="swiglu", activation=str(config.get("hidden_act", "silu")))


def read_record(checkpoint: Checkpoint, layout: RecordLayout, key: tuple[int, int]) -> bytes:
    """Build the record of expert (layer, expert) from the checkpoint's tensors, converted to the layout's dtype."""
    layer, expert = key
    entries = checkpoint.expert_tensors[checkpoint.model_spec.moe_layer_indices[layer], expert]
    pieces: list[bytes] = []
    for part in layout.parts:
        split = part.name == "gate_up_proj" and "gate_proj" in entries
        sources = [entries[name] for name in (("gate_proj", "up_proj") if split else (part.name,))]
        if sum(source.num_bytes for source in sources) != part.elements * DTYPE_ITEMSIZE[checkpoint.dtype]:
            raise InvalidCheckpoint(f"{checkpoint.path}: layer {layer} expert {expert}: {part.name} has another shape")
        pieces.extend(_converted(source, layout.dtype) for source in sources)
    return b"".join(pieces)


def _converted(entry: TensorEntry, dtype: str) -> bytes:
    with entry.file.open("rb") as stream:
        data = os.pread(stream.fileno(), entry.num_bytes, entry.start)
    if len(data) != entry.num_bytes:
        raise InvalidCheckpoint(f"{entry.file}: truncated while it was read; fetch it again")
    have = DTYPE_NAMES[entry.dtype]
    if have == dtype:
        return data
    tensor = torch.frombuffer(bytearray(data), dtype=torch_dtype(have)).to(torch_dtype(dtype))
    return tensor.view(torch.uint8).numpy().tobytes()


def prepare_store(
    model_dir: Path,
    store_dir: Path,
    *,
    dtype: HeldDtype = "checkpoint",
    precisions: Sequence[LowPrecision] = (),
    progress: Progress | None = None,
) -> StoreManifest:
    """Write every expert and every part of the trunk of a checkpoint as a record, whole or not at all.

    Holds one record in memory at a time. What else the checkpoint has that a node needs (config, tokenizer) is copied.

    Parameters
    ----------
    precisions
        In which every expert is written once more.
    progress
        Called with (records done, records in all).

    Raises
    ------
    schemas.checkpoint.InvalidCheckpoint
        No checkpoint of a supported mixture of experts, or its trunk is not whole.
    InvalidInput
        `store_dir` exists and is not an empty directory, or cannot be written.
    UnfitPrecision
        The model's shape has no place for the groups of a precision.
    DiskFull
        With what is missing.
    """
    checkpoint = read_checkpoint(model_dir)
    layout = layout_of(checkpoint, dtype)
    packed = [packed_layout(layout, precision) for precision in dict.fromkeys(precisions)]
    if store_dir.exists() and (not store_dir.is_dir() or any(store_dir.iterdir())):
        raise InvalidInput(f"{store_dir}: exists already; remove it or choose another place")
    spec = checkpoint.model_spec.held_as(layout.dtype)
    each = _aligned(layout.bytes) + sum(_aligned(low.bytes) for low in packed)
    needed = spec.layers * spec.experts * each + _trunk_room(spec)
    with writing(store_dir, needed=needed):
        store_dir.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store_dir.parent).free
        if needed > free:
            raise DiskFull(store_dir, needed=needed, free=free)
        temporary = Path(tempfile.mkdtemp(dir=store_dir.parent, prefix=f".{store_dir.name}."))
        try:
            manifest = _write_store(checkpoint, layout, packed, temporary, progress)
            temporary.chmod(0o755)
            temporary.replace(store_dir)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return manifest


def _trunk_room(spec: ModelSpec) -> int:
    """Bytes that records of the trunk take at most: a tied embedding twice, and a header and padding for each."""
    return spec.trunk_bytes + (spec.input_bytes or 0) + (spec.num_decoder_layers + 2) * (16 << 10)


def _write_store(
    checkpoint: Checkpoint,
    layout: RecordLayout,
    packed: Sequence[PackedLayout],
    path: Path,
    progress: Progress | None,
) -> StoreManifest:
    spec = checkpoint.model_spec.held_as(layout.dtype)
    keys = [(layer, expert) for layer in range(spec.layers) for expert in range(spec.experts)]
    parts = part_keys(0, spec.num_decoder_layers - 1, spec.num_decoder_layers)
    records: list[StoreRecord] = []
    low: list[list[StoreRecord]] = [[] for _ in packed]
    trunk: list[StoredTrunkPart] = []
    total = len(parts) + len(keys) * (1 + len(packed))
    done = iter(range(1, total + 1))
    with (path / RECORDS_NAME).open("wb") as stream:
        for part, record in _trunk_records(checkpoint, torch_dtype(layout.dtype), parts):
            trunk.append(StoredTrunkPart(part=part[0], layer=part[1], **_append(stream, record)))
            _advance(progress, next(done), total)
        for key in keys:
            record = read_record(checkpoint, layout, key)
            records.append(StoreRecord(layer=key[0], expert=key[1], **_append(stream, record)))
            _advance(progress, next(done), total)
            for each, kept in zip(packed, low, strict=True):
                placed = _append(stream, pack_record(record, each))
                kept.append(StoreRecord(layer=key[0], expert=key[1], **placed))
                _advance(progress, next(done), total)
        _flush(stream)
    manifest = StoreManifest(
        model=spec,
        dtype=layout.dtype,
        layout=layout,
        records=tuple(records),
        trunk=tuple(trunk),
        packed=tuple(PackedRecords(layout=one, records=tuple(kept)) for one, kept in zip(packed, low, strict=True)),
    )
    _copy_companions(checkpoint.path, path)
    with (path / MANIFEST_NAME).open("wb") as stream:
        stream.write(json.dumps(manifest.model_dump(mode="json"), indent=1).encode())
        _flush(stream)
    return manifest


def _trunk_records(
    checkpoint: Checkpoint, dtype: torch.dtype, parts: Sequence[PartKey]
) -> Iterator[tuple[PartKey, bytes]]:
    """Yield the record of each part of the trunk, its tensors as a node holds them."""
    wanted: dict[PartKey, dict[str, Held]] = {key: {} for key in parts}
    for name, held in held_tensors(build_skeleton(checkpoint.path, dtype), dtype).items():
        wanted[part_of(name, checkpoint.model_spec.num_decoder_layers)][name] = held
    source = CheckpointSource(checkpoint)
    for key in parts:
        yield key, pack(conform(checkpoint.path, wanted[key], source.tensors(*key)))


def _copy_companions(model_dir: Path, path: Path) -> None:
    """Copy what a node needs beside weights: config and tokenizer."""
    for pattern in (*_CONFIG_FILES, *TOKENIZER_FILES):
        for file in model_dir.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, path / file.name)


def _advance(progress: Progress | None, done: int, total: int) -> None:
    if progress:
        progress(done, total)


def _append(stream: BinaryIO, record: bytes) -> dict[str, Any]:
    """Write a record; return where it lies and what it is called."""
    offset = stream.tell()
    stream.write(record)
    stream.write(bytes(_aligned(len(record)) - len(record)))
    return {"offset": offset, "bytes": len(record), "sha256": hashlib.sha256(record).hexdigest()}


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _aligned(size: int) -> int:
    return -(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
