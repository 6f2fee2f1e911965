"""Replaying recorded routing against a cache: any eviction and routing policy on any trace, without a model.

Decides what is counted. Flow: trace file → `Recording` (batches of one layer each, in the order in which they ran) →
`Cache` and policies → `Replayed`. Must not know torch: it runs on a laptop with nothing but the trace.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from runtime.errors import InvalidInput
from runtime.policy.cache import Cache
from runtime.policy.eviction import Belady, Eviction, Floats, Ints
from runtime.policy.routing import ROUTINGS, Buddies, Exact, Routing, buddies_of
from runtime.route_csv import read_route_table, route_shape
from schemas.activation import read_trace_header


class Batch(NamedTuple):
    """Tokens that went through one layer together: candidates and scores ``[T, C]``, best first."""

    layer: int
    ids: Ints
    scores: Floats
    is_decode: bool


@dataclass(frozen=True, eq=False)
class Recording:
    """Recorded routing in the order in which layers ran.

    Attributes
    ----------
    expert_bytes
        Bytes of one expert of each layer, float64 ``[L]``; None where the file does not say.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    batches: tuple[Batch, ...]
    expert_bytes: Floats | None = None

    @cached_property
    def decode_tokens(self) -> int:
        """Tokens that are counted; prefill only warms the cache."""
        return sum(len(batch.ids) for batch in self.batches if batch.is_decode and batch.layer == 0)

    @property
    def num_experts(self) -> int:
        """L * E."""
        return self.layers * self.experts

    @property
    def has_candidates(self) -> bool:
        """Whether more experts were recorded than were chosen."""
        return any(batch.ids.shape[1] > self.top_k for batch in self.batches)

    @cached_property
    def uses(self) -> Ints:
        """Keys that the router chose, event by event, int64 ``[T * L, K]``."""
        return np.concatenate(
            [batch.layer * self.experts + batch.ids[:, : self.top_k] for batch in self.batches], axis=0
        )


def read_recording(path: Path) -> Recording:
    """Read a trace file, or a ``*.route.csv`` with its prefill; raises `InvalidInput` or `InvalidFile`."""
    return _from_csv(path) if path.suffix == ".csv" else _from_trace(path)


def _from_trace(path: Path) -> Recording:
    """Every token of a trace is taken as decoded by itself, which is how a cache meets it while an answer is made."""
    header = read_trace_header(path)
    arrays = load_file(path)
    ids, scores = arrays["expert_ids"].astype(np.int64), arrays["scores"].astype(np.float64)
    if ids.size and (ids.min() < 0 or ids.max() >= header.experts):
        raise InvalidInput(f"{path}: expert ids leave 0 … {header.experts - 1}")
    batches = tuple(
        Batch(layer, ids[token, layer][None], scores[token, layer][None], True)
        for token in range(header.tokens)
        for layer in range(header.layers)
    )
    return Recording(path.name, header.layers, header.experts, header.top_k, batches)


def _from_csv(path: Path) -> Recording:
    """Rows are taken as they lie, which is how the layers ran: prefill layer by layer, decode token by token."""
    header, table = read_route_table(path)
    _, layers, experts, top_k = route_shape(path, header)
    if table.min() < 0 or table[:, 3].max() >= layers or table[:, 5].max() >= experts or len(table) % top_k:
        raise InvalidInput(f"{path}: a row leaves {layers} layers × {experts} experts, top-{top_k}")
    events = table.reshape(-1, top_k, table.shape[1])
    if (events[:, :, 4] != np.arange(top_k)).any() or (events[:, :, :4] != events[:, :1, :4]).any():
        raise InvalidInput(f"{path}: rows do not list {top_k} experts, slot by slot, for every token and layer")
    turn, phase, step, layer = events[:, 0, :4].astype(np.int64).T.tolist()
    kinds = [(t, p, s if p else -1, n) for t, p, s, n in zip(turn, phase, step, layer, strict=True)]
    batches = []
    for (_, decode, _, layer_idx), group in groupby(range(len(events)), key=kinds.__getitem__):
        picked = list(group)
        batches.append(Batch(layer_idx, events[picked, :, 5].astype(np.int64), events[picked, :, 6], decode > 0))
    return Recording(path.name, layers, experts, top_k, tuple(batches), _layer_bytes(path, layers))


def _layer_bytes(path: Path, layers: int) -> Floats | None:
    """Bytes of an expert by layer, from header comments such as ``# layer=3 expert_bytes=4336640``."""
    found = {
        int(match[1]): float(match[2])
        for match in re.finditer(r"^# layer=(\d+) expert_bytes=(\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    return np.array([found[layer] for layer in range(layers)]) if found.keys() >= set(range(layers)) else None


@dataclass(frozen=True)
class Replayed:
    """What a cache and its policies would have done. Only decoded tokens are counted.

    Attributes
    ----------
    requests, hits, loads
        Experts asked for, found, and brought in.
    loads_per_token, bytes_per_token
        None for bytes where an expert's size is not known.
    waits
        Share of (token, layer) events that had to load anything.
    lost_mass
        Share of the router's top-K mass given up, mean over events.
    belady_hit_rate
        Of the best possible eviction under exact routing.
    """

    slots: int
    eviction: str
    routing: str
    tokens: int
    requests: int
    hits: int
    loads: int
    waits: float
    lost_mass: float
    bytes_per_token: float | None = None
    belady_hit_rate: float | None = None

    @property
    def hit_rate(self) -> float:
        """Hits per request."""
        return self.hits / max(self.requests, 1)

    @property
    def loads_per_token(self) -> float:
        """Experts brought in per decoded token."""
        return self.loads / max(self.tokens, 1)


def replay(
    recording: Recording,
    slots: int,
    eviction: Eviction,
    routing: Routing | None = None,
    *,
    names: tuple[str, str] = ("", "exact"),
    per_layer: bool = False,
) -> Replayed:
    """Run a recording through a cache.

    Parameters
    ----------
    slots
        Experts that fit, over all layers or per layer.
    names
        Of eviction and routing, for the record.

    Raises
    ------
    CacheTooSmall
        A token's experts of one layer do not fit together.
    """
    cache = Cache(recording.layers, recording.experts, slots, eviction, per_layer=per_layer)
    rule, top_k = routing or Exact(), recording.top_k
    requests = hits = loads = events = waits = 0
    lost = num_bytes = 0.0
    for batch in recording.batches:
        eviction.observe(batch.layer, batch.ids, batch.scores, top_k)
        for ids, scores in zip(batch.ids, batch.scores, strict=True):
            choice = rule.choose(batch.layer, ids, scores, cache.resident_of(batch.layer), top_k)
            access = cache.request(batch.layer, choice.experts)
            if not batch.is_decode:
                continue
            events += 1
            requests += len(choice.experts)
            hits += len(access.hits)
            loads += len(access.loads)
            waits += len(access.loads) > 0
            lost += choice.lost
            if recording.expert_bytes is not None:
                num_bytes += len(access.loads) * float(recording.expert_bytes[batch.layer])
    tokens = recording.decode_tokens
    return Replayed(
        slots=slots,
        eviction=names[0],
        routing=names[1],
        tokens=tokens,
        requests=requests,
        hits=hits,
        loads=loads,
        waits=waits / max(events, 1),
        lost_mass=lost / max(events, 1),
        bytes_per_token=None if recording.expert_bytes is None else num_bytes / max(tokens, 1),
    )


def routing_of(recording: Recording, name: str, number: float) -> Routing:
    """Make a routing policy by name; ``buddy`` learns its table from the recording itself."""
    if name != "buddy":
        return ROUTINGS[name](number)
    per_layer = [[b.ids for b in recording.batches if b.layer == layer] for layer in range(recording.layers)]
    tokens = min(sum(len(ids) for ids in each) for each in per_layer)
    ids = np.stack([np.concatenate(each)[:tokens] for each in per_layer], axis=1)
    return Buddies(buddies_of(ids, recording.experts, recording.top_k), undecided=1 - number)


def belady(recording: Recording, slots: int, *, per_layer: bool = False) -> Replayed:
    """Replay with the eviction that knows the future, exact routing."""
    best = Belady(recording.uses, recording.num_experts)
    return replay(recording, slots, best, names=("belady", "exact"), per_layer=per_layer)
