"""What is not at hand goes the way that is done first; what is in memory here is computed here."""

from itertools import pairwise

import numpy as np
import torch

from runtime.counters import Counters
from runtime.dispatch import Dispatcher
from runtime.policy.menu import Rates, Rent, Way, choose
from runtime.routing import Routing
from runtime.slots import Caching, Residency
from schemas.placement import Route
from tests.families import InProcessCaller
from tests.unit.runtime.test_cached import resident, source_of, take

TOKENS = 1


def test_links_work_at_the_same_time_and_a_line_is_as_long_as_it_is():
    disk, near, far = Way("disk", 0.3), Way("near", 0.4, is_shared=True), Way("far", 9.0, is_shared=True)
    assert choose([[disk, near]] * 4) == [0, 1, 1, 1]
    assert choose([[disk, far]] * 4) == [0, 0, 0, 0]
    assert choose([[disk, far], [far]]) == [0, 0]  # far is waited for anyway
    assert choose([[Way("disk", 10.0), far], [far]]) == [1, 0]
    assert choose([]) == []


def test_rates_follow_what_is_measured():
    rates = Rates()
    assert rates.seconds("n1") is None
    for seconds in [1.0, *[2.0] * 100]:
        rates.observe("n1", seconds)
    assert 1.99 < rates.seconds("n1") <= 2.0


def dispatch(held, caller, routing, rates):
    """Run experts 0 and 1 of layer 0 for one token; returns the sum and who was called."""
    caller.calls.clear()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, 64, generator=generator)
    counts = Counters(4, 8).fresh()
    dispatcher = Dispatcher(held, routing, caller, counts, "ordered", rates=rates)
    answer = dispatcher.run(0, hidden, torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]]))
    return answer, [(call.holder, call.expert.tolist()) for call in caller.calls]


def test_slow_disks_call_and_caches_answer(store):
    """Expert 0 is this node's by plan, on disk; expert 1 is routed to n1 though it is on this disk as well."""
    opened = store("qwen3_moe")
    caller = InProcessCaller({"n1": resident(opened)})
    held = Residency(opened.manifest.layout, {"device": 4 * opened.manifest.layout.bytes}, caching=Caching(4, 8))
    local = [(0, expert) for expert in range(8)]
    for key in local:
        held.place(key, source_of(opened, key))
    routing = Routing.build(
        1, layers=1, experts=8, local=local,
        routes=[Route(ingress="here", layer=0, expert=1, holder="n1")],
        others={(0, 0): ("n1",), (0, 1): ("n1",)},
    )  # fmt: skip
    rates = Rates()
    held.slack.load_s = 1.0
    rates.observe("n1", 0.001)
    want, called = dispatch(held, caller, routing, rates)
    assert called == [("n1", [0, 1])]
    held.slack.load_s = 1e-6
    got, called = dispatch(held, caller, routing, rates)
    assert called == []
    assert torch.equal(got, want)
    held.slack.load_s = 1.0  # both are in memory now
    got, called = dispatch(held, caller, routing, rates)
    assert called == []
    assert torch.equal(got, want)
    take(held, 0, [4, 5, 6, 7])  # and now they are not
    np.testing.assert_array_equal(held.at_hand(0, 2), [False, False])
    got, called = dispatch(held, caller, routing, rates)
    assert called == [("n1", [0, 1])]
    assert torch.equal(got, want)


def test_what_is_called_over_and_over_is_brought_when_calls_have_cost_as_much():
    rent = Rent()
    assert rent.pay("a", 0.001), "what was never tried is tried"
    rent.brought("a", 0.010)
    assert [rent.pay("b", 0.004) for _ in range(3)] == [False, False, True]
    rent.brought("b", 0.010)
    assert not rent.pay("b", 0.004), "it was sent away, and is paid for anew"


def test_what_cannot_be_brought_is_tried_less_and_less():
    rent = Rent()
    tries = []
    for call in range(400):
        if rent.pay("a", 0.01):
            rent.failed("a")
            tries.append(call)
    assert len(tries) <= 6
    assert all(later - sooner >= 10 for sooner, later in pairwise(tries))


def test_old_uses_count_less():
    rent = Rent()
    for _ in range(3000):
        rent.use("old")
    for _ in range(3000):
        rent.use("new")
    assert rent.uses("new") > rent.uses("old") > 0
    for number in range(10_000):
        rent.use(number)
    assert rent.uses("old") < 400
