"""Residency under any order of puts, drops, loans, budgets and background loads: right weights, and never too many bytes."""

from contextlib import closing
from functools import cache

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.errors import BudgetTooSmall, OverBudget
from runtime.policy.eviction import EVICTIONS
from runtime.policy.prefetch import Slack
from runtime.precision import empty_parts, pack_record, packed_layout, unpack_parts
from runtime.records import RecordFile
from runtime.slots import Caching, Residency
from schemas.store import RECORDS_NAME
from tests.families import lasting_directory, make_checkpoint, make_store

LAYERS, EXPERTS, SLOTS = 2, 8, 6
keys = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
tiers = st.sampled_from(["device", "host"])


class EagerSlack(Slack):
    room = 2
    is_slow = True


@cache
def opened():
    root = lasting_directory()
    return make_store(make_checkpoint("olmoe", root / "model", layers=LAYERS), root / "store", precisions=("int4",))


def record(key):
    return opened().read(opened().by_key[key].sha256)


def source_of(key, precision=None):
    packed = opened().manifest.packed_as("int4")
    records = opened().manifest.records if precision is None else packed.records
    found = records[key[0] * EXPERTS + key[1]]
    return RecordFile(opened().path / RECORDS_NAME, found.sha256, found.offset)


@cache
def weights(key, precision):
    """The gate and up weights of an expert, as lent in a precision."""
    layout = opened().manifest.layout
    parts = empty_parts(layout)
    if precision == "checkpoint":
        record_parts = torch.frombuffer(bytearray(record(key)), dtype=torch.float32)
        return record_parts[: parts[0].numel()].view(parts[0].shape)
    packed = packed_layout(layout, precision)
    unpack_parts(torch.frombuffer(bytearray(pack_record(record(key), packed)), dtype=torch.uint8), packed, parts)
    return parts[0]


class ResidencyMachine(RuleBasedStateMachine):
    """Beside it, what was put where, and the budgets in force."""

    @initialize(
        eviction=st.sampled_from(sorted(EVICTIONS)),
        device=st.integers(0, SLOTS),
        host=st.integers(0, 2),
        precision=st.sampled_from([None, None, "int4"]),
        is_apart=st.booleans(),
    )
    def begin(self, eviction, device, host, precision, is_apart):
        self.precision = precision
        manifest = opened().manifest
        self.size = manifest.layout.bytes if precision is None else manifest.packed_as(precision).layout.bytes
        self.most = {"device": device, "host": host}
        budgets = {tier: count * self.size for tier, count in self.most.items()}
        self.held = Residency(
            manifest.layout,
            budgets,
            caching=Caching(LAYERS, EXPERTS, eviction=eviction, workers=2),
            precision=precision,
            is_apart=is_apart,
        )
        self.held.slack = EagerSlack()
        self.limit = dict(self.most)
        self.put_at, self.placed, self.sourced, self.loans = set(), set(), set(), []

    @rule(key=keys, tier=tiers, again=st.booleans())
    def put(self, key, tier, again):
        if any((lent, where.tier) not in self.put_at for _, lent, where in self.loans):
            return  # it would wait for a cached copy that only this thread can return
        try:
            self.held.put(key, tier, record(key), source=source_of(key) if again else None)
        except OverBudget:
            assert sum(where == tier for _, where in self.put_at) + self.lent_in(tier) >= self.limit[tier]
        else:
            if again and (key, tier) not in self.put_at:
                self.sourced.add(key)
            self.put_at.add((key, tier))

    @rule(key=keys)
    def place(self, key):
        self.held.place(key, source_of(key))
        self.placed.add(key)
        self.sourced.add(key)

    @rule(key=keys)
    def place_packed(self, key):
        if key in self.placed:
            self.held.place_packed(key, "int4", source_of(key, "int4"))

    @rule(key=keys, tier=st.sampled_from(["device", "host", None]))
    def drop(self, key, tier):
        self.held.drop(key, tier)
        self.put_at -= {(key, each) for each in (("device", "host") if tier is None else (tier,))}
        if tier is None:
            self.placed.discard(key)
        if not self.is_held(key):
            self.sourced.discard(key)

    @rule(tier=tiers, count=st.integers(0, SLOTS))
    def set_budget(self, tier, count):
        bound = sum(where == tier and key not in self.sourced for key, where in self.put_at)
        if bound > min(count, self.most[tier]):
            with pytest.raises(BudgetTooSmall):
                self.held.set_budget(tier, count * self.size)
        else:
            self.held.set_budget(tier, count * self.size)
            self.limit[tier] = min(count, self.most[tier])

    @rule(layer=st.integers(0, LAYERS - 1), data=st.data())
    def use(self, layer, data):
        here = sorted(expert for expert in range(EXPERTS) if self.is_held((layer, expert)))
        experts = data.draw(st.lists(st.sampled_from(here), unique=True)) if here else []
        low = data.draw(st.sets(st.sampled_from(here))) if here else ()
        seen = set()
        if not self.loans:
            with closing(self.held.lend(layer, experts, dict.fromkeys(low, "int4"))) as lending:
                for position, lent in lending:
                    seen.add(position)
                    key = (layer, experts[position])
                    self.check(key, lent)
                    if lent.precision == "checkpoint" and experts[position] in low:
                        assert self.held.precision_of(key) == "checkpoint" or not self.held.low_precisions(key)
            assert seen == set(range(len(experts)))

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.lists(st.integers(0, EXPERTS - 1), unique=True))
    def prefetch(self, layer, experts):
        self.held.prefetch(layer, lambda: experts)
        with self.held._changed:  # what comes later would be another case when it is run again
            assert self.held._changed.wait_for(lambda: all(c.is_ready for c in self.held._shelf.copies.values()), 10)

    @rule(key=keys)
    def borrow(self, key):
        if self.is_held(key) and len(self.loans) < 2:
            loan = self.held.borrow(key[0], [key[1]])
            (lent,) = loan.__enter__()
            self.loans.append((loan, key, lent))

    @rule()
    def give_back(self):
        if self.loans:
            loan, key, lent = self.loans.pop(0)
            self.check(key, lent)
            loan.__exit__(None, None, None)

    def is_held(self, key):
        return key in self.placed or any((key, tier) in self.put_at for tier in ("device", "host"))

    def lent_in(self, tier):
        return sum(lent.tier == tier for _, _, lent in self.loans)

    def check(self, key, lent):
        assert self.precision is None or lent.precision == self.precision
        assert torch.equal(lent.weights.gate_up, weights(key, lent.precision))

    @invariant()
    def budgets_hold(self):
        if not hasattr(self, "held"):
            return
        held = self.held
        with held._changed:
            for tier in ("device", "host"):
                assert held._shelf.used[tier] <= (self.limit[tier] + self.lent_in(tier)) * self.size

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "held"):
            return
        held = self.held
        assert {place for place in held._shelf.assigned if place[1] != "disk"} == self.put_at
        with held._changed:
            for tier in ("device", "host"):
                slots = [copy.slot for copy in held._shelf.copies.values() if copy.tier == tier]
                assert len(set(slots)) == len(slots)
                assert not set(slots) & set(held._shelf.free[tier])
            assert all(copy.is_ready and not copy.users for copy in held._shelf.evictable)
            assert all(copy.users >= 0 for copy in held._shelf.copies.values())

    def teardown(self):
        for loan, _, _ in getattr(self, "loans", ()):
            loan.__exit__(None, None, None)


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
