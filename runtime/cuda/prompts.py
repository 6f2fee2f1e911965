"""Some tokens of one session at once, a prompt or a piece of one, through the layers of a trunk on a device.

Decides for which steps that is possible, and what the host does meanwhile: nothing where every expert has a slot, so
that nothing waits for it; else it reads what each layer has chosen, begins the layer's loads and those of what the next
layer will probably choose, and has experts computed together as they come (`lacking`). Flow: embedding → norms,
attention, routers, experts → hidden states. Must not know sessions or epochs.
Axes: T tokens, L layers, E experts, K top-k, R = T K rows, D hidden, F ffn, S tokens in the cache, d of a head.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from runtime.cuda import prompt_reference
from runtime.cuda.decode import CapturedDecode
from runtime.cuda.lacking import Choice, LackingExperts
from runtime.cuda.parts import LayerParts, StepParts, lanes_of
from runtime.cuda.sending import reading, sent
from runtime.cuda.shapes import Lanes
from runtime.dispatch import Dispatcher
from runtime.policy.crowds import Crowds

Experts = Callable[[int, Choice], torch.Tensor]
"""(layer of the range, choice) -> [T, D]."""


def device_prompts(captured: CapturedDecode | None) -> "DevicePrompts | None":
    """Return what runs prompts where tokens are decoded as captured steps; None elsewhere."""
    if captured is None:
        return None
    from runtime.cuda import prompt_kernels

    return DevicePrompts(captured, prompt_kernels)


class DevicePrompts:
    """Runs prompts with the layers and experts that `captured` decodes with. Thread-safe.

    Parameters
    ----------
    ops
        `runtime.cuda.prompt_kernels` on a device; `runtime.cuda.prompt_reference` computes the same anywhere.
    """

    def __init__(self, captured: CapturedDecode, ops: Any = prompt_reference) -> None:
        self._captured = captured
        self._parts: StepParts = captured.parts
        self._residency = captured.residency
        self._lanes: Lanes = lanes_of(captured.inside.pool, captured.parts)
        self._ops = ops
        self._crowds = Crowds(captured.parts.trunk.spec.layers, captured.parts.router.experts)

    def can_run(self, dispatcher: Dispatcher) -> bool:
        """Whether a step is one for this: exact, its experts all here, and in slots or with slots to come to."""
        is_exact = dispatcher.combine == "partial" and dispatcher.substitution is None
        if not is_exact or not dispatcher.routing.is_local:
            return False
        shelf = self._captured.inside.shelf
        is_apart = "host" not in shelf.computed_in and self._residency.caching is not None
        return self._captured.table.is_whole or (is_apart and shelf.can_cache)

    def run(self, dispatcher: Dispatcher, inputs: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        """Run a step that `can_run` behind the `start` tokens in a session's cache, which is modified.

        Parameters
        ----------
        inputs
            Token ids [T] where the range begins with them, else hidden states [T, D].

        Returns
        -------
        torch.Tensor
            [T, D], normalised where the range ends at the last layer.

        Raises
        ------
        ExpertUnavailable, ExpertLost
            As `Residency.lend`.
        """
        if self._captured.table.is_whole:
            with self._captured.alone() as is_whole:
                if is_whole:
                    return self._run_whole(dispatcher, inputs, start, cache)
        experts = LackingExperts(
            self._residency, self._parts, self._lanes, dispatcher, crowds=self._crowds, ops=self._ops
        )
        with experts.closing():
            return self._layers(inputs, start, cache, experts.run, with_guesses=experts.looks_ahead)

    def _run_whole(self, dispatcher: Dispatcher, inputs: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        """Run a step whose experts all have slots, which nobody gives up meanwhile."""
        parts, ops, lanes, table = self._parts, self._ops, self._lanes, self._captured.table
        device = parts.trunk.device
        slots = sent(table.slots, device)
        ends = torch.empty(slots.shape, dtype=torch.int32, device=device)
        read: list[Callable[[], NDArray[np.int32]]] = []

        def experts(index: int, choice: Choice) -> torch.Tensor:
            order = ops.arrange(choice.experts, ends[index])
            if index == len(slots) - 1:
                read.append(reading(ends))
            active = choice.normed.new_empty((len(order), lanes.ffn))
            answers = choice.normed.new_empty((len(order), lanes.hidden))
            ops.gate_up(choice.normed, order, ends[index], slots[index], lanes, active)
            ops.down(active, order, ends[index], slots[index], lanes, answers)
            beside = choice.beside(ops, parts.layers[index])
            combined: torch.Tensor = ops.combine(answers, choice.weights, beside)
            return combined

        hidden = self._layers(inputs, start, cache, experts, with_guesses=False)
        if (copies := self._captured.inside.loader.copies) is not None:
            copies.fences.read_all()
        self._count(dispatcher, read[0](), len(inputs))
        return hidden

    def _count(self, dispatcher: Dispatcher, ends: NDArray[np.int32], tokens: int) -> None:
        """Count a step by where the rows of each layer's experts ended, [L, E]. Modifies."""
        counts = dispatcher.counts
        for index, sizes in enumerate(np.diff(ends, axis=1, prepend=0)):
            number = self._parts.first_layer + index
            rows = counts.count_sizes(number, sizes, tokens=tokens)
            counts.local_calls += 1
            counts.tier_rows["device"] = counts.tier_rows.get("device", 0) + rows
            counts.end_layer(number)
            if self._residency.caching is not None:
                self._residency.counts.found["device"][number] += int(np.count_nonzero(sizes))

    def _layers(
        self, inputs: torch.Tensor, start: int, cache: Any, experts: Experts, *, with_guesses: bool
    ) -> torch.Tensor:
        """Run the layers, [T, D]."""
        parts, ops, trunk = self._parts, self._ops, self._parts.trunk
        inner, count = trunk.model.model, len(inputs)
        total = functional.embedding(inputs, inner.embed_tokens.weight) if trunk.has_embedding else inputs
        positions = torch.arange(start, start + count, device=total.device)[None]
        cos, sin = inner.rotary_emb(total[None], position_ids=positions)
        mask = causal_mask(start, count, total.device)
        delta = None
        for index, layer in enumerate(parts.layers):
            normed, total = ops.add_norm(total, delta, *layer.first_norm)
            heads = ops.turn(functional.linear(normed, layer.qkv, layer.qkv_bias), cos, sin, layer.norms, layer.heads)
            attended = functional.linear(_attend(layer, heads, cache.layers[index], mask), layer.output)
            normed, total = ops.add_norm(total, attended, *layer.second_norm)
            delta = experts(index, self._choice(index, normed, with_guesses=with_guesses))
        if not trunk.has_head:
            return total if delta is None else total + delta
        final: torch.Tensor = ops.add_norm(total, delta, inner.norm.weight, inner.norm.variance_epsilon)[0]
        return final

    def _choice(self, index: int, normed: torch.Tensor, *, with_guesses: bool) -> Choice:
        layer, shape = self._parts.layers[index], self._parts.router
        is_watched = with_guesses and index + 1 < len(self._parts.layers)
        routers = layer.routers[: shape.experts * (1 + is_watched)]
        return Choice(normed, self._ops.choose(functional.linear(normed, routers), shape))


def causal_mask(start: int, count: int, device: torch.device) -> torch.Tensor | None:
    """Return which of start + count tokens each of the last `count` attends to, [T, S]; None where that is torch's own.

    >>> causal_mask(1, 2, torch.device("cpu")).tolist()
    [[True, True, False], [True, True, True]]
    """
    if start == 0:
        return None
    return torch.ones((count, start + count), dtype=torch.bool, device=device).tril(start)


def _attend(layer: LayerParts, heads: torch.Tensor, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Append keys and values among heads [T, H + 2 G, d] to a layer's cache, and attend to all: [T, H d]."""
    shape = layer.heads
    queries, keys, values = heads.transpose(0, 1)[None].split([shape.queries, shape.kv, shape.kv], dim=1)
    keys, values = cache.update(keys, values)
    group = shape.queries // shape.kv
    if mask is not None and group > 1:  # torch's quick ways with a mask know no groups
        keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
        group = 1
    found = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=shape.scaling, enable_gqa=group > 1
    )
    return found.transpose(1, 2).reshape(len(heads), -1)
