"""The shape of a mixture-of-experts model, as far as placing it needs: counts and bytes, no weights.

Must not know how a checkpoint is laid out (see `checkpoint`) nor what runs it.
"""

from collections.abc import Collection
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.base import FrozenModel
from schemas.units import Bytes

DTYPE_ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

HeldDtype = Literal["checkpoint", "float32", "float16", "bfloat16"]


class ModelSpec(FrozenModel):
    """Counts and sizes of one model. A layer here is a layer *with experts*; `decoder_layers` counts all.

    Attributes
    ----------
    layers, experts, top_k
        L layers with routed experts, E experts in each, K of them chosen per token.
    hidden_size, itemsize
        D and the bytes of one activation element: a hidden state on the wire has ``D * itemsize`` bytes.
    expert_bytes
        Bytes of one expert's weights.
    trunk_layer_bytes, embedding_bytes
        Bytes of one decoder layer without its routed experts, and of embedding, final norm and head together.
    input_bytes, head_bytes
        What of the latter the first and the last decoder layer's node need: the embedding; final norm and head. Tied
        weights count in both. None: not known, all of it.
    kv_bytes_per_token_layer
        KV cache bytes of one token in one decoder layer.
    moe_layers
        Decoder layer index of each layer with experts, ascending; None means 0 … L-1.
    """

    id: Annotated[str, Field(min_length=1, max_length=200)]
    layers: Annotated[int, Field(ge=1, le=4096)]
    experts: Annotated[int, Field(ge=1, le=32767)]
    top_k: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 20)]
    itemsize: Annotated[int, Field(ge=1, le=8)]
    expert_bytes: Annotated[Bytes, Field(gt=0)]
    trunk_layer_bytes: Bytes = 0
    embedding_bytes: Bytes = 0
    kv_bytes_per_token_layer: Bytes = 0
    decoder_layers: Annotated[int, Field(ge=1, le=8192)] | None = None
    moe_layers: tuple[int, ...] | None = None
    input_bytes: Bytes | None = None
    head_bytes: Bytes | None = None

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is above the number of experts {self.experts}")
        if self.num_decoder_layers < self.layers:
            raise ValueError(f"decoder_layers {self.num_decoder_layers} is below layers {self.layers}")
        indices = self.moe_layer_indices
        if len(indices) != self.layers or sorted(set(indices)) != list(indices):
            raise ValueError(f"moe_layers must list {self.layers} ascending decoder layers, got {indices}")
        if indices[0] < 0 or indices[-1] >= self.num_decoder_layers:
            raise ValueError(f"moe_layers {indices} leave the range 0 … {self.num_decoder_layers - 1}")
        return self

    @property
    def num_decoder_layers(self) -> int:
        """All decoder layers, with experts or dense."""
        return self.layers if self.decoder_layers is None else self.decoder_layers

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        """Decoder layer index of layer 0 … L-1."""
        return tuple(range(self.layers)) if self.moe_layers is None else self.moe_layers

    @property
    def trunk_bytes(self) -> int:
        """Bytes of everything that is not a routed expert."""
        return self.trunk_layer_bytes * self.num_decoder_layers + self.embedding_bytes

    def range_bytes(self, decoder_layers: Collection[int]) -> int:
        """Bytes of the trunk of some decoder layers: the embedding beside the first, the head beside the last."""
        starts, ends = 0 in decoder_layers, self.num_decoder_layers - 1 in decoder_layers
        outside = self.embedding_bytes if starts and ends else 0
        if starts != ends:
            known = self.input_bytes if starts else self.head_bytes
            outside = self.embedding_bytes if known is None else known
        return self.trunk_layer_bytes * len(decoder_layers) + outside

    @property
    def total_expert_bytes(self) -> int:
        """Bytes of one replica of every expert."""
        return self.layers * self.experts * self.expert_bytes

    def kv_bytes(self, *, tokens: int, sessions: int) -> int:
        """KV cache bytes of `sessions` sequences of `tokens` tokens through all decoder layers."""
        return self.kv_bytes_per_token_layer * self.num_decoder_layers * tokens * sessions

    def held_as(self, dtype: HeldDtype) -> "ModelSpec":
        """Return the same model with weights, KV cache and activations held in `dtype`."""
        if dtype == "checkpoint" or DTYPE_ITEMSIZE[dtype] == self.itemsize:
            return self
        want, have = DTYPE_ITEMSIZE[dtype], self.itemsize
        sizes = ("expert_bytes", "trunk_layer_bytes", "embedding_bytes", "kv_bytes_per_token_layer")
        known = [name for name in ("input_bytes", "head_bytes") if getattr(self, name) is not None]
        scaled = {name: -(-getattr(self, name) * want // have) for name in (*sizes, *known)}
        return self.model_copy(update={**scaled, "itemsize": want})
