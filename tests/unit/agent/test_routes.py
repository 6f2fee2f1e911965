"""An assignment as an ingress uses it."""

from agent.routes import epoch_routes
from runtime.routing import LOCAL
from schemas.messages import AssignedReplica, Assignment, Hop
from tests.small_plans import CATALOGUE, LAYOUT


def test_the_own_name_among_holders_is_this_node_and_others_come_before_it_where_the_plan_says_so():
    assignment = Assignment(
        cluster="test",
        plan="0" * 64,
        epoch=3,
        ingress=True,
        layout=LAYOUT,
        replicas=tuple(AssignedReplica(record=record, tier="disk") for record in CATALOGUE.records[:3]),
        routing=(
            Hop(layer=0, expert=1, holders=("b", "me")),
            Hop(layer=0, expert=2, holders=("b", "me"), shares=(0.75, 0.25)),
            *(Hop(layer=1, expert=expert, holders=("c", "b")) for expert in range(3)),
        ),
    )
    routes = epoch_routes(assignment, "me", layers=2, experts=3)
    b, c = (routes.routing.holders.index(name) + 1 for name in "bc")
    tables = routes.routing.tables
    assert set(tables[:, 0, 0]) == {LOCAL}
    assert set(tables[:, 0, 1]) == {b}
    assert set(tables[:, 0, 2]) == {LOCAL, b}
    assert set(tables[:, 1].ravel()) == {c}
    assert routes.holders[0, 1] == ("b",)
    assert routes.local == {(0, 0), (0, 1), (0, 2)}  # what is left if b dies
    assert routes.epoch == 3
