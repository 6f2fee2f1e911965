"""What a Hugging Face checkpoint directory contains, read from its headers alone (no weights, no torch).

Decides which tensors are experts, which family the model is, and from that its `ModelSpec`.
Flow: config.json + safetensors headers → `Checkpoint` → `ModelSpec`. Must not know how weights are executed.
"""

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from schemas.model import ModelSpec

_HEADER_LIMIT: Final = 100 << 20  # the limit of the safetensors library itself
SAFETENSORS_ITEMSIZE: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
                               "BOOL": 1}  # fmt: skip
DTYPE_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

SUPPORTED_FAMILIES: Final = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

_SPLIT_EXPERT: Final = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\."
    r"(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_FUSED_EXPERT: Final = re.compile(
    r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj|gate_up_proj_bias|down_proj_bias)"
)
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
_ROLE: Final = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class InvalidCheckpoint(ValueError):
    """A directory that is not a checkpoint this product can place and run; the message says why."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes ``[start, start + num_bytes)`` of `file`, row-major."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The table of contents of a checkpoint directory."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def family(self) -> str:
        """The Hugging Face ``model_type``."""
        return str(self.config["model_type"])

    @property
    def max_context(self) -> int | None:
        """Tokens of the longest context that the model's positions reach; None where the config does not say."""
        most = self.config.get("max_position_embeddings")
        return most if isinstance(most, int) else None

    @cached_property
    def expert_tensors(self) -> Mapping[tuple[int, int], Mapping[str, TensorEntry]]:
        """Tensors of each expert by (decoder layer, expert) and role.

        Roles are ``gate_proj, up_proj, down_proj`` where experts are stored one by one, and ``gate_up_proj,
        down_proj`` (``…_bias``) where a layer's experts are stored fused; entries are cut to one expert then.
        """
        found: dict[tuple[int, int], dict[str, TensorEntry]] = defaultdict(dict)
        for name, entry in self.tensors.items():
            if match := _SPLIT_EXPERT.fullmatch(name):
                role = _ROLE.get(match[3], match[3])
                found[int(match[1]), int(match[2])][role] = entry
            elif match := _FUSED_EXPERT.fullmatch(name):
                for expert in range(entry.shape[0]):
                    found[int(match[1]), expert][match[2]] = _row(entry, expert)
        last = _setting(self, "num_hidden_layers")  # DeepSeek ships draft layers beyond it, which nothing here runs
        return {key: parts for key, parts in sorted(found.items()) if key[0] < last}

    @cached_property
    def model_spec(self) -> ModelSpec:
        """Counts and bytes of the model at its checkpoint dtype."""
        return _model_spec(self)

    @property
    def dtype(self) -> str:
        """Checkpoint dtype of the experts: float32, float16 or bfloat16."""
        kinds = {entry.dtype for parts in self.expert_tensors.values() for entry in parts.values()}
        if len(kinds) != 1 or not kinds <= DTYPE_NAMES.keys():
            raise InvalidCheckpoint(
                f"{self.path}: expert weights are stored as {', '.join(sorted(kinds))}; "
                f"one of {', '.join(DTYPE_NAMES)} is needed throughout"
            )
        return DTYPE_NAMES[kinds.pop()]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read config.json and every safetensors header of a checkpoint directory.

    Raises
    ------
    InvalidCheckpoint
        Not a checkpoint, no mixture of experts, a family that is not supported, or a truncated file.
    """
    config = _read_config(path)
    tensors: dict[str, TensorEntry] = {}
    for file in _weight_files(path):
        tensors.update(read_safetensors_header(file))
    checkpoint = Checkpoint(path=path, config=config, tensors=tensors)
    _require_supported(checkpoint)
    return checkpoint


def is_expert(name: str) -> bool:
    """Whether a tensor of this name belongs to a routed expert."""
    return bool(_SPLIT_EXPERT.fullmatch(name) or _FUSED_EXPERT.fullmatch(name))


def read_safetensors_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, having checked that all of their bytes are there."""
    return _parse_header(file)[0]


def read_safetensors_metadata(file: Path) -> dict[str, str]:
    """Return the text metadata of one safetensors file."""
    return _parse_header(file)[1]


def _parse_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise InvalidCheckpoint(
                    f"{file}: not a safetensors file, or truncated: {size} bytes, header wants {length}"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise InvalidCheckpoint(f"{file}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidCheckpoint(f"{file}: not a safetensors file: its header is no JSON") from error
    try:
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        entries = {name: _entry(file, 8 + length, info) for name, info in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"{file}: not a safetensors file: malformed header ({error})") from error
    end = max((entry.start + entry.num_bytes for entry in entries.values()), default=8 + length)
    if end > size:
        raise InvalidCheckpoint(
            f"{file}: truncated: its header promises {end} bytes, the file has {size}; fetch it again"
        )
    return entries, metadata


def _entry(file: Path, data_start: int, info: Any) -> TensorEntry:
    first, last = info["data_offsets"]
    shape = tuple(int(n) for n in info["shape"])
    return TensorEntry(file=file, dtype=info["dtype"], shape=shape, start=data_start + first, num_bytes=last - first)


def _row(entry: TensorEntry, index: int) -> TensorEntry:
    """Cut row `index` of the first axis out of a tensor."""
    step = entry.num_bytes // entry.shape[0]
    return TensorEntry(entry.file, entry.dtype, entry.shape[1:], entry.start + index * step, step)


def _read_config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise InvalidCheckpoint(f"{path}: no config.json there; expected a Hugging Face checkpoint directory")
    try:
        config = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidCheckpoint(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InvalidCheckpoint(f"{file}: has no model_type, so the model's family is unknown")
    return config


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidCheckpoint(f"{index}: not a weight index: {error}") from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise InvalidCheckpoint(f"{path}: the index names {', '.join(missing)}, not there; fetch them again")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files and (path / "manifest.json").is_file():
        raise InvalidCheckpoint(f"{path}: is a store of agent prepare; name the checkpoint that it was made from")
    if not files:
        raise InvalidCheckpoint(f"{path}: no *.safetensors there; convert the checkpoint to safetensors first")
    return files


def _require_supported(checkpoint: Checkpoint) -> None:
    if checkpoint.family not in SUPPORTED_FAMILIES:
        moe = " (and holds no routed experts)" if not checkpoint.expert_tensors else ""
        raise InvalidCheckpoint(
            f"{checkpoint.path}: family {checkpoint.family!r} is not supported{moe}; "
            f"supported are {', '.join(SUPPORTED_FAMILIES)}"
        )
    if not checkpoint.expert_tensors:
        raise InvalidCheckpoint(
            f"{checkpoint.path}: no routed experts among its tensors, so it is no mixture-of-experts model "
            "(quantised experts such as MXFP4 must be dequantised first)"
        )


def _setting(checkpoint: Checkpoint, *names: str) -> int:
    for name in names:
        if isinstance(value := checkpoint.config.get(name), int):
            return value
    raise InvalidCheckpoint(f"{checkpoint.path / 'config.json'}: none of {', '.join(names)} is given")


def _model_spec(checkpoint: Checkpoint) -> ModelSpec:
    experts = checkpoint.expert_tensors
    layers = sorted({layer for layer, _ in experts})
    per_layer = {layer: sum(1 for key in experts if key[0] == layer) for layer in layers}
    sizes = {sum(part.num_bytes for part in parts.values()) for parts in experts.values()}
    if len(set(per_layer.values())) != 1 or len(sizes) != 1:
        raise InvalidCheckpoint(f"{checkpoint.path}: layers differ in experts or experts in size: tensors are missing")
    decoder_layers = _setting(checkpoint, "num_hidden_layers")
    itemsize = next(SAFETENSORS_ITEMSIZE[part.dtype] for part in experts[layers[0], 0].values())
    layer_bytes, input_bytes, other_bytes = _trunk_bytes(checkpoint)
    is_tied = HEAD not in checkpoint.tensors  # the head is the embedding again
    num_experts = per_layer[layers[0]]
    return ModelSpec(
        id=checkpoint.path.resolve().name,
        layers=len(layers),
        experts=num_experts,
        top_k=_setting(checkpoint, "num_experts_per_tok"),
        hidden_size=_setting(checkpoint, "hidden_size"),
        itemsize=itemsize,
        expert_bytes=sizes.pop(),
        trunk_layer_bytes=-(-layer_bytes // decoder_layers),  # the mean, rounded up: dense layers differ from the rest
        embedding_bytes=other_bytes,
        input_bytes=input_bytes,
        head_bytes=other_bytes if is_tied else other_bytes - input_bytes,
        kv_bytes_per_token_layer=_kv_elements(checkpoint) * itemsize,
        decoder_layers=None if decoder_layers == len(layers) else decoder_layers,
        moe_layers=None if layers == list(range(len(layers))) else tuple(layers),
    )


def _trunk_bytes(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Bytes of all decoder layers without routed experts, of the embedding, and of all that lies outside of layers."""
    inside = embedding = outside = 0
    last = _setting(checkpoint, "num_hidden_layers")
    for name, entry in checkpoint.tensors.items():
        if is_expert(name):
            continue
        if layer := _LAYER.match(name):
            inside += entry.num_bytes if int(layer[1]) < last else 0
        else:
            outside += entry.num_bytes
            embedding += entry.num_bytes if name == EMBEDDING else 0
    return inside, embedding, outside


def _kv_elements(checkpoint: Checkpoint) -> int:
    """Elements the KV cache keeps per token and layer (of DeepSeek the latent, as transformers does since 5.23)."""
    config, heads = checkpoint.config, _setting(checkpoint, "num_attention_heads")
    if config.get("kv_lora_rank") is not None:
        return _setting(checkpoint, "kv_lora_rank") + _setting(checkpoint, "qk_rope_head_dim")
    head_dim = config.get("head_dim") or _setting(checkpoint, "hidden_size") // heads
    return 2 * (config.get("num_key_value_heads") or heads) * int(head_dim)
