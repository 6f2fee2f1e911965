"""Routing snapshots and the board of epochs."""

import threading

import numpy as np

from runtime.routing import LOCAL, NOBODY, EpochBoard, Routing
from schemas.placement import Route


def route(layer, expert, holder, share=1.0):
    return Route(ingress="here", layer=layer, expert=expert, holder=holder, share=share)


def test_tables_name_the_holder_of_each_expert():
    routing = Routing.build(
        3, layers=2, experts=3, local=[(0, 0), (1, 2)], routes=[route(0, 1, "b"), route(1, 0, "a"), route(1, 1, "b")]
    )
    assert routing.holders == ("a", "b")
    assert routing.tables.tolist() == [[[LOCAL, 2, NOBODY], [1, 2, LOCAL]]]  # what is here needs no call
    assert not routing.is_complete
    assert Routing.all_local(0, layers=2, experts=3).is_local


def test_shares_are_kept():
    routes = [route(0, 0, "a", 0.25), route(0, 0, "b", 0.75), route(0, 1, "b")]
    routing = Routing.build(1, layers=1, experts=2, local=[], routes=routes)
    shares = np.bincount(routing.tables[:, 0, 0]) / len(routing.tables)
    np.testing.assert_allclose(shares, [0, 0.25, 0.75], atol=2 / 64)
    assert set(routing.tables[:, 0, 1]) == {2}


def test_routes_win_over_what_is_here_and_may_name_this_node():
    routes = [route(0, 0, "b"), route(0, 1, "here", 0.25), route(0, 1, "b", 0.75), route(0, 2, "here")]
    routing = Routing.build(1, layers=1, experts=4, local=[(0, e) for e in range(4)], routes=routes)
    assert routing.holders == ("b",)
    assert [set(routing.tables[:, 0, expert]) for expert in range(4)] == [{1}, {LOCAL, 1}, {LOCAL}, {LOCAL}]
    share = (routing.tables[:, 0, 1] == LOCAL).mean()
    np.testing.assert_allclose(share, 0.25, atol=2 / 64)


def test_a_step_keeps_the_routing_it_began_with():
    old, new = (Routing.all_local(epoch, layers=1, experts=1) for epoch in (1, 2))
    board = EpochBoard(old)
    mine = board.begin()
    board.install(new)
    assert mine is old
    assert board.current is new
    assert board.running_before(2) == 1
    assert not board.wait_drained(2, timeout_s=0.01)
    timer = threading.Timer(0.05, board.end, [mine])
    timer.start()
    assert board.wait_drained(2, timeout_s=10)
    timer.join()
    assert board.running_before(2) == 0
