"""One token of each of some sessions through the layers of a trunk: what the model's own forward does, and no more.

Decides what the layers of such a step share: positions, caches, masks where a layer's own attention needs them. Which
layers are lean is `runtime.leaning`'s. Must not know sessions, epochs or experts. Flow: tokens → embedding → layers →
norm.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Final

import torch

from runtime.caches import BatchCache, decode_mask
from runtime.lean import Beat, Dispatch, See
from runtime.leaning import ModuleAttention, ModuleLayer, angles, lean_layers, module_options
from runtime.skeleton import LayerDispatch

_BLOCK: Final = 256  # positions
_STATIC: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embeddings whose angles depend on nothing but the position."""


class Decoder:
    """Decodes with the layers of a loaded model. Thread-safe.

    Parameters
    ----------
    model
        Cut to its range, without embedding or head where the range has none.
    dtype
        Of the hidden states.
    dispatch
        What the model's `RoutedExperts` call; a step sets it.

    Attributes
    ----------
    layers
        Lean where that gives the module's bits.
    windows
        The sliding window of each layer, None where it attends to everything.
    """

    def __init__(self, model: Any, dtype: torch.dtype, dispatch: ContextVar[LayerDispatch]) -> None:
        self._inner = model.model
        self._embedding: torch.Tensor | None = getattr(model.model.embed_tokens, "weight", None)
        self.layers = lean_layers(model, dtype, dispatch)
        self.windows = windows_of(model.config)
        self._uses_sdpa = model.config._attn_implementation == "sdpa"
        self._dtype = dtype
        self._device = next(model.parameters()).device
        is_own = [
            isinstance(layer, ModuleLayer) or isinstance(getattr(layer, "attention", None), ModuleAttention)
            for layer in self.layers
        ]
        self._has_own_attention = any(is_own)
        self._angles = Angles(model.model.rotary_emb, dtype, self._device)

    @property
    def needs_no_mask(self) -> bool:
        """Whether a single token's attention is what its cache returns.

        torch's own attention takes another way where there is a mask, so that what a model masks stays masked.
        """
        return not self._uses_sdpa or not any(self.windows)

    def run(
        self, inputs: torch.Tensor, caches: Sequence[Any], seen: Sequence[int], dispatch: Dispatch, see: See | None
    ) -> torch.Tensor:
        """Run one token of each of B sessions; modifies their caches.

        Parameters
        ----------
        inputs
            Token ids [B] int64 where the range starts at layer 0, else hidden states [B, D].
        caches, seen
            The sessions' caches, and how many tokens are in each.
        dispatch
            Runs a layer's routed experts.
        see
            Takes (router, logits) of every layer.

        Returns
        -------
        torch.Tensor
            [B, D], normalised where the range ends at the last layer.
        """
        hidden = inputs if self._embedding is None else torch.embedding(self._embedding, inputs)
        beat = self._beat(hidden, caches, seen, dispatch, see)
        for layer in self.layers:
            hidden = layer(hidden, beat)
        normed: torch.Tensor = self._inner.norm.forward(hidden)
        return normed

    def _beat(
        self, hidden: torch.Tensor, caches: Sequence[Any], seen: Sequence[int], dispatch: Dispatch, see: See | None
    ) -> Beat:
        if len(seen) == 1 and not self._has_own_attention:
            cosine, sine = self._angles.at(seen[0])
            return Beat(caches, cosine, sine, dispatch, see, {}, ())
        positions = torch.tensor(seen, device=self._device)[:, None]
        cache = caches[0] if len(caches) == 1 else BatchCache(caches)
        options = module_options(self._inner, hidden[:, None], positions, cache)
        masks = self._masks(seen) if self._has_own_attention else ()
        return Beat(caches, *angles(options["position_embeddings"]), dispatch, see, options, masks)

    def _masks(self, seen: Sequence[int]) -> list[torch.Tensor | None]:
        """Return what the layers' own attention masks, where sessions are of different lengths."""
        lengths = [count + 1 for count in seen]
        additive = None if self._uses_sdpa else self._dtype
        by_window = {
            window: decode_mask(lengths, window, additive=additive, device=self._device) for window in set(self.windows)
        }
        return [by_window[window] for window in self.windows]


class Angles:
    """A rotary embedding's cosines and signed sines by position, [1, d] each. Thread-safe."""

    def __init__(self, rotary: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._rotary = rotary
        self._like = torch.empty((1, 1, 1), dtype=dtype, device=device)
        self._is_static = getattr(rotary, "rope_type", None) in _STATIC
        self._blocks: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def at(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and signed sine of a position."""
        block, row = divmod(position, _BLOCK)
        found = self._blocks.get(block)
        if found is None:
            if not self._is_static:
                return self._of(torch.tensor([[position]], device=self._like.device))
            found = self._blocks[block] = self._block(block)
        return found[row]

    def _block(self, block: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the angles of a block of positions, each as it is alone."""
        positions = torch.arange(block * _BLOCK, (block + 1) * _BLOCK, device=self._like.device)
        together = list(zip(*(torch.split(each, 1) for each in self._of(positions[None])), strict=True))
        alone = [self._of(positions[None, row : row + 1]) for row in (1, _BLOCK - 1)]
        if all(map(torch.equal, (*together[1], *together[-1]), (*alone[0], *alone[1]))):
            return together
        return [self._of(position[None, None]) for position in positions]

    def _of(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosine, sine = angles(self._rotary(self._like, position_ids=positions))
        return cosine[0, 0], sine[0, 0]


def windows_of(config: Any) -> list[int | None]:
    """Return the sliding window of each layer, None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [None if kind == "full_attention" else window for kind in kinds]
