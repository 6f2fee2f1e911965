"""The clock: every token's walk through the layers, with first-come-first-served queues at nodes and links.

Decides what waits for what. At each layer the trunk runs at its node; then one call goes to each holder at once while
local experts compute; the layer ends with the slowest. A node computes one thing at a time, in order of arrival; a
directed link sends one message at a time, in order of arrival of its head. Must not know placements or topologies,
only `Script` and `Requests`.
"""

from dataclasses import dataclass
from heapq import heappop, heappush, heappushpop
from typing import Final

import numpy as np

from planner.problem import Floats, Ints
from planner.simulate.arrivals import Requests
from planner.simulate.script import Call, Script

# Kinds of event, in the order in which one layer goes through them.
_ARRIVE, _START, _SEND, _OUT, _SERVE, _BACK, _END, _HOP, _NEXT = range(9)
_LOCAL: Final = Call(holder=-1, service_s=0.0, out=(), back=(), network_s=0.0, overhead_s=0.0)
Event = tuple[float, int, int, Call, int, float]  # when, what, request, call, link of the path, when its tail is there


@dataclass(frozen=True, eq=False)
class TokenTimes:
    """What each token met, in the order in which tokens ended.

    Attributes
    ----------
    request
        int64 ``[T]``.
    start_s, end_s
        A token starts when its request arrives or the token before it ended. float64 ``[T]``.
    network_s, compute_s, overhead_s
        Of each layer's slowest part, summed over layers: links when free, evaluation, software. float64 ``[T]``. The
        rest of a token's time was spent in queues.
    """

    request: Ints
    start_s: Floats
    end_s: Floats
    network_s: Floats
    compute_s: Floats
    overhead_s: Floats

    @property
    def latency_s(self) -> Floats:
        """Seconds from start to end."""
        return self.end_s - self.start_s

    @property
    def queue_s(self) -> Floats:
        """Seconds spent behind others."""
        rest: Floats = self.latency_s - self.network_s - self.compute_s - self.overhead_s
        return rest


def run(script: Script, requests: Requests) -> TokenTimes:  # noqa: C901, PLR0912, PLR0915 - see Notes
    """Simulate all requests to their end.

    Notes
    -----
    This loop body runs several times for each of a million layers: it is one function over local lists, and an event
    that comes next anyway never enters the heap.
    """
    rings = [[script.works[kind] for kind in kinds.ravel().tolist()] for kinds in script.work_of]
    num_layers = len(script.hops[0])
    ring_of = [rings[ingress] for ingress in requests.ingress.tolist()]
    hops_of = [script.hops[ingress] for ingress in requests.ingress.tolist()]
    arrival, following = requests.arrival_s.tolist(), requests.following.tolist()
    count = len(arrival)
    cursor = [token * num_layers for token in requests.first_token.tolist()]
    tokens_left, layer = requests.num_tokens.tolist(), [0] * count
    node_free, link_free = [0.0] * script.num_nodes, [0.0] * script.num_links
    waiting, latest, slowest = [0] * count, [0.0] * count, [_LOCAL] * count
    began, network, compute, overhead = ([0.0] * count for _ in range(4))
    ended: list[tuple[int, float, float, float, float, float]] = []

    heap: list[Event] = []
    event: Event | None = (arrival[0], _ARRIVE, 0, _LOCAL, 0, 0.0)
    while event is not None:
        now, what, request, call, position, tail = event
        event = None
        if what == _SERVE:
            free = node_free[call[0]]
            node_free[call[0]] = end = (free if free > now else now) + call[1]
            event = (end, _BACK, request, call, 0, end)
        elif what == _BACK:
            link, occupied, latency = call[3][position]
            free = link_free[link]
            free = free if free > now else now
            link_free[link] = end = free + occupied
            tail = (end if end > tail else tail) + latency
            if position + 1 < len(call[3]):
                event = (free + latency, _BACK, request, call, position + 1, tail)
            else:
                if tail > latest[request]:
                    latest[request], slowest[request] = tail, call
                waiting[request] -= 1
                if not waiting[request]:
                    event = (latest[request], _END, request, _LOCAL, 0, 0.0)
        elif what == _OUT:
            link, occupied, latency = call[2][position]
            free = link_free[link]
            free = free if free > now else now
            link_free[link] = end = free + occupied
            tail = (end if end > tail else tail) + latency
            if position + 1 < len(call[2]):
                event = (free + latency, _OUT, request, call, position + 1, tail)
            else:
                event = (tail + call[5], _SERVE, request, call, 0, 0.0)
        elif what == _HOP:
            hop = hops_of[request][layer[request] - 1]
            link, occupied, latency = hop[0][position]
            free = link_free[link]
            free = free if free > now else now
            link_free[link] = end = free + occupied
            tail = (end if end > tail else tail) + latency
            if position + 1 < len(hop[0]):
                event = (free + latency, _HOP, request, call, position + 1, tail)
            else:
                network[request] += hop[1]
                overhead[request] += hop[2]
                event = (tail + hop[2], _NEXT, request, call, 0, 0.0)
        else:
            if what == _END:
                ring, at = ring_of[request], cursor[request]
                work, last = ring[at], slowest[request]
                compute[request] += work[1] + (work[2] if last is _LOCAL else last[1])
                network[request] += last[4]
                overhead[request] += last[5]
                at += 1
                cursor[request] = at if at < len(ring) else 0
                number = layer[request]
                layer[request] = number + 1 if number + 1 < num_layers else 0
                if hops_of[request][number]:
                    event = (now, _HOP, request, call, 0, now)
                else:
                    what = _NEXT
            if what == _NEXT:
                what = _START
                if not layer[request]:
                    ended.append((request, began[request], now, network[request], compute[request], overhead[request]))
                    tokens_left[request] -= 1
                    if not tokens_left[request]:
                        request = following[request]
                    if request >= 0:
                        began[request], network[request], compute[request], overhead[request] = now, 0.0, 0.0, 0.0
                    else:
                        what = _NEXT
            elif what == _ARRIVE:
                began[request] = now
                if request + 1 < count and arrival[request + 1] < np.inf:
                    heappush(heap, (arrival[request + 1], _ARRIVE, request + 1, _LOCAL, 0, 0.0))
                what = _START
            if what == _START:
                node, trunk_s, local_s, calls = ring_of[request][cursor[request]]
                free = node_free[node]
                ready = (free if free > now else now) + trunk_s
                node_free[node] = latest[request] = end = ready + local_s
                slowest[request] = _LOCAL
                if not calls:
                    event = (end, _END, request, _LOCAL, 0, 0.0)
                elif ready > now:
                    event = (ready, _SEND, request, _LOCAL, 0, 0.0)
                else:
                    what = _SEND
            if what == _SEND:
                calls = ring_of[request][cursor[request]][3]
                waiting[request] = len(calls)
                for call in calls:
                    if len(call[2]) > 1:
                        heappush(heap, (now, _OUT, request, call, 0, now))
                        continue
                    link, occupied, latency = call[2][0]
                    free = link_free[link]
                    link_free[link] = end = (free if free > now else now) + occupied
                    heappush(heap, (end + latency + call[5], _SERVE, request, call, 0, 0.0))
        if event is not None:
            event = heappushpop(heap, event)
        elif heap:
            event = heappop(heap)
    columns = np.array(ended, dtype=np.float64).T
    return TokenTimes(columns[0].astype(np.int64), *columns[1:])
