"""Two agents under one node id: which of them the coordinator listens to.

Decides that whoever is there stays. Late heartbeats do not tell whether an agent is there: where its machine is busy
they may be late by seconds. Its sockets do, since they go with its process, however that ends, and not before. Must
not know sockets: `reach` tries one.
"""

from collections.abc import Callable
from typing import Final, Literal

from planner.control.status import AgentView
from schemas.messages import Endpoints, Hello

SILENCE_S: Final = 1.5  # three heartbeats
FORGOTTEN_S: Final = 60.0  # whatever listens there by now is not the agent that was heard once

Reach = Literal["listens", "gone", "unknown"]
Verdict = Literal["welcome", "wait", "taken"]


def judge(hello: Hello, present: AgentView | None, now: float, reach: Callable[[Endpoints], Reach]) -> Verdict:
    """Say what a hello gets, given what is known of its node; ``wait``: it is to say hello again.

    Parameters
    ----------
    reach
        Tells whether the agent that was heard last still listens; called only where there are two.
    """
    if present is None or present.has_stopped or present.hello.incarnation == hello.incarnation:
        return "welcome"
    silence_s, theirs = now - present.heard_at, present.hello.endpoints
    if silence_s >= FORGOTTEN_S or _ports(theirs) & _ports(hello.endpoints):
        return "welcome"  # the newcomer has bound what the one before had
    match reach(theirs):
        case "listens":
            return "taken"
        case "gone":
            return "welcome"
        case "unknown":
            return "welcome" if silence_s >= SILENCE_S else "wait"


def _ports(endpoints: Endpoints) -> set[tuple[str, int]]:
    ports = (endpoints.expert, endpoints.weights, endpoints.client, endpoints.session)
    return {(endpoints.address, port) for port in ports}
