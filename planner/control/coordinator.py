"""The coordinator's loop: receives, lets the machine decide, persists, sends. Decides nothing about plans itself.

Flow: frame ──► message ──► event ──► `ClusterMachine.handle` ──► persist, send ──► progress to whoever applies.
Must not know solvers or weights.
"""

import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from planner.control import machine as m
from planner.control.journal import Journal
from planner.control.rivals import judge as judge_rival
from planner.control.stages import plan_nodes, travelling_bytes
from planner.control.state import Accept, Refuse, judge
from planner.control.status import (
    AWAY_S,
    AgentView,
    node_status,
    plan_status,
    promises_in_force,
    unlike_offers,
)
from planner.control.transport import CoordinatorSocket, reach
from schemas import messages as msg
from schemas.address import InvalidAddress, require_loopback
from schemas.messages import Message
from schemas.model import ModelSpec
from schemas.outcome import ExitCode
from schemas.plan import Plan
from schemas.topology import Topology

log = logging.getLogger(__name__)

TICK_S: Final = 0.25
COUNTS_S: Final = 2.0
CATALOGUE_S: Final = 2.0  # before a catalogue is asked for again


@dataclass
class _Collection:
    """Counters being collected for a client."""

    client: bytes
    deadline: float
    missing: set[str]
    counts: dict[str, msg.Counts]


class Coordinator:
    """One cluster's coordinator. `run` serves until `stopped` says so."""

    def __init__(
        self,
        topology: Topology,
        model: ModelSpec,
        journal: Journal,
        socket: CoordinatorSocket,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topology = topology
        self._model = model
        self._journal = journal
        self._socket = socket
        self._clock = clock
        self._generation = uuid.uuid4().hex
        self._machine = m.ClusterMachine(journal.state)
        self._views: dict[str, AgentView] = {}
        self._appliers: dict[bytes, msg.ApplyProgress | None] = {}
        self._collections: list[_Collection] = []
        self._preparing_since: float | None = None
        self._peers_revision = 0
        self._asked_at = -CATALOGUE_S
        self._ticked_at = clock()

    def run(self, stopped: Callable[[], bool]) -> None:
        """Serve until `stopped`."""
        while not stopped():
            for identity, frame in self._socket.receive(TICK_S / 2):
                self._take(identity, frame)
            self._pass_time()
            self._tell_appliers()

    def _take(self, identity: bytes, frame: bytes) -> None:
        try:
            message = msg.decode(frame)
        except msg.RemoteProtocolError as error:
            log.warning("%r: %s", identity, error)
            self._socket.send(identity, msg.Refusal(code=ExitCode.INVALID, message=str(error)))
            return
        match message:
            case msg.Hello():
                self._hello(identity, message)
            case msg.Heartbeat():
                self._heartbeat(identity, message)
            case msg.Goodbye():
                self._goodbye(identity, message)
            case msg.Catalogue():
                self._take_catalogue(identity, message)
            case msg.Counts():
                if message.counts.node.encode() == identity:
                    self._collect(message)
            case msg.ApplyRequest():
                self._apply(identity, message)
            case msg.StatusRequest():
                self._socket.send(identity, self._status())
            case msg.CountersRequest():
                self._start_collection(identity)
            case msg.LocateRequest():
                self._socket.send(identity, self._locate(message.node))
            case _:
                refusal = msg.Refusal(code=ExitCode.INVALID, message=f"a coordinator takes no {message.type}")
                self._socket.send(identity, refusal)

    def _hello(self, identity: bytes, hello: msg.Hello) -> None:
        now = self._clock()
        if refusal := next(self._objections(identity, hello), None):
            log.warning("hello of %s refused: %s", hello.node, refusal)
            answer = msg.Refusal(code=ExitCode.INVALID, message=refusal, incarnation=hello.incarnation)
            self._socket.send(identity, answer)
            return
        match judge_rival(hello, self._views.get(hello.node), now, reach):
            case "wait":
                return  # it says hello again
            case "taken":
                text = (
                    f"another agent runs as node {hello.node!r} already; stop it first, or correct node in the config"
                )
                log.warning("a second agent for %s is refused", hello.node)
                answer = msg.Refusal(code=ExitCode.INVALID, message=text, taken=True, incarnation=hello.incarnation)
                self._socket.send(identity, answer)
                return
        known = self._views.get(hello.node)
        since = known.since if known and known.hello.incarnation == hello.incarnation else msg.Served()
        self._views[hello.node] = AgentView(hello, None, now, now, since=since)
        self._socket.send(identity, msg.Welcome(cluster=self._topology.cluster, generation=self._generation))
        self._peers_revision += 1
        self._broadcast_peers()
        log.info("%s says hello (epoch %d)", hello.node, hello.standing.active)
        self._perform(m.NodeReported(hello.node, hello.standing, has_store=hello.has_store, fresh=True))
        self._ask_for_catalogue(hello)

    def _ask_for_catalogue(self, hello: msg.Hello) -> None:
        """Ask a node with a store what is in it, until one has told."""
        now = self._clock()
        if hello.has_store and self._machine.catalogue is None and now - self._asked_at >= CATALOGUE_S:
            self._asked_at = now
            self._socket.send(hello.node.encode(), msg.CatalogueRequest())

    def _take_catalogue(self, identity: bytes, catalogue: msg.Catalogue) -> None:
        shape = range(self._model.layers), range(self._model.experts)
        listed = {(record.layer, record.expert) for record in catalogue.records}
        if catalogue.node.encode() != identity or not _is_same_model(catalogue.model, self._model):
            log.warning("the catalogue of %s is of another model or under another name; it is not used", catalogue.node)
        elif any({(r.layer, r.expert) for r in each.records} != listed for each in catalogue.packed) or (
            listed != set(itertools.product(*shape))
        ):
            log.warning("the catalogue of %s does not list every expert; it is not used", catalogue.node)
        elif self._machine.catalogue is None:
            self._perform(m.CatalogueReceived(catalogue))

    def _goodbye(self, identity: bytes, goodbye: msg.Goodbye) -> None:
        view = self._views.get(goodbye.node)
        if goodbye.node.encode() != identity or view is None or view.hello.incarnation != goodbye.incarnation:
            return
        log.info("%s stops", goodbye.node)
        self._views[goodbye.node] = replace(view, heard_at=self._clock(), has_stopped=True)
        self._perform(m.NodeLost(goodbye.node))

    def _objections(self, identity: bytes, hello: msg.Hello) -> Iterator[str]:
        """Yield why an agent may not join, the first thing first."""
        ours, epoch = self._topology, self._machine.state.epoch
        if hello.node.encode() != identity:
            yield f"node {hello.node!r} speaks under another name"
        if hello.node not in {node.id for node in ours.nodes}:
            names = ", ".join(node.id for node in ours.nodes)
            yield f"the topology has no node {hello.node!r}; its nodes are {names}"
        if hello.protocol != msg.PROTOCOL:
            yield f"it speaks protocol {hello.protocol}, this is {msg.PROTOCOL}; install the same version everywhere"
        if hello.cluster not in {"", ours.cluster}:
            yield f"its data directory belongs to cluster {hello.cluster!r}, this is {ours.cluster!r}"
        if not _is_same_model(hello.model, self._model):
            yield (
                f"its model {hello.model.id!r} (dtype {hello.dtype}) is another than the topology's "
                f"{self._model.id!r} (dtype {ours.dtype}); use the same checkpoint and dtype everywhere"
            )
        wanted = next((node.precision for node in ours.nodes if node.id == hello.node), None)
        if wanted is not None and wanted not in hello.precisions:
            yield (
                f"it holds experts in {' or '.join(hello.precisions)}, the topology says {wanted} for {hello.node}; "
                f"set precision: {wanted} (or plan) in the agent's config, or correct the topology and solve again"
            )
        try:
            require_loopback(hello.endpoints.address)
        except InvalidAddress as error:
            yield f"address: {error}"
        if hello.standing.active > epoch:
            yield (
                f"it is at epoch {hello.standing.active}, the journal {self._journal.path} at {epoch}; start planner "
                "serve with the journal that this cluster had, or empty the agents' data directories"
            )

    def _heartbeat(self, identity: bytes, beat: msg.Heartbeat) -> None:
        view = self._views.get(beat.node)
        if beat.node.encode() != identity or view is None or view.hello.incarnation != beat.incarnation:
            self._socket.send(identity, msg.Unknown())
            return
        now = self._clock()
        moved_on = view.heartbeat is None or view.heartbeat.progress != beat.progress or not beat.in_flight
        progressed_at = now if moved_on else view.progressed_at
        self._views[beat.node] = replace(view, heartbeat=beat, heard_at=now, progressed_at=progressed_at)
        self._perform(m.NodeReported(beat.node, beat.standing, beat.moved, view.hello.has_store, beat.is_loading))
        self._ask_for_catalogue(view.hello)
        if beat.peers != self._peers_revision:
            self._socket.send(identity, self._peers())  # the last one was lost on the way

    def _perform(self, event: m.Event, client: bytes = b"") -> None:
        """Let the machine decide and do what it says, in its order."""
        phase = self._machine.state.phase
        for instruction in self._machine.handle(event):
            match instruction:
                case m.Persist(state):
                    self._journal.write(state)
                    log.info("epoch %d %s %s", state.epoch, state.phase, state.message)
                case m.Send(node, message):
                    self._socket.send(node.encode(), message)
                case Refuse(code, text):
                    self._socket.send(client, msg.Refusal(code=code, message=text))
                case Accept(nothing_to_do):
                    self._accept(client, nothing_to_do)
        if self._machine.state.phase != phase:
            self._preparing_since = self._clock() if self._machine.state.phase == "preparing" else None
        if self._machine.state.phase == "retiring" != phase:  # every agent uses the new epoch
            self._views = {node: view.from_now() for node, view in self._views.items()}

    def _accept(self, client: bytes, nothing_to_do: bool) -> None:
        self._appliers[client] = None
        if nothing_to_do:
            self._appliers.pop(client)
            progress = self._progress().model_copy(update={"message": "nothing to do", "final": True})
            self._socket.send(client, progress)

    def _apply(self, client: bytes, request: msg.ApplyRequest) -> None:
        if foreign := self._foreign(request.plan):
            self._socket.send(client, msg.Refusal(code=ExitCode.INVALID, message=foreign))
            return
        if unlike := unlike_offers(request.plan, self._views):
            self._socket.send(client, msg.Refusal(code=ExitCode.REFUSED, message=unlike))
            return
        if not request.dry_run:
            self._perform(m.PlanProposed(request.plan), client)
            return
        decision = judge(self._machine.state, request.plan)
        if isinstance(decision, Refuse):
            self._socket.send(client, msg.Refusal(code=decision.code, message=decision.message))
            return
        absent = sorted(plan_nodes(request.plan) - self._machine.present)
        text = "nothing to do" if decision.nothing_to_do else "it may be applied"
        plan, known = request.plan, self._machine.catalogue
        total = sum(travelling_bytes(step, plan, known) for step in plan.steps if step.action == "replicate")
        self._socket.send(
            client,
            msg.ApplyProgress(
                phase=self._machine.state.phase,
                epoch=self._machine.state.epoch,
                target=request.plan.epoch,
                to_move=total,
                waiting_for=tuple(absent),
                message=text,
                final=True,
            ),
        )

    def _foreign(self, plan: Plan) -> str:
        """Say what in a plan is not of this cluster's topology; empty if nothing is."""
        if plan.cluster == self._topology.cluster and not _is_same_model(plan.model, self._model):
            return (
                f"the plan is for model {plan.model.id!r} (dtype {plan.dtype}), the cluster runs {self._model.id!r} "
                f"(dtype {self._topology.dtype}); solve its topology again"
            )
        if unknown := sorted(plan_nodes(plan) - {node.id for node in self._topology.nodes}):
            return f"the plan uses {', '.join(unknown)}, which the coordinator's topology does not have; solve it again"
        return ""

    def _progress(self) -> msg.ApplyProgress:
        status = self._plan_status()
        return msg.ApplyProgress(
            phase=status.phase,
            epoch=status.epoch,
            target=status.target,
            moved=status.moved,
            to_move=status.to_move,
            waiting_for=self._machine.waiting_for,
            message=status.message,
            code=self._machine.state.code,
            final=status.phase in {"done", "aborted"},
        )

    def _tell_appliers(self) -> None:
        if not self._appliers:
            return
        progress = self._progress()
        for client, told in list(self._appliers.items()):
            if told != progress:
                self._appliers[client] = progress
                if not self._socket.send(client, progress) or progress.final:
                    del self._appliers[client]

    def _pass_time(self) -> None:
        now = self._clock()
        if now - self._ticked_at < TICK_S:
            return
        self._ticked_at = now
        for node in self._machine.present:
            if now - self._views[node].heard_at > AWAY_S:
                log.warning("%s is not heard any more", node)  # one that stops in good order says goodbye
                self._perform(m.NodeLost(node))
        self._perform(m.Ticked())
        for collection in list(self._collections):
            if now > collection.deadline or not collection.missing:
                self._finish(collection)

    def _broadcast_peers(self) -> None:
        peers = self._peers()
        for node in self._views:
            self._socket.send(node.encode(), peers)

    def _peers(self) -> msg.Peers:
        peers = tuple(msg.Peer(node=n, endpoints=v.hello.endpoints) for n, v in sorted(self._views.items()))
        return msg.Peers(peers=peers, revision=self._peers_revision)

    def _plan_status(self) -> msg.PlanStatus:
        since = self._preparing_since
        elapsed = self._clock() - since if since is not None else None
        state, catalogue = self._machine.state, self._machine.catalogue
        return plan_status(state, self._views, preparing_s=elapsed, catalogue=catalogue)

    def _status(self) -> msg.StatusReport:
        now, expected = self._clock(), promises_in_force(self._machine.state, self._views)
        return msg.StatusReport(
            cluster=self._topology.cluster,
            epoch=self._machine.state.epoch,
            plan=self._plan_status(),
            nodes=tuple(
                node_status(n.id, n.memory, self._views.get(n.id), now=now, promise=expected.get(n.id))
                for n in self._topology.nodes
            ),
        )

    def _locate(self, node: str) -> Message:
        if node not in {n.id for n in self._topology.nodes}:
            names = ", ".join(n.id for n in self._topology.nodes)
            return msg.Refusal(code=ExitCode.INVALID, message=f"there is no node {node!r}; nodes are {names}")
        if node not in self._machine.present:
            return msg.Refusal(code=ExitCode.FAILED, message=f"no agent is heard for node {node}; start it")
        return msg.Located(peer=msg.Peer(node=node, endpoints=self._views[node].hello.endpoints))

    def _start_collection(self, client: bytes) -> None:
        present = self._machine.present
        for node in present:
            self._socket.send(node.encode(), msg.CountsRequest())
        self._collections.append(_Collection(client, self._clock() + COUNTS_S, set(present), {}))

    def _collect(self, said: msg.Counts) -> None:
        for collection in self._collections:
            collection.counts[said.counts.node] = said
            collection.missing.discard(said.counts.node)

    def _finish(self, collection: _Collection) -> None:
        self._collections.remove(collection)
        report = msg.CountersReport(
            cluster=self._topology.cluster,
            model=self._model,
            nodes=tuple(said.counts for _, said in sorted(collection.counts.items())),
            layers=tuple(said.layers for _, said in sorted(collection.counts.items()) if said.layers is not None),
            missing=tuple(sorted({n.id for n in self._topology.nodes} - collection.counts.keys())),
        )
        self._socket.send(collection.client, report)


def _is_same_model(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two specs are the same but for the name of the directory they were read from."""
    return one.model_copy(update={"id": ""}) == other.model_copy(update={"id": ""})
