"""Loading a checkpoint into transformers: the trunk without its experts (or a range of its layers), or the whole model.

Decides what of transformers is replaced and restores it. Flow: checkpoint headers → patched classes → from_pretrained
→ layer range → `Trunk`. Must not know where experts are: a layer's routed experts are whatever `Trunk.dispatch` says
while a forward runs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from schemas.checkpoint import InvalidCheckpoint, read_checkpoint
from schemas.model import HeldDtype, ModelSpec

LayerDispatch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]; `layer` counts layers with experts."""

_EXPERT_CLASSES: Final = r"^(Mixtral|Olmoe|Qwen2Moe|Qwen3Moe|DeepseekV2|DeepseekV3|GptOss)Experts$"
_TOKENIZER_FILES: Final = ("tokenizer*", "vocab*", "*.model", "tekken.json")
_EXPERT_KEYS: Final = r"\.experts\."  # not `.shared_experts.`, which belong to the trunk

# Patches of transformers are process-wide, so only one load may be under way.
_LOAD_LOCK: Final = threading.Lock()


class RoutedExperts(nn.Module):
    """Stands in for a layer's experts: no weights, the router's choice goes to the running forward's dispatch."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.layer = -1
        self.dispatch: ContextVar[LayerDispatch] = ContextVar("unbound")

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts, [T, D]."""
        return self.dispatch.get()(self.layer, hidden_states, top_k_index, top_k_weights)


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
    """

    model: Any
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    first_layer: int
    last_layer: int
    dispatch: ContextVar[LayerDispatch]

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


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a schema's dtype name."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a checkpoint directory, which a model without text may lack; never from the network."""
    from transformers import AutoTokenizer

    if not any(path for pattern in _TOKENIZER_FILES for path in model_dir.glob(pattern)):
        raise InvalidCheckpoint(f"{model_dir}: has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there")
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{model_dir}: its tokenizer cannot be loaded: {_first_line(error)}") from error


def load_whole(model_dir: Path, *, dtype: str, device: str = "cpu") -> Any:
    """Load a model with all its experts, computed eagerly: the one-node reference."""
    read_checkpoint(model_dir)
    with _LOAD_LOCK, _silent():
        model = _from_pretrained(model_dir, torch_dtype(dtype), experts_implementation="eager")
    return model.eval().requires_grad_(False).to(device)


def load_trunk(
    model_dir: Path,
    *,
    dtype: HeldDtype = "checkpoint",
    first_layer: int = 0,
    last_layer: int | None = None,
    device: str = "cpu",
) -> Trunk:
    """Load a range of decoder layers without reading a single routed expert.

    Parameters
    ----------
    first_layer, last_layer
        Decoder layers, both included; the last of the model by default. The embedding comes with layer 0, the final
        norm and the head with the last layer.

    Raises
    ------
    schemas.checkpoint.InvalidCheckpoint
        The directory holds no supported mixture of experts, or lacks weights of the trunk.
    """
    checkpoint = read_checkpoint(model_dir)
    spec = checkpoint.model_spec.held_as(dtype)
    held = torch_dtype(checkpoint.dtype if dtype == "checkpoint" else dtype)
    last = spec.num_decoder_layers - 1 if last_layer is None else last_layer
    if not 0 <= first_layer <= last < spec.num_decoder_layers:
        raise InvalidCheckpoint(
            f"{model_dir}: there is no layer range {first_layer} … {last}; layers are 0 … {spec.num_decoder_layers - 1}"
        )
    with _LOAD_LOCK, _silent(), _without_experts(model_dir):
        model = _from_pretrained(model_dir, held)
    dispatch: ContextVar[LayerDispatch] = ContextVar(f"dispatch of {spec.id}")
    _bind(model, spec, dispatch)
    _cut(model, first_layer, last, spec.num_decoder_layers)
    model.eval().requires_grad_(False).to(device)
    return Trunk(model, spec, held, torch.device(device), first_layer, last, dispatch)


@contextmanager
def _without_experts(model_dir: Path) -> Iterator[None]:
    """Make transformers build models with `RoutedExperts` and pass over expert weights; undo both afterwards."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

    model_class = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(str(model_dir)))]
    ignored = model_class.__dict__.get("_keys_to_ignore_on_load_unexpected", None)
    had_own = "_keys_to_ignore_on_load_unexpected" in model_class.__dict__
    register_patch_mapping({_EXPERT_CLASSES: RoutedExperts})
    try:
        inherited = model_class._keys_to_ignore_on_load_unexpected or []
        model_class._keys_to_ignore_on_load_unexpected = [*inherited, _EXPERT_KEYS]
        yield
    finally:
        unregister_patch_mapping([_EXPERT_CLASSES])
        if had_own:
            model_class._keys_to_ignore_on_load_unexpected = ignored
        else:
            del model_class._keys_to_ignore_on_load_unexpected


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers' own progress bars and reports off the terminal: messages are the command's business."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _from_pretrained(model_dir: Path, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=dtype, local_files_only=True, use_kernels=False, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            reason = "its tensors have other shapes than its config.json says; fetch both again"
            raise InvalidCheckpoint(f"{model_dir}: {reason}") from error
        raise InvalidCheckpoint(f"{model_dir}: cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InvalidCheckpoint(f"{model_dir}: weights are missing: {shown}; fetch the checkpoint again")
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
