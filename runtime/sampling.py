"""How a prompt is cut into steps and a token chosen from logits: nothing that depends on where the layers run.

Decides that the choice is drawn from (seed, position) alone, so that a session that is run again from its tokens, on
other nodes or with other sessions beside it, goes on with the same tokens. Must not know sessions.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from runtime.errors import InvalidInput

PREFILL_CHUNK: Final = 256
"""Tokens of a prompt that run in one step.

Few enough that the nodes of a path work at the same time, enough that an expert is worth reading and a call to other
nodes worth its round trip: of 512 tokens of tinymoe-base, chunks of 64 cost 2.3 times the compute of one step with all,
128 1.5 times, 256 1.1 times.
"""

DEVICE_CHUNK: Final = 2048
"""The same where all layers run on one device, which nobody works beside: as many as memory for their rows allows.

Each piece reads the weights of nearly all experts once more. Of 2048 tokens of Qwen3-30B-A3B's shape the answers of one
layer's experts take 64 MiB.
"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn among the most likely `top_p` of mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InvalidInput(f"temperature {self.temperature} is outside 0 … 100; 0 is greedy, 1 the model's own")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p {self.top_p} is outside 0 … 1; 1 leaves every token in")
        if self.seed < 0:
            raise InvalidInput(f"seed {self.seed} is negative; any number from 0 will do")


def sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Choose the token that will stand at `position` (counted from 0, prompt included) from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1).cpu()
    ranked, tokens = probabilities.sort(descending=True, stable=True)
    mass = ranked.cumsum(0)
    kept = int((mass - ranked < sampling.top_p).sum())  # the first is always kept
    drawn = np.random.default_rng((sampling.seed, position)).random() * float(mass[kept - 1])
    return int(tokens[min(int(torch.searchsorted(mass[:kept], drawn, right=True)), kept - 1)])


def chunk_of(device: torch.device) -> int:
    """Return how many tokens of a prompt run in one step where all layers run on one device."""
    return PREFILL_CHUNK if device.type == "cpu" else DEVICE_CHUNK


def prefill_chunks(count: int, most: int = PREFILL_CHUNK) -> tuple[slice, ...]:
    """Return the steps in which a prompt of `count` tokens runs, of `most` tokens each.

    With `PREFILL_CHUNK`, they are the same on one node and on many.

    >>> prefill_chunks(300)
    (slice(0, 256, None), slice(256, 300, None))
    """
    return tuple(slice(start, min(start + most, count)) for start in range(0, count, most))
