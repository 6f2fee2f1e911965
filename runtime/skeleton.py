"""A transformers model without experts and without weights, made from config.json alone.

Decides what of transformers is replaced while a model is made, and restores it. What the skeleton says is what a trunk
needs: the names, shapes and dtypes of its tensors. Must not know where their bytes come from.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from schemas.checkpoint import InvalidCheckpoint

LayerDispatch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]; `layer` counts layers with experts."""

_EXPERT_CLASSES: Final = re.compile("(Mixtral|Olmoe|Qwen2Moe|Qwen3Moe|DeepseekV2|DeepseekV3|GptOss)Experts")

# Patches of transformers are process-wide, so only one model may be in the making.
LOAD_LOCK: Final = threading.Lock()


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


class Held(NamedTuple):
    """How a tensor of the trunk is held."""

    shape: torch.Size
    dtype: torch.dtype


def build_skeleton(config_dir: Path, dtype: torch.dtype) -> Any:
    """Make the whole model without experts; its parameters are on the meta device, its rotary embedding is real.

    Raises
    ------
    schemas.checkpoint.InvalidCheckpoint
        config.json cannot be read as a model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_tie_weights

    try:
        with LOAD_LOCK, silent():
            config = AutoConfig.from_pretrained(str(config_dir), local_files_only=True)
            with _without_experts(config), no_tie_weights(), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if (config_dir / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(str(config_dir), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise InvalidCheckpoint(f"{config_dir}: cannot be loaded: {first_line(error)}") from error
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=rotary.config)  # its buffers are computed, in no checkpoint
    return model


def held_tensors(model: Any, dtype: torch.dtype) -> dict[str, Held]:
    """Return how every tensor of a skeleton is held: in `dtype`, but for those that transformers keeps in float32."""
    plan = model._get_dtype_plan(dtype)  # patterns that are searched for in names → dtype
    kept = [(re.compile(pattern.replace("*", ".*")), kind) for pattern, kind in plan.items()]
    return {
        name: Held(tensor.shape, next((kind for pattern, kind in kept if pattern.search(name)), tensor.dtype))
        for name, tensor in model.state_dict().items()
    }


def conform(model_dir: Path, wanted: Mapping[str, Held], read: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the wanted tensors as they are held; raises InvalidCheckpoint where one is missing or of another shape."""
    refuse_missing(model_dir, wanted.keys() - read.keys())
    if any(read[name].shape != held.shape for name, held in wanted.items()):
        reason = "its tensors have other shapes than its config.json says; fetch both again"
        raise InvalidCheckpoint(f"{model_dir}: {reason}")
    return {name: read[name].to(held.dtype) for name, held in wanted.items()}


def refuse_missing(model_dir: Path, names: Iterable[str]) -> None:
    """Raise InvalidCheckpoint if there are names of tensors that are missing."""
    if missing := sorted(names):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InvalidCheckpoint(f"{model_dir}: weights are missing: {shown}; fetch the checkpoint again")


@contextmanager
def _without_experts(config: Any) -> Iterator[None]:
    """Make the models of a config's family with `RoutedExperts`; undo it afterwards.

    The library's own `register_patch_mapping` looks through all of its modules (0.8 s) and leaves them patched when a
    model cannot be made.
    """
    from transformers import AutoModelForCausalLM

    module = sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]
    experts = {name: kind for name, kind in vars(module).items() if _EXPERT_CLASSES.fullmatch(name)}
    try:
        for name in experts:
            setattr(module, name, RoutedExperts)
        yield
    finally:
        for name, kind in experts.items():
            setattr(module, name, kind)


@contextmanager
def silent() -> Iterator[None]:
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


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
