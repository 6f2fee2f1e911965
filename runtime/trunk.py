"""Where the trunk's tensors come from, part by part: a checkpoint, or records that were made of one.

Decides which part a parameter belongs to: the embedding, one decoder layer, or final norm and head. Flow: names and
bytes of a checkpoint (or of records) → tensors under the names that the whole model's parameters have in transformers.
Must not know what is built of them (`runtime.loading`).
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final, Literal, Protocol

import torch

from runtime.errors import InvalidStore
from runtime.tensors import read_tensor, unpack
from schemas.checkpoint import EMBEDDING, HEAD, Checkpoint, TensorEntry, is_expert

PartName = Literal["embedding", "layer", "head"]
PartKey = tuple[PartName, int]
"""(part, decoder layer): ``("embedding", 0)``, ``("layer", l)`` or ``("head", last layer)``."""

_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")
_MIXTRAL: Final = ".block_sparse_moe."  # transformers calls it `mlp` since its version 5


class TrunkSource(Protocol):
    """Hands out tensors of the trunk. Does not modify itself; may be asked from several threads."""

    def tensors(self, part: PartName, layer: int) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a part by their names in the whole model; the dtype may be another than wanted."""
        ...


def part_keys(first_layer: int, last_layer: int, num_layers: int) -> list[PartKey]:
    """Return the parts that a range of decoder layers (both included) of a model of `num_layers` needs.

    >>> part_keys(2, 3, 4)
    [('layer', 2), ('layer', 3), ('head', 3)]
    """
    keys: list[PartKey] = [("embedding", 0)] if first_layer == 0 else []
    keys += [("layer", layer) for layer in range(first_layer, last_layer + 1)]
    return keys + ([("head", last_layer)] if last_layer == num_layers - 1 else [])


def part_of(name: str, num_layers: int) -> PartKey:
    """Return which part a parameter of the whole model belongs to."""
    if match := _LAYER.match(name):
        return "layer", int(match[1])
    return ("embedding", 0) if name == EMBEDDING else ("head", num_layers - 1)


class CheckpointSource:
    """The trunk of a checkpoint directory. Where the head is the embedding again, the head has it too."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        num_layers = checkpoint.model_spec.num_decoder_layers
        parts: dict[PartKey, dict[str, TensorEntry]] = defaultdict(dict)
        for stored, entry in checkpoint.tensors.items():
            if not is_expert(stored):
                name = stored.replace(_MIXTRAL, ".mlp.")
                parts[part_of(name, num_layers)][name] = entry
        head = parts["head", num_layers - 1]
        if HEAD not in head and checkpoint.config.get("tie_word_embeddings") and EMBEDDING in checkpoint.tensors:
            head[HEAD] = checkpoint.tensors[EMBEDDING]
        self._parts = dict(parts)

    def tensors(self, part: PartName, layer: int) -> Mapping[str, torch.Tensor]:
        """Read a part's tensors, of no other."""
        return {name: read_tensor(entry) for name, entry in self._parts.get((part, layer), {}).items()}


class RecordSource:
    """The trunk from its records, as `prepare_store` makes them; a lazy mapping reads only what is asked for."""

    def __init__(self, records: Mapping[PartKey, bytes]) -> None:
        self._records = records

    def tensors(self, part: PartName, layer: int) -> Mapping[str, torch.Tensor]:
        """Unpack a part's record; raises `InvalidStore` where it is missing or none."""
        try:
            return unpack(self._records[part, layer])
        except KeyError as error:
            raise InvalidStore(f"trunk: there is no record of {part} {layer}; prepare the store again") from error
        except ValueError as error:
            raise InvalidStore(f"trunk: the record of {part} {layer} is damaged: {error}") from error
