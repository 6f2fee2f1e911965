"""The parts of a residency, made and connected: its books, slots, and what fills, lends and places copies.

Decides how many slots each tier has, and from which tiers experts are computed. Must not know who asks for experts.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from runtime.caching import Caching
from runtime.copies import MEMORY
from runtime.counters import TierCounts
from runtime.guests import Guests
from runtime.launches import Launches
from runtime.learning import Learner
from runtime.lending import Lender
from runtime.loads import Loader, device_copies
from runtime.placing import Placer
from runtime.pool import SlotPool
from runtime.reads import Reads
from runtime.shelf import Shelf
from runtime.ways import LocalWays
from schemas.precision import PackedLayout
from schemas.store import RecordLayout
from schemas.topology import Tier


class Parts(NamedTuple):
    """What a residency is made of. `changed` is the lock of all of them; `counts` are only kept with a cache."""

    counts: TierCounts
    changed: threading.Condition
    pools: Mapping[Tier, SlotPool]
    shelf: Shelf
    learner: Learner | None
    ways: LocalWays
    loader: Loader
    lender: Lender
    placer: Placer
    guests: Guests


def furnish(
    layout: RecordLayout,
    budgets: dict[Tier, int],
    *,
    device: torch.device,
    packed: PackedLayout | None,
    most: int,
    caching: Caching | None,
    is_apart: bool,
    record_dir: Path | None,
    reads: Reads,
) -> Parts:
    """Return the parts of a residency; arguments are `Residency`'s.

    Parameters
    ----------
    budgets
        Of every tier; shared with the residency, which is told of changes.
    most
        Slots of a tier.
    """
    counts = TierCounts(caching.layers if caching else 0)
    changed = threading.Condition(threading.Lock())
    in_memory = layout.bytes if packed is None else packed.bytes
    sizes: dict[Tier, int] = {"device": in_memory, "host": in_memory, "disk": layout.bytes}
    slots = {tier: min(budgets[tier] // sizes[tier], most) for tier in MEMORY}
    pools = {tier: SlotPool(layout, count, tier, device, packed=packed) for tier, count in slots.items()}
    computed_in: tuple[Tier, ...] = ("device",) if is_apart else MEMORY
    eviction = caching.policy() if caching is not None else None
    shelf = Shelf(
        sizes,
        budgets,
        slots,
        cached_in=() if caching is None else computed_in,
        computed_in=computed_in,
        eviction=eviction,
        is_cost_aware=caching is not None and caching.eviction == "cost-aware",
        experts=caching.experts if caching else 0,
        counts=counts,
        notify=changed.notify_all,
        give_back=lambda tier, slot: pools[tier].give_back(slot),
    )
    kept = counts if caching else None
    ways = LocalWays(shelf, may_compute=is_apart and (caching is None or caching.in_place))
    copies = device_copies(device, layout, packed) if is_apart and slots["device"] else None
    loader = Loader(layout, shelf, pools, changed, counts=kept, device=device, packed=packed, copies=copies)
    launches = Launches(shelf, changed, pools, copies, kept) if copies is not None else None
    lender = Lender(
        shelf,
        loader,
        changed,
        counts=kept,
        is_ahead=caching is not None and caching.prefetch,
        workers=caching.workers if caching else 0,
        ways=ways,
        launches=launches,
    )
    placer = Placer(layout, shelf, pools, changed, packed=packed, record_dir=record_dir, reads=reads, launches=launches)
    learner = Learner(eviction, shelf, changed) if eviction is not None else None
    return Parts(counts, changed, pools, shelf, learner, ways, loader, lender, placer, Guests(shelf, loader, changed))
