"""A node's standing with its coordinator: hello until it is welcome, heartbeats then, and what it is told.

Decides when something is said (regularly, and at once when something has changed), which messages are taken (none
before a welcome), and what a refusal means: the end for a node that serves nobody, a line in the log for one that does.
Orders become events of the machine. Must not know what comes of them.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from agent import machine as m
from agent.control import ControlLine
from agent.errors import CoordinatorAbsent, Refused
from agent.preparing import Preparation
from agent.reporting import Reporter
from schemas import messages as msg

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 0.5
FIRST_CONTACT_S: Final = 10.0
HELLO_S: Final = 1.0


class Registration:
    """One agent's part of the control plane. Belongs to the thread that owns the line.

    Parameters
    ----------
    serves
        Whether the node has an epoch that it may go on with, whatever the coordinator says.

    Attributes
    ----------
    peers
        Where other nodes listen; replaced whole, read by any thread.
    """

    def __init__(self, line: ControlLine, reporter: Reporter, *, coordinator: str, serves: Callable[[], bool]) -> None:
        self.peers: Mapping[str, msg.Endpoints] = {}
        self._line = line
        self._reporter = reporter
        self._coordinator = coordinator
        self._serves = serves
        self._peers_revision = 0
        self._generation = ""
        self._is_lonely = not serves()  # a node that serves waits for ever
        self._began = time.monotonic()
        self._said_hello_at = self._beat_at = -HELLO_S
        self._last_standing: msg.Standing | None = None
        self._last_refusal = ""

    def events(self, timeout_ms: int) -> Iterator[m.Event]:
        """Yield what the coordinator wants, waiting at most `timeout_ms` for the first message. Modifies.

        Raises
        ------
        Refused, CoordinatorAbsent
            It will not have this node, or has never been there.
        """
        for message in self._line.receive(timeout_ms):
            if (event := self._take(message)) is not None:
                yield event
        if self._is_lonely and time.monotonic() - self._began > FIRST_CONTACT_S:
            raise CoordinatorAbsent(
                f"no coordinator answers at {self._coordinator}; start it with planner serve TOPOLOGY, "
                "or correct coordinator in the config"
            )

    def _take(self, message: msg.Message) -> m.Event | None:
        match message:
            case msg.Welcome(cluster=cluster, generation=generation):
                log.info("welcome in cluster %s", cluster)
                self._generation, self._peers_revision = generation, 0
                self._is_lonely = False
                self._last_refusal = ""
            case msg.Unknown():
                self.renew()
            case msg.Refusal():
                self._refused(message)
            case _ if self._generation:
                return self._take_order(message)
            case _:  # before a welcome: meant for another agent of this name, or too old
                log.debug("%s is not taken", message.type)
        return None

    def _take_order(self, message: msg.Message) -> m.Event | None:
        match message:
            case msg.Peers(peers=peers, revision=revision):
                self.peers = {peer.node: peer.endpoints for peer in peers}
                self._peers_revision = revision
            case msg.Prepare(assignment=assignment):
                return m.PrepareReceived(assignment)
            case msg.Commit(epoch=epoch, plan=plan):
                return m.CommitReceived(epoch, plan)
            case msg.Retire(epoch=epoch):
                return m.RetireReceived(epoch)
            case msg.Abort(epoch=epoch, plan=plan):
                return m.AbortReceived(epoch, plan)
            case msg.CatalogueRequest():
                if catalogue := self._reporter.catalogue():
                    self._line.send(catalogue)
            case msg.CountsRequest():
                self._line.send(self._reporter.counts())
            case _:
                log.warning("the coordinator sent a %s, which an agent does not take", message.type)
        return None

    def _refused(self, refusal: msg.Refusal) -> None:
        """End where the coordinator will not have this node; one that serves tokens goes on and says so once."""
        if refusal.incarnation not in {"", self._reporter.incarnation}:
            return  # another agent claims this place
        if refusal.taken or not self._serves():
            raise Refused(f"the coordinator refused {self._reporter.node}: {refusal.message}", refusal.code)
        if refusal.message != self._last_refusal:
            self._last_refusal = refusal.message
            log.error("the coordinator refused this node, which goes on with what it has: %s", refusal.message)

    def renew(self) -> None:
        """Introduce this node anew. Modifies."""
        self._generation = ""
        self._said_hello_at = -HELLO_S

    def speak(
        self,
        standing: msg.Standing,
        *,
        cluster: str,
        used: Callable[[], msg.TierBytes],
        preparation: Preparation | None,
    ) -> None:
        """Say hello or send a heartbeat: regularly, and at once when something has changed. Modifies.

        Parameters
        ----------
        cluster
            That the journal belongs to.
        preparation
            Of the pending epoch, if there is one.
        """
        now = time.monotonic()
        if not self._generation:
            if now - self._said_hello_at >= HELLO_S:
                self._said_hello_at = now
                self._line.send(self._reporter.hello(cluster, standing))
            return
        if standing == self._last_standing and now - self._beat_at < HEARTBEAT_S:
            return
        self._last_standing, self._beat_at = standing, now
        self._line.send(
            self._reporter.heartbeat(standing, now, used=used(), preparation=preparation, peers=self._peers_revision)
        )

    def say_goodbye(self) -> None:
        """Tell the coordinator that this agent stops."""
        self._line.send(self._reporter.goodbye())
