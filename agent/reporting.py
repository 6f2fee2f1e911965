"""What an agent tells the coordinator about itself: who it is, how far it is, what it served and what its store has.

Decides how counters and holdings become messages. Changes nothing; must not know when a message is sent.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from agent.computing import Computing
from agent.holdings import Holdings
from agent.offer import Traffic
from agent.preparing import Preparation
from agent.quality import QualityBudget
from agent.serving import Work
from agent.settings import Settings
from runtime.counters import LAYER_FIGURES, Counters, Counts, TierCounts
from runtime.routing import EpochBoard
from runtime.slots import Residency
from schemas import messages as msg
from schemas.activation import NodeCounts
from schemas.model import ModelSpec
from schemas.precision import Precision
from schemas.store import StoreRecord, TrunkPart

_RATE_S: Final = 5.0


@dataclass(frozen=True)
class Identity:
    """What a hello says and what does not change while the process runs."""

    settings: Settings
    incarnation: str
    model: ModelSpec
    endpoints: msg.Endpoints
    precisions: tuple[Precision, ...]


class Reporter:
    """Makes the agent's messages to the coordinator. Belongs to the thread that sends them."""

    def __init__(
        self,
        identity: Identity,
        *,
        computing: Computing,
        holdings: Holdings,
        counters: Counters,
        work: Work,
        board: EpochBoard,
        traffic: Traffic,
        quality: QualityBudget,
    ) -> None:
        self._identity = identity
        self.node = identity.settings.node
        self.incarnation = identity.incarnation
        self._computing = computing
        self._holdings = holdings
        self._counters = counters
        self._work = work
        self._board = board
        self._traffic = traffic
        self._quality = quality
        self._rate = _Rate()

    def hello(self, cluster: str, standing: msg.Standing) -> msg.Hello:
        """Return the introduction; `cluster` is the one that the journal belongs to."""
        identity = self._identity
        return msg.Hello(
            node=self.node,
            incarnation=self.incarnation,
            cluster=cluster,
            model=identity.model,
            dtype=identity.settings.dtype,
            endpoints=identity.endpoints,
            memory=self._computing.memory,
            has_store=self._holdings.store is not None,
            standing=standing,
            precisions=identity.precisions,
        )

    def goodbye(self) -> msg.Goodbye:
        """Return the last message."""
        return msg.Goodbye(node=self.node, incarnation=self.incarnation)

    def heartbeat(
        self, standing: msg.Standing, now: float, *, used: msg.TierBytes, preparation: Preparation | None, peers: int
    ) -> msg.Heartbeat:
        """Return a heartbeat; `preparation` is that of the pending epoch, if there is one."""
        counts = self._counters.snapshot()
        held = {tier: len(keys) for tier, keys in self._holdings.residency.held().items()}
        begun, ended = self._work.begun, self._work.ended
        return msg.Heartbeat(
            node=self.node,
            incarnation=self.incarnation,
            progress=counts.steps + ended,
            in_flight=max(0, begun - ended) + self._board.running_before(sys.maxsize),
            standing=standing,
            held=msg.TierCounts(**held),
            used=used,
            served=msg.Served(
                tokens=self._traffic.entered,
                device_rows=counts.tier_rows.get("device", 0),
                host_rows=counts.tier_rows.get("host", 0),
                disk_rows=counts.tier_rows.get("disk", 0),
                remote_rows=counts.remote_rows,
                substituted_rows=counts.replaced_rows,
                quality=self._quality.use(counts),
                calls=counts.remote_calls,
                call_wait_s=counts.wait_s,
                calls_served=ended,
                events=counts.events,
                remote_events=counts.remote_events,
                steps=counts.steps,
                step_tokens=counts.tokens,
                hops=self._traffic.hops,
                tokens_per_s=self._rate.update(now, self._traffic.entered),
                cache=_cache_use(self._holdings.residency),
                precision=self._computing.precision,
                low_rows=counts.low_rows,
            ),
            moved=preparation.moved if preparation else 0,
            to_move=preparation.to_move if preparation else 0,
            is_loading=preparation.is_loading if preparation else False,
            peers=peers,
            device=self._computing.device,
            device_note=self._computing.fault,
        )

    def catalogue(self) -> msg.Catalogue | None:
        """Return what the store has; None without a store."""
        store = self._holdings.store
        if store is None:
            return None
        manifest = store.manifest
        trunk = tuple(TrunkPart(part=p.part, layer=p.layer, sha256=p.sha256, bytes=p.bytes) for p in manifest.trunk)
        packed = tuple(msg.PackedCatalogue(layout=p.layout, records=_named(p.records)) for p in manifest.packed)
        return msg.Catalogue(
            node=self.node,
            model=manifest.model,
            layout=manifest.layout,
            records=_named(manifest.records),
            trunk=trunk,
            packed=packed,
        )

    def counts(self) -> msg.Counts:
        """Return the routing counted since the start."""
        counts = self._counters.snapshot()
        routed = tuple(tuple(int(count) for count in layer) for layer in counts.routed)
        return msg.Counts(
            counts=NodeCounts(node=self.node, tokens=counts.tokens, counts=routed),
            layers=_layers(self.node, counts, self._holdings.residency.counts),
        )


def _named(records: Iterable[StoreRecord]) -> tuple[msg.Record, ...]:
    return tuple(msg.Record(layer=r.layer, expert=r.expert, sha256=r.sha256, bytes=r.bytes) for r in records)


def _cache_use(residency: Residency) -> msg.CacheUse | None:
    """Return what the cache did; None while every expert has a place of its own."""
    counts = residency.counts
    if not residency.is_caching and not any(counts.loads) and not any(counts.brought):
        return None
    return msg.CacheUse(
        found=sum(map(sum, counts.found.values())),
        loads=sum(counts.loads),
        load_bytes=sum(counts.load_bytes),
        waited_s=sum(counts.waited_s),
        prefetched=sum(counts.prefetched),
        prefetch_hits=sum(counts.prefetch_hits),
        brought=sum(counts.brought),
        brought_bytes=sum(counts.brought_bytes),
        guest_hits=sum(counts.guest_hits),
    )


def _layers(node: str, counts: Counts, found: TierCounts) -> msg.NodeLayers:
    """Return what was counted layer by layer."""
    loaded = list(zip(found.loads, found.load_bytes, found.waited_s, strict=True)) or [(0, 0, 0.0)] * len(counts.layers)
    layers = []
    for figures, (loads, load_bytes, load_wait_s) in zip(counts.layers, loaded, strict=True):
        by_name = dict(zip(LAYER_FIGURES, figures.tolist(), strict=True))
        seconds = {name: max(0.0, by_name.pop(name)) for name in ("local_s", "wait_s")}
        rows = {name: round(value) for name, value in by_name.items()}
        layers.append(msg.LayerUse(**rows, **seconds, loads=loads, load_bytes=load_bytes, load_wait_s=load_wait_s))
    return msg.NodeLayers(node=node, tokens=counts.tokens, trunk_s=max(0.0, counts.trunk_s), layers=tuple(layers))


class _Rate:
    """Tokens per second over the last seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def update(self, now: float, tokens: int) -> float:
        """Take the count in and return the rate."""
        self._seen.append((now, tokens))
        while now - self._seen[0][0] > _RATE_S:
            self._seen.pop(0)
        (since, before) = self._seen[0]
        return (tokens - before) / (now - since) if now > since else 0.0
