"""Good holders and a valid bound where holder sets are too many to list: dual ascent for each expert.

Decides, at given prices, lower bounds on every expert's cost and holders near it. Must not know how prices are found.
All experts go through the same steps at once; arrays run over experts last.

Notes
-----
An expert at given prices is an uncapacitated facility location problem. For any v[i] ≥ 0 its cost is at least
Σ_i v[i] + min over allowed holders x of Σ_p x[p] (f[p] − Σ_i max(0, v[i] − d[i] c[i,p])), f the price of a replica.
v is raised level by level, round robin over ingresses, as far as no slack becomes negative (Erlenkotter 1978, "A
dual-based procedure for uncapacitated facility location"). Each ingress looks at its nearest `NEAREST` places only.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from planner.solvers.decomposition.answers import Answer, NearTies
from planner.solvers.decomposition.arrays import Bools, Floats, Ints, PlacementArrays
from planner.solvers.decomposition.evaluate import admissible, nearest_holders
from planner.solvers.decomposition.prices import Coupling

NEAREST = 24
EXPERT_TILE = 1024
TIGHT = 1e-9  # slack, relative to the dearest replica, up to which a place counts as paid for
DROP_ROUNDS = 40


class AscentOracle:
    """Lower bounds by dual ascent, holders from the places that it pays for. Does not change."""

    lists_ties = False

    def __init__(self, arrays: PlacementArrays, pool: ThreadPoolExecutor | None = None) -> None:
        self.arrays, self.coupling, self.rounding = arrays, Coupling(arrays), 0.0
        self._usable = np.flatnonzero(arrays.slots > 0)
        self._map = pool.map if pool else map
        self._tiles = list(_tiles(arrays))

    @property
    def is_whole(self) -> bool:
        """Its lower bounds hold over all holder sets."""
        return True

    def answer(self, theta: Floats) -> Answer:
        """Return bounds and holders at θ."""
        costs, extras = self.coupling.layer_costs(theta), self.coupling.holder_extras(theta)
        price = theta[self.coupling.memory]

        def solve(experts: Ints) -> Answer:
            replica = np.repeat(price[None], len(experts), axis=0) if extras is None else price + extras[experts]
            layer = int(self.arrays.layer_of_expert[experts[0]]) if len(costs) > 1 else 0
            return self._solve(experts, costs[layer], replica)

        parts = list(self._map(solve, self._tiles))
        return Answer(
            np.concatenate([part.lower for part in parts]),
            np.concatenate([part.held for part in parts]),
            np.concatenate([part.place for part in parts], axis=1),
        )

    def certify(self, theta: Floats) -> Answer:
        """Answer as always: every answer's bounds hold."""
        return self.answer(theta)

    def near_ties(
        self,
        theta: Floats,  # noqa: ARG002 (the Protocol's)
        answer: Answer,  # noqa: ARG002
        slack: float,  # noqa: ARG002
        *,
        most: int,  # noqa: ARG002
        over_all: bool = False,
    ) -> NearTies | None:
        """Return no ties: they cannot be listed, and never all of them."""
        return None if over_all else NearTies(np.zeros(0, dtype=np.int64), np.zeros((0, self.arrays.num_places), bool))

    def _solve(self, experts: Ints, cost: Floats, replica: Floats) -> Answer:
        """Bound and place a tile of experts; `cost` `[I, P]`, `replica` `[X, P]`."""
        arrays = self.arrays
        allowed = np.zeros(replica.shape, dtype=np.bool_)
        allowed[:, self._usable] = True if arrays.allowed is None else arrays.allowed[np.ix_(experts, self._usable)]
        slack = np.where(allowed, replica, np.inf).T.copy()
        order = self._usable[np.argsort(cost[:, self._usable], axis=1, kind="stable")][:, :NEAREST]
        paid = _ascend(arrays.demand[:, experts], cost, order, slack)
        lower = paid.sum(axis=0) + self._cheapest_cover(experts, slack)
        held = self._holders(experts, cost, replica, slack, allowed)
        place = nearest_holders(cost[None], np.zeros(len(experts), dtype=np.int64), held)[1]
        return Answer(lower * (1 - 1e-12), held, place)

    def _cheapest_cover(self, experts: Ints, slack: Floats) -> Floats:
        """Least slack of holders that the expert must have anyway, `[X]`: required domains, or its pinned nodes."""
        arrays = self.arrays
        domain_of_place = arrays.domains[arrays.node_of_place]
        per_domain = np.array([slack[domain_of_place == domain].min(axis=0) for domain in np.unique(domain_of_place)])
        required = max(arrays.required, 1)
        if len(per_domain) < required:
            return np.full(slack.shape[1], np.inf)
        cover: Floats = np.sort(per_domain, axis=0)[:required].sum(axis=0)
        if arrays.pinned is None:
            return cover
        pinned = np.zeros(len(experts))
        for node in range(arrays.num_nodes):
            here = arrays.pinned[experts, node]
            pinned[here] += slack[arrays.node_of_place == node][:, here].min(axis=0, initial=np.inf)
        return np.asarray(np.maximum(cover, pinned))

    def _holders(self, experts: Ints, cost: Floats, replica: Floats, slack: Floats, allowed: Bools) -> Bools:
        """Holders `[X, P]`: one place per node among those paid for, enough domains, then drops while they save."""
        arrays = self.arrays
        ranked = np.where(allowed, slack.T, np.inf)
        wanted = (ranked <= TIGHT * max(float(replica.max()), 1e-30)) & allowed
        held = np.zeros_like(wanted)
        domain_of_place = arrays.domains[arrays.node_of_place]
        spanned = np.zeros((len(experts), int(domain_of_place.max()) + 1), dtype=np.bool_)
        on_node = np.zeros((len(experts), arrays.num_nodes), dtype=np.bool_)
        pinned = on_node if arrays.pinned is None else arrays.pinned[experts]
        rows = np.arange(len(experts))
        for place in np.argsort(ranked, axis=1, kind="stable").T:  # one rank of every expert at a time
            node, domain = arrays.node_of_place[place], domain_of_place[place]
            short = (spanned.sum(axis=1) < max(arrays.required, 1)) & ~spanned[rows, domain]
            take = (wanted[rows, place] | short | pinned[rows, node]) & ~on_node[rows, node] & allowed[rows, place]
            held[rows[take], place[take]] = True
            on_node[rows[take], node[take]] = True
            spanned[rows[take], domain[take]] = True
        return self._drop(experts, cost, replica, held)

    def _drop(self, experts: Ints, cost: Floats, replica: Floats, held: Bools) -> Bools:
        """Drop the replica of each expert that saves most, round after round."""
        active = np.arange(len(experts))
        for _ in range(DROP_ROUNDS):
            saving = _savings(self.arrays.demand[:, experts[active]], cost, replica[active], held[active])
            place = saving.argmax(axis=1)
            good = saving[np.arange(len(active)), place] > 0
            active, place = active[good], place[good]
            without = held[active]
            without[np.arange(len(active)), place] = False
            fine = admissible(self.arrays, without, experts[active])
            held[active[fine]] = without[fine]
            active = active[fine]
            if len(active) == 0:
                break
        return held


def _ascend(demand: Floats, cost: Floats, order: Ints, slack: Floats) -> Floats:
    """Raise and return v `[I, X]`; lowers `slack` `[P, X]` by what v pays, never below 0. Modifies `slack`.

    `order` `[I, T]` lists each ingress's nearest places; v stops at the last of them, so that no other is paid.
    """
    ingresses, levels = np.arange(len(order)), np.take_along_axis(cost, order, axis=1)  # [I, T]
    paid = demand * levels[:, :1]
    reached = np.ones(demand.shape, dtype=np.int64)  # places whose level v has reached
    raisable = (demand > 0).any(axis=1)
    for _ in range(order.shape[1]):
        moved = False
        for i in ingresses[raisable]:
            moved |= _raise(demand[i], levels[i], slack, order=order[i], paid=paid[i], reached=reached[i])
        if not moved:
            break
    return paid


def _raise(demand: Floats, levels: Floats, slack: Floats, *, order: Ints, paid: Floats, reached: Ints) -> bool:
    """Raise one ingress's v `[X]` to its next level or until a place is paid for; return whether any rose.

    Modifies `slack`, `paid` and `reached`.
    """
    last = len(order)
    able = np.flatnonzero((reached < last) & (demand > 0))
    if len(able) == 0:
        return False
    deepest = int(reached[able].max())
    near = slack[order[:deepest, None], able]  # [deepest, X']
    counted = np.arange(deepest)[:, None] < reached[able]
    room = np.where(counted, near, np.inf).min(axis=0)
    step = demand[able] * levels[reached[able]] - paid[able]
    rise = np.maximum(np.minimum(step, room), 0.0)
    slack[order[:deepest, None], able] = np.where(counted, np.maximum(near - rise, 0.0), near)
    paid[able] += rise
    reached[able] += room > step
    reached[able[room <= step]] = last  # a place is paid for: v cannot rise again
    return True


def _savings(demand: Floats, cost: Floats, replica: Floats, held: Bools) -> Floats:
    """Seconds saved by dropping each replica, `[X, P]`; −inf where there is none or it is the only one."""
    near, place = nearest_holders(cost[None], np.zeros(len(held), dtype=np.int64), held)
    second = np.full(near.shape, np.inf)
    for p in range(held.shape[1]):
        rows = np.flatnonzero(held[:, p])
        other = np.where(place[:, rows] == p, np.inf, cost[:, p, None])
        second[:, rows] = np.minimum(second[:, rows], other)
    saving = np.where(held & (held.sum(axis=1) > 1)[:, None], replica, -np.inf)
    has_other = np.isfinite(second)
    loss = demand * np.subtract(second, near, out=np.zeros_like(near), where=has_other)
    lost = np.zeros(held.shape)
    np.add.at(lost, (np.broadcast_to(np.arange(len(held)), place.shape), place), loss)
    return saving - lost


def _tiles(arrays: PlacementArrays) -> list[Ints]:
    """Experts in order, in tiles that stay within a layer where layers have costs of their own."""
    every = np.arange(arrays.num_experts)
    runs = [every]
    if arrays.makespan is not None:
        runs = np.split(every, np.flatnonzero(np.diff(arrays.layer_of_expert)) + 1)
    return [run[at : at + EXPERT_TILE] for run in runs for at in range(0, len(run), EXPERT_TILE)]
