"""The layers that this node runs, and the path of the tokens that enter here: loaded, offered, let go.

Decides what is loaded beside what is there, from which source, and when a range may go: not before the answers that
only this node makes have ended, where the plan gives tokens that enter here no other path. A preparation loads, the
node's own thread does everything else, any thread reads. Must not know epochs' order, nor how records get here.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

from agent.budget import MemoryBudget
from agent.generation import Ingress
from agent.offer import Offer
from agent.plane import SessionPlane
from agent.ring import Way
from agent.sessions import Range
from agent.settings import Settings
from runtime.engine import Segment
from runtime.importance import Importance
from runtime.loading import TensorPool, Trunk, load_tokenizer, load_trunk
from runtime.models import Model
from runtime.trunk import PartKey, RecordSource, part_keys
from schemas.messages import Assignment

log = logging.getLogger(__name__)

NO_PLAN: Final = "no plan is active; apply one with planner apply PLAN"


class Layers:
    """Segments by their layers, with what they may take, and what is known of tokens that enter here.

    Parameters
    ----------
    device
        Where trunks are loaded to.
    make_segment
        Makes a segment that runs a loaded trunk.

    Attributes
    ----------
    ingress
        What is needed to take prompts, once a plan wants it.
    way
        The path in force for tokens that enter here.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        budget: MemoryBudget,
        *,
        device: str = "cpu",
        make_segment: Callable[[Trunk], Segment],
        plane: SessionPlane,
    ) -> None:
        self.ingress: Ingress | None = None
        self.way = Way(0, None, NO_PLAN)
        self._settings = settings
        self._model = model
        self._budget = budget
        self._device = device
        self._make_segment = make_segment
        self._plane = plane
        self._segments: Mapping[Range, Segment] = {}  # replaced whole
        self._pool = TensorPool()
        self._importance: Importance | None = None
        self._lock = threading.Lock()

    def missing_parts(self, assignments: Iterable[Assignment]) -> Collection[PartKey]:
        """Return the trunk's parts that must come as records: neither the model's directory nor a range has them."""
        if self._model.source is not None:
            return ()
        return self._parts(self._budget.ranges(assignments)) - self._parts(self._segments)

    def _parts(self, ranges: Collection[Range]) -> frozenset[PartKey]:
        layers = self._model.spec.num_decoder_layers
        return frozenset(key for first, last in ranges for key in part_keys(first, last, layers))

    def move(self, device: str) -> None:
        """Let go of every range, since its device is gone; what is loaded from now on comes to another. Modifies."""
        with self._lock:
            self._device, self._pool, self._segments = device, TensorPool(), {}
        self._offer(None)

    def load(self, assignments: Collection[Assignment], records: Mapping[PartKey, bytes]) -> None:
        """Load the ranges that are not here, from `records` if there are any, and the tokenizer where tokens enter."""
        wanted = self._budget.ranges(assignments)
        with self._lock:
            device, pool = self._device, self._pool
        for first, last in sorted(wanted.keys() - self._segments.keys()):
            trunk = load_trunk(
                Path(self._settings.model),
                dtype=self._settings.dtype,
                first_layer=first,
                last_layer=last,
                source=RecordSource(records) if records else None,
                pool=pool,
                device=device,
            )
            segment = self._make_segment(trunk)
            with self._lock:
                if device != self._device:
                    return  # lost meanwhile; whoever moved everything has it loaded again
                segment.importance = self._importance
                self._segments = {**self._segments, (first, last): segment}
        for key, kv_bytes in wanted.items():
            self._segments[key].sessions.kv_budget = kv_bytes
        if self.ingress is None and any(assignment.ingress for assignment in assignments):
            self.ingress = Ingress(load_tokenizer(self._model.config_dir), self._settings.context.tokens)

    def activate(self, assignment: Assignment) -> None:
        """Let tokens that enter here take the assignment's path, and others' sessions its layers."""
        node = self._settings.node
        path = next((path for path in self._budget.paths(assignment) if path.ingress == node), None)
        why_not = f"{node} takes no tokens in under this plan; ask an ingress of the topology"
        self.way = Way(assignment.epoch, path, "" if path else why_not)
        self._offer(assignment)

    def spend(self, importance: Importance | None) -> None:
        """Let decode steps of all layers here give up what `importance` allows; nothing if None. Modifies."""
        with self._lock:
            self._importance = importance
            for segment in self._segments.values():
                segment.importance = importance

    def release(self, assignments: Iterable[Assignment], active: Assignment | None) -> None:
        """Give back what none of these assignments gives, but for layers of answers that only this node makes."""
        wanted = self._budget.ranges(assignments)
        for key in wanted.keys() & self._segments.keys():
            self._segments[key].sessions.kv_budget = wanted[key]
        if self._segments.keys() <= wanted.keys():
            return
        leaving = self._plane.ranges_of_own() if self.way.path is None else frozenset()
        with self._lock:
            kept = {key: segment for key, segment in self._segments.items() if key in wanted or key in leaving}
            is_less = len(kept) < len(self._segments)
            self._segments = kept
        if is_less:
            log.info("layers that no plan gives are released")
            self._offer(active)

    def _offer(self, active: Assignment | None) -> None:
        current = frozenset(self._budget.ranges((active,) if active else ()))
        self._plane.run_now(Offer(self.way.epoch, self._segments, current))

    def used_bytes(self, assignments: Iterable[Assignment]) -> int:
        """Return what the trunk of loaded layers and the KV caches of all who may enter through them take."""
        loaded = self._segments
        layers = {layer for first, last in loaded for layer in range(first, last + 1)}
        reserved = sum(segment.sessions.kv_budget or 0 for segment in loaded.values())
        planned = self._budget.path_memory(assignments).kv_bytes  # once for layers that a session changes between
        return self._model.spec.range_bytes(layers) + (min(reserved, planned) if planned else reserved)
