"""The operations of one decode step, in order: embedding, layers, final norm, on tensors that stay where they are.

Decides nothing while it runs: no value is read by the host, so that the whole step can be captured as one graph. Where
a layer lacks experts the device waits in it (`ops.wait`). Must not know who brings them, or which family a model is of
(`parts`). Axes: B tokens, D hidden, F ffn, K top-k.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from runtime.cuda.buffers import Buffers
from runtime.cuda.parts import StepParts
from runtime.cuda.shapes import Lanes
from runtime.cuda.supply import Service
from runtime.errors import RuntimeFault


class Answer(NamedTuple):
    """Hidden states [B, D], normalised at the end of the model; logits [B, V] and best tokens [B] int64 there.

    Where the best tokens are all that is asked for, the others are those of whatever step is run last.
    """

    hidden: torch.Tensor
    logits: torch.Tensor | None = None
    best: torch.Tensor | None = None

    def tokens(self) -> torch.Tensor:
        """Return the best tokens."""
        if self.best is None:
            raise RuntimeFault("layers without the model's head choose no tokens")
        return self.best

    def own(self, *, wants_logits: bool) -> "Answer":
        """Return it in memory of its own, as far as somebody may ask for it."""
        if self.logits is None or self.best is None:
            return Answer(self.hidden.clone())
        return self._replace(logits=self.logits.clone() if wants_logits else self.logits, best=self.best.clone())


class Step:
    """The operations of a step of B tokens over fixed buffers.

    Parameters
    ----------
    ops
        `runtime.cuda.kernels`, or `runtime.cuda.reference`.

    Attributes
    ----------
    inputs
        What goes in: tokens [B] int64, or hidden states [B, D] where the range does not begin with tokens. A step of a
        whole model leaves the best tokens behind each here.
    """

    def __init__(self, parts: StepParts, lanes: Lanes, buffers: Buffers, ops: Any) -> None:
        self._parts = parts
        self._lanes = lanes
        self._buffers = buffers
        self._ops = ops
        rows, device = buffers.slots.shape[1], buffers.control.device
        is_first = parts.trunk.has_embedding
        size, dtype = ((rows,), torch.int64) if is_first else ((rows, lanes.hidden), parts.trunk.dtype)
        self.inputs = torch.zeros(size, dtype=dtype, device=device)
        self._active = torch.zeros((*buffers.slots.shape[1:], lanes.ffn), dtype=parts.trunk.dtype, device=device)

    def run(self, kv: Any, *, service: Service, lacking: Callable[[int], None] | None = None) -> "Answer":
        """Run the step.

        Parameters
        ----------
        service
            Who brings what layers lack.
        lacking
            Called in each layer when it has chosen, where the host runs the operations itself.
        """
        ops, trunk = self._ops, self._parts.trunk
        inner = trunk.model.model
        total = functional.embedding(self.inputs, inner.embed_tokens.weight) if trunk.has_embedding else self.inputs
        cos, sin = ops.angles(inner.rotary_emb, kv.positions, total.dtype)
        delta = None
        for index, layer in enumerate(self._parts.layers):
            qkv, _, total = ops.normed_product(total, delta, layer.first_norm, layer.qkv, layer.qkv_bias)
            queries = ops.rotate_store(qkv, cos, sin, layer.norms, layer.heads, kv, index)
            attended = ops.product(ops.attend(queries, layer.heads, kv, index), layer.output)
            logits, normed, total = ops.normed_product(total, attended, layer.second_norm, layer.routers)
            delta = self._experts(index, normed, logits, service, lacking)
        if service == "device":
            ops.join_all(self._buffers)
        if not trunk.has_head:
            return Answer(total if delta is None else total + delta)
        normed, _ = ops.add_norm(total, delta, inner.norm.weight, inner.norm.variance_epsilon)
        logits = functional.linear(normed, trunk.model.lm_head.weight, trunk.model.lm_head.bias)
        best = logits.argmax(-1)
        if trunk.has_embedding:
            self.inputs.copy_(best)
        return Answer(normed, logits, best)

    def _experts(
        self,
        index: int,
        normed: torch.Tensor,
        logits: torch.Tensor,
        service: Service,
        lacking: Callable[[int], None] | None,
    ) -> torch.Tensor:
        ops, buffers, active = self._ops, self._buffers, self._active
        ops.route(logits, self._parts.router, buffers, index, is_told=service != "device" or lacking is not None)
        if lacking is not None:
            lacking(index)
        brought = None
        if service == "device":
            brought = ops.bring(buffers, index)
            if index + 1 < len(self._parts.layers):
                ops.bring_ahead(buffers, index)
        ops.gate_up(normed, self._lanes, buffers, index, active, late=False)
        shared = self._parts.layers[index].shared
        beside = None if shared is None else ops.shared(normed, logits[:, -1:], shared)
        if service == "device":
            ops.join(brought)
        elif service == "host":
            ops.wait(buffers, index)
        if service != "none":
            ops.gate_up(normed, self._lanes, buffers, index, active, late=True)
        answer: torch.Tensor = ops.down(active, self._lanes, buffers, index, beside)
        return answer
