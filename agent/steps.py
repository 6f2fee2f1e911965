"""Steps of sessions as frames and as tensors, how they run, and who a connection's identity says it is.

Decides what a tensor from another node must be before a model sees it: frames were checked by `schemas.sessions`, here
dtype and token ids are held against the trunk. Must not know sockets or sessions.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch

from agent.sessions import Batch, Objection, Sender
from agent.waiting import Port
from runtime.engine import Keep, Segment
from runtime.loading import Trunk
from runtime.tensors import dtype_name, torch_dtype
from schemas.sessions import STEP_HEADER_BYTES, StepHeader, pack_step

_SEPARATOR: Final = "/"  # no node's id has one


def sender_name(sender: Sender) -> bytes:
    """Return the identity of a node's connections to other nodes' session plane."""
    return f"{sender.node}{_SEPARATOR}{sender.incarnation}".encode()


@lru_cache(maxsize=1024)
def parse_sender(identity: bytes) -> Sender:
    """Return who an identity says it is; a sender without a name where it says nothing."""
    node, _, incarnation = identity.decode(errors="replace").partition(_SEPARATOR)
    return Sender(node, incarnation) if incarnation else Sender("", identity.hex())


def ids_of(tokens: Sequence[int]) -> torch.Tensor:
    """Return token ids [T] int64."""
    return torch.tensor(tokens, dtype=torch.int64)


def frame_of(header: StepHeader, payload: torch.Tensor) -> bytes:
    """Return a step's frame; ids [T] travel as int32, hidden states [T, D] as they are."""
    if header.kind != "hidden":
        return pack_step(header, payload.to(torch.int32).numpy().data)
    return pack_step(header, payload.cpu().contiguous().view(torch.uint8).numpy().data)


def incoming(header: StepHeader, frame: memoryview) -> torch.Tensor:
    """Return the tensor of a checked step: ids [T] int64, or hidden states [T, D].

    They are copied, since where bytes lie in a frame decides in which order a sum over them is made.
    """
    if header.kind != "hidden":
        return torch.frombuffer(frame, dtype=torch.int32, offset=STEP_HEADER_BYTES).to(torch.int64)
    flat = torch.frombuffer(frame, dtype=torch_dtype(header.dtype), offset=STEP_HEADER_BYTES)
    return flat.view(header.count, header.hidden_size).clone()


def require_fit(header: StepHeader, payload: torch.Tensor, trunk: Trunk) -> None:
    """Raise `Objection` for what the trunk cannot take."""
    if header.kind == "hidden":
        if payload.dtype != trunk.dtype:
            ours = dtype_name(trunk.dtype)
            raise Objection("refused", f"hidden states as {header.dtype}, this node computes in {ours}")
        return
    size, ids = trunk.model.model.embed_tokens.num_embeddings, payload.numpy()
    if ids.min() < 0 or ids.max() >= size:
        raise Objection("refused", f"token ids beyond the {size} of the model's vocabulary")


def compute(segment: Segment, batch: Batch, port: Port) -> torch.Tensor:
    """Run a batch: [B, D] or [B, V] for one token of each of B sessions, [T, D] or [1, V] for T tokens of one."""
    entries, steps, device = batch.entries, batch.steps, segment.trunk.device
    if len(entries) > 1:
        inputs = torch.cat([step.payload for step in steps]).to(device)
        return segment.step_batch([entry.name for entry in entries], inputs, caller=port).cpu()
    entry, step = entries[0], steps[0]
    is_sampled = step.position + step.count >= entry.opened.prompt_tokens
    keep: Keep = "last" if is_sampled else "none"
    inputs, combine = step.payload.to(device), entry.opened.combine
    return segment.step(entry.name, inputs, caller=port, combine=combine, keep=keep, rest=port.rest).cpu()
