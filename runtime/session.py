"""One sequence in a segment: its KV cache, and which tokens of it have been let in.

Decides in which order steps follow each other: that in which they were let in. Must not know layers.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.caches import Between
from runtime.errors import ContextFull
from runtime.passage import Passage, Rest, passed


@dataclass
class Session:
    """One sequence: its KV cache, how many tokens it has seen, and how many steps have begun with."""

    name: str
    cache: Any
    positions: torch.Tensor  # [1, max_tokens] int64
    max_tokens: int
    kv_bytes: int
    seen: int = 0
    begun: int = 0
    newest: Passage = field(default_factory=passed)

    def require(self, count: int) -> None:
        """Raise `ContextFull` if `count` more tokens exceed the reservation."""
        wanted = self.begun + count
        if wanted > self.max_tokens:
            raise ContextFull(wanted=wanted, limit=self.max_tokens, what="the session's reservation")

    def begin(self, count: int, mine: Passage, rest: Rest) -> Between:
        """Let a step of `count` tokens in behind the newest; whoever asks holds the segment's lock. Modifies."""
        between = Between(self.begun, self.newest, mine, rest)
        self.begun += count
        self.newest = mine
        return between
