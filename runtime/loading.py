"""Loading a model: a range of its trunk without any expert, or all of it; and its tokenizer.

Decides which tensors a range needs, and refuses what is missing or has another shape. Flow: config.json → skeleton →
tensors of the range's parts from their source → cut to the range → `Trunk`. Must not know where experts are: a layer's
routed experts are whatever `Trunk.dispatch` says while a forward runs.
"""

import ctypes
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from runtime.decoding import Decoder
from runtime.leaning import join_projections
from runtime.models import TOKENIZER_FILES, Model, open_model
from runtime.quick import quicken
from runtime.skeleton import (
    LOAD_LOCK,
    Held,
    LayerDispatch,
    RoutedExperts,
    build_skeleton,
    conform,
    first_line,
    held_tensors,
    refuse_missing,
    silent,
)
from runtime.tensors import torch_dtype
from runtime.trunk import PartKey, TrunkSource, part_keys, part_of
from schemas.checkpoint import EMBEDDING, HEAD, InvalidCheckpoint, read_checkpoint
from schemas.model import HeldDtype, ModelSpec

__all__ = [
    "LayerDispatch",
    "RoutedExperts",
    "TensorPool",
    "Trunk",
    "load_tokenizer",
    "load_trunk",
    "load_whole",
]

TensorPool = WeakValueDictionary[str, torch.Tensor]
"""Tensors of one model by name, for as long as a trunk has them: ranges loaded with one pool share what they share."""


@dataclass(frozen=True)
class Trunk:
    """Decoder layers `first_layer` … `last_layer` (both included) of a model, without routed experts.

    Attributes
    ----------
    model
        The transformers model; its layer list is cut to the range, numbered from 0.
    spec
        The whole model, held as `dtype`.
    dispatch
        What `RoutedExperts` call during a forward; set per thread (or task) by who runs it.
    decoder
        Runs single tokens through the range, as the model would.
    """

    model: Any
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    first_layer: int
    last_layer: int
    dispatch: ContextVar[LayerDispatch]
    decoder: Decoder

    @property
    def has_embedding(self) -> bool:
        """Whether the range starts at the tokens."""
        return self.first_layer == 0

    @property
    def has_head(self) -> bool:
        """Whether the range ends at the logits."""
        return self.last_layer == self.spec.num_decoder_layers - 1

    @property
    def max_context(self) -> int:
        """Tokens the model can attend to."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens after which the model has nothing more to say."""
        found: set[int] = set()
        for config in (self.model.config, self.model.generation_config):
            ids = getattr(config, "eos_token_id", None)
            found.update(ids if isinstance(ids, list | tuple) else () if ids is None else (ids,))
        return frozenset(found)


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a checkpoint or store directory, which may lack one; never from the network."""
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZER_FILES for path in model_dir.glob(pattern)):
        raise InvalidCheckpoint(f"{model_dir}: has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{model_dir}: its tokenizer cannot be loaded: {first_line(error)}") from error


def load_whole(model_dir: Path, *, dtype: str, device: str = "cpu") -> Any:
    """Load a model with all its experts, computed eagerly: the one-node reference."""
    read_checkpoint(model_dir)
    with LOAD_LOCK, silent():
        model = _from_pretrained(model_dir, torch_dtype(dtype))
    return model.eval().requires_grad_(False).to(device)


def load_trunk(
    model_dir: Path,
    *,
    dtype: HeldDtype = "checkpoint",
    first_layer: int = 0,
    last_layer: int | None = None,
    source: TrunkSource | None = None,
    pool: TensorPool | None = None,
    device: str = "cpu",
) -> Trunk:
    """Load a range of decoder layers, reading its tensors and no others.

    Parameters
    ----------
    model_dir
        What `runtime.models.open_model` takes: a checkpoint directory, a store, or a copy of one without its records.
    first_layer, last_layer
        Decoder layers, both included; the last of the model by default. The embedding comes with layer 0, the final
        norm and the head with the last layer.
    source
        Where the tensors come from; by default, `model_dir` itself.
    pool
        Tensors of other ranges of this model (at this dtype and device) that are in use; what is read is added.

    Raises
    ------
    schemas.checkpoint.InvalidCheckpoint
        The directory holds no supported mixture of experts, or the source lacks weights of the range.
    InvalidStore
        There is no source for the trunk, or it is damaged.
    """
    opened = open_model(model_dir, dtype)
    spec, held = opened.spec, torch_dtype(opened.layout.dtype)
    last = spec.num_decoder_layers - 1 if last_layer is None else last_layer
    if not 0 <= first_layer <= last < spec.num_decoder_layers:
        raise InvalidCheckpoint(
            f"{model_dir}: there is no layer range {first_layer} … {last}; layers are 0 … {spec.num_decoder_layers - 1}"
        )
    model = build_skeleton(opened.config_dir, held)
    wanted = _wanted(held_tensors(model, held), part_keys(first_layer, last, spec.num_decoder_layers), spec)
    pool = TensorPool() if pool is None else pool
    found = _read(opened, wanted, source, pool, device)
    _tie(model, found)
    model.load_state_dict(found, strict=False, assign=True)
    join_projections(model)
    pool.update({name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in found})
    dispatch: ContextVar[LayerDispatch] = ContextVar(f"dispatch of {spec.id}")
    _bind(model, spec, dispatch)
    _cut(model, first_layer, last, spec.num_decoder_layers)
    model.eval().requires_grad_(False).to(device)
    quicken(model, held)
    decoder = Decoder(model, held, dispatch)
    _give_back()
    return Trunk(model, spec, held, torch.device(device), first_layer, last, dispatch, decoder)


def _give_back() -> None:
    """Return freed memory to the system: loading takes much of a trunk twice for a moment; glibc would keep that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


_Wanted = Mapping[PartKey, Mapping[str, Held]]


def _wanted(tensors: Mapping[str, Held], parts: list[PartKey], spec: ModelSpec) -> _Wanted:
    """Return how each part's tensors are held, of those parts only."""
    wanted: dict[PartKey, dict[str, Held]] = {key: {} for key in parts}
    for name, held in tensors.items():
        key = part_of(name, spec.num_decoder_layers)
        if key in wanted:
            wanted[key][name] = held
    return wanted


def _read(
    opened: Model, wanted: _Wanted, source: TrunkSource | None, pool: TensorPool, device: str
) -> dict[str, torch.Tensor]:
    """Return the wanted tensors by name, from the pool or else from their source (by default, the model's own)."""
    found: dict[str, torch.Tensor] = {}
    for (part, layer), tensors in wanted.items():
        shared = {name: tensor for name in tensors if (tensor := pool.get(name)) is not None}
        if len(shared) < len(tensors):
            read = (source or opened.trunk_source()).tensors(part, layer)
            held = conform(opened.config_dir, tensors, read)
            shared = {name: tensor.to(device) for name, tensor in held.items()} | shared
        found |= shared
    return found


def _tie(model: Any, found: dict[str, torch.Tensor]) -> None:
    """Keep one copy of embedding and head where the model says that they are the same; modifies `found`."""
    is_tied = model.config.tie_word_embeddings and EMBEDDING in found and HEAD in found
    if is_tied and torch.equal(found[EMBEDDING], found[HEAD]):
        found[HEAD] = found[EMBEDDING]


def _from_pretrained(model_dir: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype=dtype,
            local_files_only=True,
            use_kernels=False,
            output_loading_info=True,
            experts_implementation="eager",
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            reason = "its tensors have other shapes than its config.json says; fetch both again"
            raise InvalidCheckpoint(f"{model_dir}: {reason}") from error
        raise InvalidCheckpoint(f"{model_dir}: cannot be loaded: {first_line(error)}") from error
    refuse_missing(model_dir, info["missing_keys"])
    return model


def _bind(model: Any, spec: ModelSpec, dispatch: ContextVar[LayerDispatch]) -> None:
    """Tell every stand-in which layer it is."""
    layer_of = {decoder: layer for layer, decoder in enumerate(spec.moe_layer_indices)}
    for decoder, decoder_layer in enumerate(model.model.layers):
        for module in decoder_layer.modules():
            if isinstance(module, RoutedExperts):
                module.layer, module.dispatch = layer_of[decoder], dispatch


def _cut(model: Any, first: int, last: int, num_layers: int) -> None:
    """Cut a model to a layer range in place. The cache's length is read from its layer 0, hence the renumbering."""
    config = model.config
    model.model.layers = model.model.layers[first : last + 1]
    config.num_hidden_layers = last + 1 - first
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types[first : last + 1])
    for index, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    if first > 0:
        model.model.embed_tokens = None
    if last < num_layers - 1:
        model.model.norm = nn.Identity()
        model.lm_head = None
