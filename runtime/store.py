"""Expert records at rest: one content-addressed run of bytes per (layer, expert), made once from a checkpoint.

Decides how a record is laid out in its file. Flow: checkpoint tensors → one record after the other → records.bin and
manifest.json in a temporary directory → renamed. Must not know which node holds which record.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from runtime.errors import DiskFull, InvalidInput, InvalidStore, writing
from runtime.loading import torch_dtype
from schemas.checkpoint import DTYPE_NAMES, Checkpoint, InvalidCheckpoint, TensorEntry, read_checkpoint
from schemas.files import InvalidFile, load_json
from schemas.model import DTYPE_ITEMSIZE, HeldDtype
from schemas.store import (
    MANIFEST_NAME,
    RECORD_ALIGNMENT,
    RECORDS_NAME,
    ExpertForm,
    Part,
    RecordLayout,
    StoreManifest,
    StoreRecord,
    manifest_faults,
)

Progress = Callable[[int, int], None]

_GPT_OSS_ROLES: Final = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


class Store:
    """An opened store. Reading does not modify it; one instance may be read from several threads."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a store; raises `InvalidStore` if it is none or has been cut short."""
        try:
            manifest = load_json(path / MANIFEST_NAME, StoreManifest, manifest_faults)
            size = (path / RECORDS_NAME).stat().st_size
        except InvalidFile as error:
            raise InvalidStore(f"{path}: not a usable store; make it again with `agent prepare`\n{error}") from error
        except OSError as error:
            raise InvalidStore(f"{path}: {RECORDS_NAME} cannot be read: {error.strerror}") from error
        end = max(record.offset + record.bytes for record in manifest.records)
        if size < end:
            raise InvalidStore(
                f"{path / RECORDS_NAME}: truncated: {size} bytes, its manifest promises {end}; make it again"
            )
        return cls(path, manifest)

    @cached_property
    def by_sha256(self) -> Mapping[str, StoreRecord]:
        """Records by content; equal experts share one entry."""
        return {record.sha256: record for record in self.manifest.records}

    @cached_property
    def by_key(self) -> Mapping[tuple[int, int], StoreRecord]:
        """Records by (layer, expert)."""
        return {record.key: record for record in self.manifest.records}

    def read(self, sha256: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return a record, or `length` bytes of it from `offset`; raises KeyError for a record that is not here."""
        record = self.by_sha256[sha256]
        count = record.bytes - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > record.bytes:
            raise InvalidInput(f"record {sha256[:12]}…: {count} bytes at {offset} leave its {record.bytes} bytes")
        with (self.path / RECORDS_NAME).open("rb") as stream:
            return os.pread(stream.fileno(), count, record.offset + offset)


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
    model_dir: Path, store_dir: Path, *, dtype: HeldDtype = "checkpoint", progress: Progress | None = None
) -> StoreManifest:
    """Write every expert of a checkpoint as a record, whole or not at all; holds one expert in memory at a time.

    Parameters
    ----------
    progress
        Called with (records done, records in all).

    Raises
    ------
    schemas.checkpoint.InvalidCheckpoint
        No checkpoint of a supported mixture of experts.
    InvalidInput
        `store_dir` exists and is not an empty directory, or cannot be written.
    DiskFull
        With what is missing.
    """
    checkpoint = read_checkpoint(model_dir)
    layout = layout_of(checkpoint, dtype)
    if store_dir.exists() and (not store_dir.is_dir() or any(store_dir.iterdir())):
        raise InvalidInput(f"{store_dir}: exists already; remove it or choose another place")
    needed = checkpoint.model_spec.layers * checkpoint.model_spec.experts * _aligned(layout.bytes)
    with writing(store_dir, needed=needed):
        store_dir.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store_dir.parent).free
        if needed > free:
            raise DiskFull(store_dir, needed=needed, free=free)
        temporary = Path(tempfile.mkdtemp(dir=store_dir.parent, prefix=f".{store_dir.name}."))
        try:
            manifest = _write_store(checkpoint, layout, temporary, progress)
            temporary.chmod(0o755)
            temporary.replace(store_dir)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return manifest


def _write_store(checkpoint: Checkpoint, layout: RecordLayout, path: Path, progress: Progress | None) -> StoreManifest:
    spec = checkpoint.model_spec.held_as(layout.dtype)
    records: list[StoreRecord] = []
    with (path / RECORDS_NAME).open("wb") as stream:
        for layer in range(spec.layers):
            for expert in range(spec.experts):
                records.append(_append(stream, layer, expert, read_record(checkpoint, layout, (layer, expert))))
                if progress:
                    progress(len(records), spec.layers * spec.experts)
        _flush(stream)
    manifest = StoreManifest(model=spec, dtype=layout.dtype, layout=layout, records=tuple(records))
    with (path / MANIFEST_NAME).open("wb") as stream:
        stream.write(json.dumps(manifest.model_dump(mode="json"), indent=1).encode())
        _flush(stream)
    return manifest


def _append(stream: BinaryIO, layer: int, expert: int, record: bytes) -> StoreRecord:
    offset = stream.tell()
    stream.write(record)
    stream.write(bytes(_aligned(len(record)) - len(record)))
    digest = hashlib.sha256(record).hexdigest()
    return StoreRecord(layer=layer, expert=expert, offset=offset, bytes=len(record), sha256=digest)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _aligned(size: int) -> int:
    return -(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
