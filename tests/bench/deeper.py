"""A deeper model from a checkpoint: its layers over and over, so that a benchmark has more of the same size.

Decides names and files only; what such a model says is of no use, what it costs is that of a model so deep.
"""

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def repeat_layers(model: Path, times: int, target: Path) -> Path:
    """Write a checkpoint with every layer `times` times, the whole stack one after the other, and return its path."""
    target.mkdir()
    config = json.loads((model / "config.json").read_text())
    layers = int(config["num_hidden_layers"])
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            match = _LAYER.fullmatch(name)
            if match is None:
                tensors[name] = tensor
                continue
            for turn in range(times):
                tensors[f"model.layers.{turn * layers + int(match[1])}.{match[2]}"] = tensor.clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers * times}))
    for file in model.iterdir():
        if file.name.startswith(("tokenizer", "generation_config")):
            shutil.copy(file, target / file.name)
    return target
