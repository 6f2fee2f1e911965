"""From a plan's routes to the table a step uses: whoever computes a row holds its expert, and routes decide who."""

from hypothesis import given
from hypothesis import strategies as st

from agent.routes import epoch_routes
from planner.control.stages import assign
from runtime.routing import LOCAL
from schemas.placement import Replica, sorted_replicas
from tests.small_plans import CATALOGUE, KEYS, plan_through, route

NODES = ("a", "b", "c", "d")
holdings = st.dictionaries(st.sampled_from(NODES), st.sampled_from(["device", "host", "disk"]), min_size=1)


@given(data=st.data())
def test_routes_decide_and_every_row_finds_a_holder(data: st.DataObject) -> None:
    placed = {key: data.draw(holdings, label=str(key)) for key in KEYS}
    routed = {
        (ingress, key): data.draw(st.lists(st.sampled_from(sorted(placed[key])), unique=True), label=f"{ingress} {key}")
        for ingress in ("a", "b")
        for key in KEYS
    }
    plan = plan_through(
        sorted_replicas(
            Replica(layer=key[0], expert=key[1], node=node, tier=tier)  # type: ignore[arg-type]
            for key, tiers in placed.items()
            for node, tier in tiers.items()
        ),
        ingresses=("a", "b"),
        routes=[route(ingress, key, h, 1 / len(hs)) for (ingress, key), hs in routed.items() for h in hs],
    )
    given_out = assign(plan, epoch=1, before=(), after=plan.placement, catalogue=CATALOGUE, stores=["a"])
    for ingress in ("a", "b"):
        routes = epoch_routes(given_out[ingress], ingress, layers=2, experts=3)
        assert routes.routing.is_complete
        for key in KEYS:
            indices = set(routes.routing.tables[:, key[0], key[1]].tolist())
            used = {ingress if index == LOCAL else routes.routing.holders[index - 1] for index in indices}
            holders, wanted = set(placed[key]), set(routed[ingress, key])
            assert used <= holders
            if wanted:
                assert used == wanted
            elif ingress in holders:
                assert used == {ingress}
            others = holders - {ingress}  # whoever may take over: every other holder, and the node itself
            if used != {ingress}:
                assert set(routes.holders[key]) == others
            assert (key in routes.local) == (ingress in holders)
