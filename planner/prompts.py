"""What prompts cost: their time counts for the tokens of the answers that follow them.

Decides what a chunk of a prompt asks of each node, and from that an estimate of the time to the first token: chunks
follow each other through the nodes of a path, and go on computing while others wait for experts, so that the first
chunk meets every hop and every wait, and each further one takes what the busiest node or link needs for it. A chunk
calls every node that serves one of its tokens; each expert is asked for as often as the workload does on average. Loads
from disk are left out. Must not know solvers: they place and route for tokens of answers; prompts are counted in what a
plan costs, and so in the choice between paths and placements.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.cost import Paths, call_fixed_seconds, hop_bytes, hop_fixed_seconds
from schemas.model import ModelSpec
from schemas.topology import TIERS, Compute, Topology

CHUNK: Final = 256  # tokens of a prompt that agents compute in one step

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of each ingress, and what their tokens cost. Axes: I ingresses, N nodes, 3 tiers.

    Attributes
    ----------
    tokens, answer_tokens
        Of a prompt, and of the answer that its time is shared out over, int64 ``[I]``; 0: no prompts.
    layer_s, expert_s
        Seconds of compute for one token in one decoder layer without its experts, float64 ``[N]``, and for one token
        at one expert, float64 ``[N, 3]``.
    call_s, hop_s
        Seconds of a call and of a hop whatever their bytes, 0 to oneself, float64 ``[N, N]``.
    byte_s
        Seconds of one byte one way, float64 ``[N, N]``.
    state_bytes
        Of the hidden state of one token.
    """

    tokens: Ints
    answer_tokens: Ints
    layer_s: Floats
    expert_s: Floats
    call_s: Floats
    hop_s: Floats
    byte_s: Floats
    state_bytes: int

    def chunks(self, ingress: int) -> list[int]:
        """Tokens of each chunk of a prompt."""
        left = int(self.tokens[ingress])
        return [min(CHUNK, left - start) for start in range(0, left, CHUNK)]


def find_prompts(topology: Topology, model: ModelSpec, paths: Paths) -> Prompts | None:
    """Read what a topology says of prompts; None where it has none."""
    entering = [node.ingress for node in topology.nodes if node.ingress]
    if not any(ingress.prompt_tokens for ingress in entering):
        return None
    return Prompts(
        tokens=np.array([ingress.prompt_tokens for ingress in entering], dtype=np.int64),
        answer_tokens=np.array([ingress.answer_tokens for ingress in entering], dtype=np.int64),
        layer_s=np.array([_layer_us(node.compute) for node in topology.nodes]) * 1e-6,
        expert_s=np.array([_expert_us(node.compute) for node in topology.nodes]).reshape(-1, len(TIERS)) * 1e-6,
        call_s=call_fixed_seconds(topology, paths),
        hop_s=hop_fixed_seconds(topology, paths),
        byte_s=1 / paths.bandwidth,
        state_bytes=hop_bytes(model),
    )


def _layer_us(compute: Compute) -> float:
    return compute.trunk_layer_us if compute.prompt_layer_us is None else compute.prompt_layer_us


def _expert_us(compute: Compute) -> tuple[float, float, float]:
    """µs by tier; memory that is slower is as much slower for a prompt as for a token of an answer."""
    device = compute.expert_us if compute.prompt_expert_us is None else compute.prompt_expert_us
    host = device * compute.host_us / compute.expert_us
    return device, host, host
