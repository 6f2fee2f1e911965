"""The clock: every token's walk through the layers, with first-come-first-served queues at nodes and links.

Decides what waits for what. At each layer the trunk runs at its node; then one call goes to each holder at once while
local experts compute; the layer ends with the slowest. A node computes one thing at a time, in order of arrival; a
directed link sends one message at a time, in order of arrival of its head. What begins at a node that idled takes
longer, the more so the longer it idled up to `COOLING_S`, until the token leaves or waits. Where a request has a
prompt, its chunks walk the layers first, each setting out when the one before has computed all that it could without
waiting; the answer begins when the last has ended. Must not know placements or topologies, only script and requests.
"""

from dataclasses import dataclass
from heapq import heappop, heappush, heappushpop
from typing import Any, Final

import numpy as np

from planner.problem import Floats, Ints
from planner.simulate.arrivals import Requests
from planner.simulate.script import Script
from planner.simulate.work import Call, Work

# Kinds of event, in the order in which one layer goes through them.
_ARRIVE, _START, _SEND, _OUT, _SERVE, _BACK, _END, _HOP, _NEXT = range(9)
_LOCAL: Final = Call(holder=-1, service_s=0.0, out=(), back=(), network_s=0.0, overhead_s=0.0)
COOLING_S: Final = 10e-3  # idling after which compute is as slow as it gets
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
    prompt_request, prompt_s
        Requests that had a prompt, int64 ``[R]``, and the seconds until its first token, float64 ``[R]``.
    """

    request: Ints
    start_s: Floats
    end_s: Floats
    network_s: Floats
    compute_s: Floats
    overhead_s: Floats
    prompt_request: Ints
    prompt_s: Floats

    @property
    def latency_s(self) -> Floats:
        """Seconds from start to end."""
        return self.end_s - self.start_s

    @property
    def queue_s(self) -> Floats:
        """Seconds spent behind others."""
        rest: Floats = self.latency_s - self.network_s - self.compute_s - self.overhead_s
        return rest


@dataclass(frozen=True, eq=False)
class _Walkers:
    """All that walks the layers: requests, then the chunks of their prompts, in lists by number.

    Attributes
    ----------
    works, hops
        What is replayed in a ring, and the `Hop` after each layer, or None.
    entry
        Who sets out where a request starts: itself, or its first chunk.
    onward
        The chunk that sets out once this one has computed; -1 for none.
    owner
        The request that starts where this chunk ends; -1 where it is not the last.
    lead_s
        Seconds before who enters first sets out, by request.
    """

    works: list[list[Work]]
    hops: list[tuple[Any, ...]]
    entry: list[int]
    onward: list[int]
    owner: list[int]
    lead_s: list[float]


def _walkers(script: Script, requests: Requests) -> _Walkers:
    rings = [[script.works[kind] for kind in kinds.ravel().tolist()] for kinds in script.work_of]
    ingresses = requests.ingress.tolist()
    count = len(ingresses)
    found = _Walkers(
        works=[rings[ingress] for ingress in ingresses],
        hops=[script.hops[ingress] for ingress in ingresses],
        entry=list(range(count)),
        onward=[-1] * count,
        owner=[-1] * count,
        lead_s=[0.0] * count,
    )
    for request, ingress in enumerate(ingresses if requests.prompts else ()):
        chunks = script.chunks[ingress]
        for number, chunk in enumerate(chunks):
            me, last = len(found.works), number == len(chunks) - 1
            if not number:
                found.entry[request], found.lead_s[request] = me, chunk.lead_s
            found.works.append(list(chunk.works))
            found.hops.append(chunk.hops)
            found.onward.append(-1 if last else me + 1)
            found.owner.append(request if last else -1)
    return found


def run(script: Script, requests: Requests) -> TokenTimes:  # noqa: C901, PLR0912, PLR0915 - see Notes
    """Simulate all requests to their end.

    Notes
    -----
    This loop body runs several times for each of a million layers: it is one function over local lists, and an event
    that comes next anyway never enters the heap.
    """
    walkers, num_layers = _walkers(script, requests), len(script.hops[0])
    ring_of, hops_of, entry, onward = walkers.works, walkers.hops, walkers.entry, walkers.onward
    lead_s = walkers.lead_s
    arrival, following = requests.arrival_s.tolist(), requests.following.tolist()
    count, total = len(arrival), len(ring_of)
    cursor = [token * num_layers for token in requests.first_token.tolist()] + [0] * (total - count)
    tokens_left, layer = requests.num_tokens.tolist(), [0] * total
    node_free, link_free = [0.0] * script.num_nodes, [0.0] * script.num_links
    slower = (script.idle_factor - 1).tolist()
    waiting, latest, slowest = [0] * total, [0.0] * total, [_LOCAL] * total
    began, network, compute, overhead = ([0.0] * total for _ in range(4))
    arrived, cold, longer = [0.0] * count, [0.0] * total, [0.0] * total
    ended: list[tuple[int, float, float, float, float, float]] = []
    prompted: list[tuple[int, float]] = []

    heap: list[Event] = []
    event: Event | None = (arrival[0], _ARRIVE, 0, _LOCAL, 0, 0.0)
    while event is not None:
        now, what, request, call, position, tail = event
        event = None
        if what == _SERVE:
            free, served = node_free[call[0]], call[1]
            if free < now:
                if slower[call[0]]:
                    served *= 1 + slower[call[0]] * min((now - free) / COOLING_S, 1.0)
                    longer[request] = served - call[1]
                free = now
            else:
                longer[request] = 0.0
            node_free[call[0]] = end = free + served
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
                took = 1 + cold[request]
                compute[request] += work[1] * took
                compute[request] += work[2] * took if last is _LOCAL else last[1] + longer[request]
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
                    if request < count:
                        ended.append(
                            (request, began[request], now, network[request], compute[request], overhead[request])
                        )
                        tokens_left[request] -= 1
                        if not tokens_left[request]:
                            request = following[request]
                            if request >= 0:
                                arrived[request], lead, request = now, lead_s[request], entry[request]
                                if lead:
                                    heappush(heap, (now + lead, _ARRIVE, request, _LOCAL, 0, 0.0))
                                    request = -1
                    else:
                        request = walkers.owner[request]
                        if request >= 0:
                            prompted.append((request, now - arrived[request]))
                    if request >= 0:
                        began[request], network[request], compute[request], overhead[request] = now, 0.0, 0.0, 0.0
                    else:
                        what = _NEXT
            elif what == _ARRIVE:
                if request < count:
                    if request + 1 < count and arrival[request + 1] < np.inf:
                        heappush(heap, (arrival[request + 1], _ARRIVE, request + 1, _LOCAL, 0, 0.0))
                    arrived[request], lead, request = now, lead_s[request], entry[request]
                    if lead:
                        heappush(heap, (now + lead, _ARRIVE, request, _LOCAL, 0, 0.0))
                        request = -1
                if request >= 0:
                    began[request] = now
                    what = _START
            if what == _START:
                node, trunk_s, local_s, calls = ring_of[request][cursor[request]]
                free = node_free[node]
                if request >= count and not trunk_s and not local_s:
                    ready = latest[request] = end = now  # a chunk that has computed this layer with an earlier one
                else:
                    if free != now:  # else it goes on where it was
                        cold[request] = slower[node] * min((now - free) / COOLING_S, 1.0) if free < now else 0.0
                    took = 1 + cold[request]
                    ready = (free if free > now else now) + trunk_s * took
                    node_free[node] = latest[request] = end = ready + local_s * took
                if onward[request] >= 0:
                    heappush(heap, (end, _ARRIVE, onward[request], _LOCAL, 0, 0.0))
                    onward[request] = -1
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
    columns, first = np.array(ended, dtype=np.float64).T, np.array(prompted, dtype=np.float64).reshape(-1, 2).T
    return TokenTimes(
        request=columns[0].astype(np.int64),
        start_s=columns[1],
        end_s=columns[2],
        network_s=columns[3],
        compute_s=columns[4],
        overhead_s=columns[5],
        prompt_request=first[0].astype(np.int64),
        prompt_s=first[1],
    )
