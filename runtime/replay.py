"""Replaying recorded routing against a cache: any eviction, routing and prefetch policy on any trace, without a model.

Decides what is counted. Flow: trace file → `Recording` (batches of one layer each, in the order in which they ran) →
`Cache` and policies → `Replayed`. Must not know torch: it runs on a laptop with nothing but the trace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.policy.cache import Access, Cache
from runtime.policy.cost_aware import CostAware
from runtime.policy.eviction import EVICTIONS, Belady, Eviction, Floats, Ints
from runtime.policy.guessing import Predictor, best
from runtime.policy.routing import ROUTINGS, Buddies, Choice, Exact, Routing, buddies_of
from runtime.recording import Batch, Recording, read_recording

__all__ = ["Batch", "Recording", "Replayed", "belady", "read_recording", "replay"]


@dataclass
class Guessed:
    """Guesses of what the next layer asks for, and what was loaded for them. Modified while it is counted.

    Attributes
    ----------
    made, right, wanted
        Guesses, those among what the router chose, and what it chose.
    loads, used
        Experts that were brought in ahead, and those of them that their layer asked for.
    loaded_bytes, wasted_bytes
        Of all that was brought in ahead, and of what nobody asked for.
    """

    made: int = 0
    right: int = 0
    wanted: int = 0
    loads: int = 0
    used: int = 0
    loaded_bytes: float = 0.0
    wasted_bytes: float = 0.0

    @property
    def precision(self) -> float:
        """Share of the guesses that came true."""
        return self.right / max(self.made, 1)

    @property
    def recall(self) -> float:
        """Share of what was chosen that was guessed."""
        return self.right / max(self.wanted, 1)


@dataclass(frozen=True)
class Replayed:
    """What a cache and its policies would have done. Only decoded tokens are counted.

    Attributes
    ----------
    slots
        Experts that fit; of the largest, where the capacity is in bytes.
    prefetch, guessed
        What guessed the next layer's experts, and how that went; none if nothing did.
    requests, hits, loads
        Experts asked for, found, and brought in when they were asked for.
    loads_per_token, bytes_per_token
        None for bytes where an expert's size is not known. What was brought in ahead is counted too.
    reload_s
        Time that loads took when they were asked for, seconds per token; None where nothing says how long they take.
    waits
        Share of (token, layer) events that had to load anything.
    lost_mass
        Share of the router's top-K mass given up, mean over events.
    belady_hit_rate
        Of the best possible eviction under exact routing, without prefetch; where capacity is in bytes and experts
        differ in them, of the same rule, which is then no bound.
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
    reload_s: float | None = None
    belady_hit_rate: float | None = None
    prefetch: str = "none"
    guessed: Guessed | None = None

    @property
    def hit_rate(self) -> float:
        """Hits per request."""
        return self.hits / max(self.requests, 1)

    @property
    def loads_per_token(self) -> float:
        """Experts brought in per decoded token."""
        ahead = self.guessed.loads if self.guessed is not None else 0
        return (self.loads + ahead) / max(self.tokens, 1)


Guess = Callable[[Batch], Ints]
"""Returns the experts that the next layer will probably ask for, best first, of a batch that has run."""


class LookAhead:
    """Loads what the next layer will probably ask for while a layer runs.

    Parameters
    ----------
    guess
        Called for every batch in order.
    room
        Loads that fit into the time of a layer; more are not begun.
    """

    def __init__(self, guess: Guess, room: int) -> None:
        self._guess = guess
        self._room = room
        self._guesses: Ints | None = None
        self._brought: Ints = np.empty(0, dtype=np.int64)
        self.counts = Guessed()

    def look(self, batch: Batch, cache: Cache, layers: int, used: Ints, *, is_counted: bool) -> None:
        """Guess, and bring in what is missing, unless it is only to be learnt from. Modifies."""
        guesses = self._guess(batch)
        after = batch.layer + 1
        self._guesses = guesses if is_counted and after < layers and len(guesses) else None
        if self._guesses is not None:
            missing = guesses[~cache.resident_of(after)[guesses]][: self._room]
            self._brought = cache.bring(after, missing, batch.layer, used)

    def settle(self, batch: Batch, used: Ints, top_k: int, experts: int, num_bytes: float) -> None:
        """Count what became of the guesses for the layer that runs now. Modifies."""
        if self._guesses is None:
            return
        counts, chosen = self.counts, np.unique(batch.ids[:, :top_k])
        counts.made += len(self._guesses)
        counts.right += int(np.isin(self._guesses, chosen).sum())
        counts.wanted += len(chosen)
        came_true = int(np.isin(self._brought - batch.layer * experts, used).sum())
        counts.loads += len(self._brought)
        counts.used += came_true
        counts.loaded_bytes += len(self._brought) * num_bytes
        counts.wasted_bytes += (len(self._brought) - came_true) * num_bytes
        self._guesses = None


def predicted(predictor: Predictor, layers: int, top_k: int, count: int) -> Guess:
    """Return the guesses of a predictor, which sees what the router chose: `count` for each token."""

    def guess(batch: Batch) -> Ints:
        predictor.observe(batch.layer, batch.ids[:, :top_k])
        after = batch.layer + 1
        return best(predictor.scores(after), count) if after < layers and batch.is_decode else _NOTHING

    return guess


def recorded(batch: Batch) -> Ints:
    """Return the guesses of the next layer's gate that were recorded."""
    return _NOTHING if batch.guesses is None else np.array(list(dict.fromkeys(batch.guesses.T.ravel().tolist())))


_NOTHING = np.empty(0, dtype=np.int64)


@dataclass
class _Tally:
    """What is counted of a replay, all of it modified by `add`."""

    layer_bytes: Floats
    reload_s: Floats
    events: int = 0
    requests: int = 0
    hits: int = 0
    loads: int = 0
    waits: int = 0
    lost: float = 0.0
    num_bytes: float = 0.0
    seconds: float = 0.0

    def add(self, layer: int, choice: Choice, access: Access) -> None:
        """Count one token in one layer."""
        self.events += 1
        self.requests += len(choice.experts)
        self.hits += len(access.hits)
        self.loads += len(access.loads)
        self.waits += len(access.loads) > 0
        self.lost += choice.lost
        self.num_bytes += len(access.loads) * float(self.layer_bytes[layer])
        self.seconds += float(self.reload_s[access.loads].sum())


@dataclass(frozen=True, eq=False)
class Situation:
    """What a replay is run against.

    Attributes
    ----------
    slots
        Experts that fit, over all layers or per layer; with `in_bytes`, the bytes that they may take.
    first
        The first decoded token that is counted, and for which anything is loaded ahead.
    reload_s
        What bringing each expert back takes, float64 ``[L * E]``; None where nothing says.
    """

    slots: int
    per_layer: bool = False
    in_bytes: bool = False
    first: int = 0
    reload_s: Floats | None = None


def replay(
    recording: Recording,
    slots: int | Situation,
    eviction: Eviction,
    routing: Routing | None = None,
    *,
    names: tuple[str, str, str] = ("", "exact", "none"),
    ahead: LookAhead | None = None,
) -> Replayed:
    """Run a recording through a cache.

    Parameters
    ----------
    slots
        Experts that fit over all layers; or all that there is to say of the cache.
    names
        Of eviction, routing and prefetch, for the record.
    ahead
        Loads ahead; nothing does if None.

    Raises
    ------
    CacheTooSmall
        A token's experts of one layer do not fit together.
    """
    given = slots if isinstance(slots, Situation) else Situation(slots)
    sizes = recording.key_bytes if given.in_bytes else None
    cache = Cache(recording.layers, recording.experts, given.slots, eviction, per_layer=given.per_layer, sizes=sizes)
    layer_bytes = np.zeros(recording.layers) if recording.expert_bytes is None else recording.expert_bytes
    seconds = np.zeros(recording.num_experts) if given.reload_s is None else given.reload_s
    rule, tally, decoded = routing or Exact(), _Tally(layer_bytes, seconds), 0
    for batch in recording.batches:
        eviction.observe(batch.layer, batch.ids, batch.scores, recording.top_k)
        decoded += len(batch.ids) * (batch.is_decode and batch.layer == 0)
        is_counted = batch.is_decode and decoded > given.first
        used = []
        for ids, scores in zip(batch.ids, batch.scores, strict=True):
            choice = rule.choose(batch.layer, ids, scores, cache.resident_of(batch.layer), recording.top_k)
            access = cache.request(batch.layer, choice.experts)
            used.append(choice.experts)
            if is_counted:
                tally.add(batch.layer, choice, access)
        if ahead is not None:
            experts = np.unique(np.concatenate(used))
            ahead.settle(batch, experts, recording.top_k, recording.experts, float(layer_bytes[batch.layer]))
            ahead.look(batch, cache, recording.layers, experts, is_counted=is_counted)
    return _replayed(recording, given, tally, names, ahead)


def _replayed(
    recording: Recording, given: Situation, tally: _Tally, names: tuple[str, str, str], ahead: LookAhead | None
) -> Replayed:
    tokens = recording.decode_tokens - given.first
    guessed = ahead.counts if ahead is not None else None
    num_bytes = tally.num_bytes + (guessed.loaded_bytes if guessed is not None else 0.0)
    largest = float(recording.expert_bytes.max()) if recording.expert_bytes is not None else 1.0
    return Replayed(
        slots=int(given.slots // largest) if given.in_bytes else given.slots,
        eviction=names[0],
        routing=names[1],
        prefetch=names[2],
        tokens=tokens,
        requests=tally.requests,
        hits=tally.hits,
        loads=tally.loads,
        waits=tally.waits / max(tally.events, 1),
        lost_mass=tally.lost / max(tally.events, 1),
        bytes_per_token=None if recording.expert_bytes is None else num_bytes / max(tokens, 1),
        reload_s=None if given.reload_s is None else tally.seconds / max(tokens, 1),
        guessed=guessed,
    )


def eviction_of(recording: Recording, name: str, given: Situation) -> Eviction:
    """Make an eviction policy by name; one that is aware of costs is told them."""
    policy = EVICTIONS[name](recording.layers, recording.experts)
    if isinstance(policy, CostAware):
        num_bytes = recording.key_bytes if given.in_bytes else None
        if given.reload_s is not None:
            policy.price(given.reload_s, 1.0 if num_bytes is None else num_bytes)
    return policy


def drawn_reload_s(num_keys: int, shares: Sequence[tuple[float, float]]) -> Floats:
    """Return what bringing each expert back takes, float64 ``[L * E]``, of shares of them and seconds.

    Which experts have which is drawn, always the same way.
    """
    ends = np.cumsum([share for share, _ in shares]) * num_keys
    places = np.random.default_rng(0).permutation(num_keys)
    which = np.searchsorted(ends, places + 0.5).clip(max=len(shares) - 1)
    return np.asarray(np.array([seconds for _, seconds in shares])[which], dtype=np.float64)


def routing_of(recording: Recording, name: str, number: float) -> Routing:
    """Make a routing policy by name; ``buddy`` learns its table from the recording itself."""
    if name != "buddy":
        return ROUTINGS[name](number)
    per_layer = [[b.ids for b in recording.batches if b.layer == layer] for layer in range(recording.layers)]
    tokens = min(sum(len(ids) for ids in each) for each in per_layer)
    ids = np.stack([np.concatenate(each)[:tokens] for each in per_layer], axis=1)
    return Buddies(buddies_of(ids, recording.experts, recording.top_k), undecided=1 - number)


def belady(recording: Recording, slots: int | Situation) -> Replayed:
    """Replay with the eviction that knows the future, exact routing."""
    best_policy = Belady(recording.uses, recording.num_experts)
    return replay(recording, slots, best_policy, names=("belady", "exact", "none"))
