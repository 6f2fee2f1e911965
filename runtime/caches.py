"""KV caches: one session's, written in place, what a step sees of it, and those of several sessions as one.

Decides how rows of different lengths lie in one tensor (each from the start, zeros behind) and what each row may attend
to: all that its own cache returns, which for one new token of a sliding window is the window itself. A step of several
tokens may run while the step before it still does: in each layer it waits until that one's keys and values are there.
Axes: B sessions, H heads, S longest cache. Must not know layers' arithmetic.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from runtime.passage import Passage, Rest


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
            seen, count = self._seen, key_states.shape[2]
            self._all_keys.narrow(2, seen, count).copy_(key_states)
            self._all_values.narrow(2, seen, count).copy_(value_states)
            self._seen = seen = seen + count
            self.keys, self.values = self._all_keys.narrow(2, 0, seen), self._all_values.narrow(2, 0, seen)
            return self.keys, self.values

        @property
        def memory(self) -> tuple[torch.Tensor, torch.Tensor]:
            """All keys and values there will be, [H, S, d] each, for who writes them without `update`."""
            return self._all_keys[0], self._all_values[0]

        def written(self, count: int) -> None:
            """Take in tokens whose states were written into `memory` behind the last."""
            self._seen += count
            self.keys, self.values = self._all_keys[:, :, : self._seen], self._all_values[:, :, : self._seen]

    return ReservedLayer, DynamicLayer


@dataclass(frozen=True)
class Between:
    """Where a step stands among those of its session.

    Attributes
    ----------
    start
        Tokens before it.
    before, mine
        The step before it, and itself.
    """

    start: int
    before: Passage
    mine: Passage
    rest: Rest


def step_cache(session: Any, between: Between) -> Any:
    """Return what a step sees of its session's cache (of `session_cache`): exactly the tokens before it.

    Writes into the session's cache, layer by layer behind the step before. Masks are made as if that were over.
    """
    from transformers.cache_utils import Cache

    kind = _following_layer()
    return Cache(layers=[kind(layer, index, between) for index, layer in enumerate(session.layers)])


@cache
def _following_layer() -> Any:
    """Return the cache layer of a step; transformers is imported when needed."""
    from transformers.cache_utils import CacheLayerMixin

    class FollowingLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
        """One layer of a session's cache as a step sees it."""

        def __init__(self, layer: Any, index: int, between: Between) -> None:
            super().__init__()
            self.is_sliding = layer.is_sliding
            self._layer, self._index, self._between = layer, index, between

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            """Do nothing: the session's own layer does it."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Append new states [1, H, T, d] when the step before has; return all up to them."""
            between = self._between
            between.before.await_layer(self._index, between.rest)
            states: tuple[torch.Tensor, torch.Tensor] = self._layer.update(key_states, value_states)
            between.mine.wrote(self._index)
            return states

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Return length and offset of what `update` will return."""
            if not self.is_sliding:
                return self._between.start + query_length, 0
            then = copy.copy(self._layer)  # the formula of a window is the library's
            then.cumulative_length = self._between.start
            sizes: tuple[int, int] = then.get_mask_sizes(query_length)
            return sizes

        def get_seq_length(self) -> int:
            """Return the tokens before this step."""
            return self._between.start

        def get_max_length(self) -> int:
            """Return what the session's layer says."""
            most: int = self._layer.get_max_length()
            return most

    return FollowingLayer


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
