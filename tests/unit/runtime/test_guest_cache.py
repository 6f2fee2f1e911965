"""Experts of other nodes, cached where there is room: the same bits, never in the way, never waited for."""

import time

import pytest
import torch

from runtime.counters import Counters
from runtime.dispatch import Dispatcher
from runtime.errors import DamagedRecord
from runtime.policy.menu import Rates
from runtime.records import FetchedRecord
from runtime.routing import Routing
from runtime.slots import Caching, Residency
from schemas.placement import Route
from tests.cluster import wait_for
from tests.families import InProcessCaller
from tests.unit.runtime.test_cached import resident, source_of

LAYERS, EXPERTS = 4, 8
OWN, OTHERS = (0, 1), (2, 3, 4)  # experts of layer 0 that are this node's, and that n1 has


class Scene:
    """A node with room for so many experts, two of which are its own; the others are at n1."""

    def __init__(self, opened, slots):
        layout = opened.manifest.layout
        self.opened = opened
        self.caller = InProcessCaller({"n1": resident(opened)})
        self.held = Residency(layout, {"device": slots * layout.bytes}, caching=Caching(LAYERS, EXPERTS))
        for expert in OWN:
            self.held.put((0, expert), "device", opened.read(opened.manifest.records[expert].sha256))
        routes = [Route(ingress="here", layer=0, expert=each, holder="n1") for each in range(2, EXPERTS)]
        local = [(0, expert) for expert in OWN]
        self.routing = Routing.build(1, layers=1, experts=EXPERTS, local=local, routes=routes)
        self.rates = Rates()

    def invite(self, *experts, **sources):
        self.held.invite({(0, e): [sources.get(f"e{e}", source_of(self.opened, (0, e)))] for e in experts})

    def run(self, *experts, combine="ordered"):
        """Run experts for one token; returns the sum and which experts were called."""
        self.caller.calls.clear()
        hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
        weights = torch.tensor([[0.25, 0.75]])
        dispatcher = Dispatcher(
            self.held, self.routing, self.caller, Counters(LAYERS, EXPERTS).fresh(), combine, rates=self.rates
        )
        answer = dispatcher.run(0, hidden, torch.tensor([experts]), weights)
        return answer, sorted(e for call in self.caller.calls for e in call.expert.tolist())

    def at_hand(self):
        return {expert for expert in range(EXPERTS) if self.held.at_hand(0, EXPERTS)[expert]}


def test_what_is_called_is_brought_and_gives_the_same_bits(store):
    scene = Scene(store("qwen3_moe"), slots=3)
    want, called = scene.run(0, 2)
    assert called == [2]
    assert not scene.held.guests
    scene.invite(*OTHERS)
    scene.run(0, 2)
    wait_for(lambda: 2 in scene.at_hand(), timeout_s=5, what="a guest")
    for combine in ("ordered", "partial"):
        got, called = scene.run(0, 2, combine=combine)
        assert called == []
        torch.testing.assert_close(
            got, want, rtol=0 if combine == "ordered" else 1e-5, atol=1e-6 * (combine != "ordered")
        )
    assert torch.equal(scene.run(0, 2)[0], want)
    assert sum(scene.held.counts.brought) == 1
    assert sum(scene.held.counts.guest_hits) >= 2
    assert sum(scene.held.counts.loads) == 0, "no step has loaded anything"
    assert scene.held.held()["device"] == [(0, 0), (0, 1)], "a guest is not held"


def test_a_guest_that_is_asked_for_less_makes_room_for_one_asked_for_more(store):
    scene = Scene(store("qwen3_moe"), slots=3)
    scene.invite(*OTHERS)
    scene.run(0, 2)
    wait_for(lambda: 2 in scene.at_hand(), timeout_s=5, what="a guest")
    scene.held._shelf.rent.bring_s = 0.0  # bringing costs nothing here
    scene.run(0, 3)
    assert scene.at_hand() == {0, 1, 2}, "2 was asked for as often"
    for _ in range(3):
        scene.run(0, 3)
    wait_for(lambda: scene.at_hand() == {0, 1, 3}, timeout_s=5, what="the other guest")
    assert scene.run(0, 2)[1] == [2]


def test_what_the_plan_asks_for_takes_a_guests_slot(store):
    scene = Scene(store("qwen3_moe"), slots=3)
    scene.invite(*OTHERS)
    scene.run(0, 2)
    wait_for(lambda: 2 in scene.at_hand(), timeout_s=5, what="a guest")
    scene.held.put((0, 5), "device", scene.opened.read(scene.opened.manifest.records[5].sha256))
    assert scene.at_hand() == {0, 1, 5}
    assert scene.run(0, 2)[1] == [2]


def test_a_guest_may_become_the_nodes_own(store):
    scene = Scene(store("qwen3_moe"), slots=3)
    scene.invite(*OTHERS)
    scene.run(0, 2)
    wait_for(lambda: 2 in scene.at_hand(), timeout_s=5, what="a guest")
    scene.held.put((0, 2), "device", scene.opened.read(scene.opened.manifest.records[2].sha256))
    scene.invite(3, 4)
    assert scene.at_hand() == {0, 1, 2}
    assert scene.held.held()["device"] == [(0, 0), (0, 1), (0, 2)]


def test_guests_that_are_sent_away_are_called(store):
    scene = Scene(store("qwen3_moe"), slots=3)
    scene.invite(*OTHERS)
    scene.run(0, 2)
    wait_for(lambda: 2 in scene.at_hand(), timeout_s=5, what="a guest")
    scene.invite()
    assert scene.at_hand() == {0, 1}
    assert scene.run(0, 2)[1] == [2]


@pytest.mark.parametrize("error", [DamagedRecord("a peer", "its sha256 is another than promised"), OSError("gone")])
def test_a_peer_that_is_gone_or_damages_records_is_called_on(store, error):
    scene = Scene(store("qwen3_moe"), slots=3)
    asked = []

    def fetch(name):
        asked.append(name)
        raise error

    scene.invite(2, e2=FetchedRecord("0" * 64, fetch))
    want, _ = scene.run(0, 2)
    wait_for(lambda: asked, timeout_s=5, what="a try")
    time.sleep(0.02)
    for _ in range(20):
        got, called = scene.run(0, 2)
        assert called == [2]
        assert torch.equal(got, want)
    assert len(asked) <= 3, "it is tried less and less"
    assert scene.held.used()["device"] == 2 * scene.held.layout.bytes


def test_without_room_nothing_is_brought(store):
    scene = Scene(store("qwen3_moe"), slots=2)
    scene.invite(*OTHERS)
    for _ in range(5):
        assert scene.run(0, 2)[1] == [2]
    assert sum(scene.held.counts.brought) == 0
