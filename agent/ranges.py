"""The layer ranges of the trunk that this node runs: loaded, shared where they overlap, and let go.

Decides what is loaded beside what is there. Must not know epochs, nor where the trunk's records come from.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from agent.sessions import Range
from runtime.engine import Segment
from runtime.loading import TensorPool, Trunk, load_trunk
from runtime.trunk import PartKey, RecordSource, part_keys
from schemas.model import HeldDtype


class Ranges:
    """Segments by their layers. One thread loads, another drops, any reads.

    Parameters
    ----------
    make_segment
        Makes a segment that runs a loaded trunk.
    """

    def __init__(self, model_dir: Path, dtype: HeldDtype, make_segment: Callable[[Trunk], Segment]) -> None:
        self.segments: Mapping[Range, Segment] = {}  # replaced whole
        self._model_dir = model_dir
        self._dtype = dtype
        self._make_segment = make_segment
        self._pool = TensorPool()
        self._lock = threading.Lock()

    @property
    def layers(self) -> frozenset[int]:
        """Decoder layers that are loaded."""
        return frozenset(layer for first, last in self.segments for layer in range(first, last + 1))

    def missing_parts(self, wanted: Collection[Range], num_layers: int) -> frozenset[PartKey]:
        """Return the parts of a trunk of `num_layers` that these ranges need and none has that is loaded."""

        def parts(ranges: Collection[Range]) -> set[PartKey]:
            return {key for first, last in ranges for key in part_keys(first, last, num_layers)}

        return frozenset(parts(wanted) - parts(self.segments.keys()))

    def load(self, wanted: Collection[Range], records: Mapping[PartKey, bytes]) -> None:
        """Load the ranges that are not here, from `records` where there are any, else from the model's directory."""
        for first, last in sorted(set(wanted) - self.segments.keys()):
            trunk = load_trunk(
                self._model_dir,
                dtype=self._dtype,
                first_layer=first,
                last_layer=last,
                source=RecordSource(records) if records else None,
                pool=self._pool,
            )
            with self._lock:
                self.segments = {**self.segments, (first, last): self._make_segment(trunk)}

    def keep(self, wanted: Collection[Range]) -> bool:
        """Let go of all other ranges; returns whether there were any. Their weights go with their last session."""
        with self._lock:
            gone = self.segments.keys() - set(wanted)
            if gone:
                self.segments = {key: segment for key, segment in self.segments.items() if key not in gone}
        return bool(gone)

    def allow(self, kv_bytes: Mapping[Range, int]) -> None:
        """Set what the KV caches of each range may take."""
        for key, segment in self.segments.items():
            segment.kv_budget = kv_bytes.get(key, segment.kv_budget)
