"""KV caches: one session's, written in place, and those of several sessions as the one cache of a batched forward.

Decides how rows of different lengths lie in one tensor (each from the start, zeros behind) and what each row may attend
to: all that its own cache returns, which for one new token of a sliding window is the window itself. Axes: B sessions,
H heads, S longest cache. Must not know layers' arithmetic.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch


def session_cache(config: Any, max_tokens: int) -> Any:
    """Return an empty cache of transformers' own kind for a session of at most `max_tokens`."""
    from transformers import DynamicCache

    made = DynamicCache(config=config)
    kind, full = _reserved_layer()
    made.layers = [kind(max_tokens) if type(layer) is full else layer for layer in made.layers]
    return made


@cache
def _reserved_layer() -> tuple[Any, type]:
    """Return the cache layer that writes in place, and the one it replaces; transformers is imported when needed."""
    from transformers.cache_utils import DynamicLayer

    class ReservedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed
        """Keys and values of one layer in memory for all tokens to come: a new token copies itself, not the others."""

        def __init__(self, max_tokens: int) -> None:
            super().__init__()
            self._max_tokens = max_tokens
            self._seen = 0

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self._all_keys, self._all_values = (
                states.new_empty((*states.shape[:2], self._max_tokens, states.shape[3]))
                for states in (key_states, value_states)
            )

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Append new states [1, H, T, d]; return all, [1, H, S, d]."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            seen, self._seen = self._seen, self._seen + key_states.shape[2]
            self._all_keys[:, :, seen : self._seen] = key_states
            self._all_values[:, :, seen : self._seen] = value_states
            self.keys, self.values = self._all_keys[:, :, : self._seen], self._all_values[:, :, : self._seen]
            return self.keys, self.values

    return ReservedLayer, DynamicLayer


class BatchCache:
    """Stands where a layer's attention expects a cache: takes one new token of each session. Modifies their caches."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self._caches = caches

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append row b of keys and values [B, H, 1, d] to session b's cache; return all of them, [B, H, S, d]."""
        rows = [
            cache.update(keys[row : row + 1], values[row : row + 1], layer) for row, cache in enumerate(self._caches)
        ]
        return _stack([row[0] for row in rows]), _stack([row[1] for row in rows])


def _stack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack rows [1, H, s, d] of different lengths into [B, H, S, d], zeros behind the shorter ones."""
    longest = max(row.shape[2] for row in rows)
    if all(row.shape[2] == longest for row in rows):
        return torch.cat(list(rows))
    first = rows[0]
    stacked = first.new_zeros((len(rows), first.shape[1], longest, first.shape[3]))
    for index, row in enumerate(rows):
        stacked[index, :, : row.shape[2]] = row[0]
    return stacked


def decode_mask(
    lengths: Sequence[int], window: int | None, *, additive: torch.dtype | None, device: torch.device | str = "cpu"
) -> torch.Tensor | None:
    """Return what rows whose sequences have these lengths (the new token included) attend to.

    Parameters
    ----------
    window
        The tokens that a sliding layer's cache returns at most.
    additive
        The dtype of a mask that is added to scores; a mask of booleans (True: attend) where None.

    Returns
    -------
    torch.Tensor or None
        [B, 1, 1, S]; None where every row attends to all of S.

    Examples
    --------
    >>> decode_mask([1, 3], 2, additive=None)[:, 0, 0].tolist()
    [[True, False], [True, True]]
    """
    held = [length if window is None else min(length, window) for length in lengths]
    if len(set(held)) == 1:
        return None
    is_held = torch.arange(max(held), device=device) < torch.tensor(held, device=device)[:, None]
    mask = is_held[:, None, None]
    if additive is None:
        return mask
    return torch.zeros(mask.shape, dtype=additive, device=device).masked_fill_(~mask, torch.finfo(additive).min)
