"""One node's daemon: performs what the machine decides, and owns all threads and sockets of the agent.

Threads: this one (control plane, journal, machine) · expert server · weights server · the session plane's workers ·
clients and their workers · one preparation at a time. They share values that are replaced whole (fence, routes,
endpoints, what is on offer), and locks only where `runtime` and `turns` have them. Decides nothing about epochs.

Flow: message or finished work ──► event ──► `AgentMachine.handle` ──► persist, obtain, activate, keep ──► heartbeat.
"""

import logging
import queue
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Final, assert_never

import torch
import zmq

from agent import machine as m
from agent.activation import Activation
from agent.allowance import Allowance
from agent.budget import wanted_parts, wanted_replicas
from agent.clients import ClientServer
from agent.computing import Computing, release_device_memory
from agent.control import ControlLine
from agent.errors import JournalUnwritable, ThreadLost
from agent.generation import Generator
from agent.holdings import Holdings
from agent.journal import Journal
from agent.layers import Layers
from agent.peers import Patience, PeerCaller
from agent.plane import SessionPlane
from agent.precisions import make_budget
from agent.preparing import Preparation
from agent.quality import QualityBudget
from agent.registration import Registration
from agent.reporting import Identity, Reporter
from agent.ring import Way
from agent.serving import ExpertServer, Fence, Work
from agent.sessions import Sender
from agent.settings import Settings
from agent.transfer import Puller, Wanted, WeightsServer
from agent.transport import Context, bind, make_socket
from runtime.ahead import learnt_from
from runtime.counters import Counters
from runtime.engine import Segment
from runtime.errors import RuntimeFault
from runtime.loading import Trunk
from runtime.models import open_model, open_store_of
from runtime.slots import Record
from schemas import messages as msg
from schemas.address import Address
from schemas.model import ModelSpec
from schemas.wire import Limits

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S: Final = 0.0005  # how long a computing thread may keep another from answering
CLOSE_S: Final = 1.0  # what a preparation may take to notice that it is stopped
_POLL_MS: Final = 50
_MOST_WORKERS: Final = 12  # so many steps may wait for experts elsewhere, or for the piece of the prompt before them


class Node:
    """One agent. Making it binds its sockets; `run` serves until `stopped` says so; `close` leaves nothing behind."""

    def __init__(self, settings: Settings, stopped: Callable[[], bool]) -> None:
        self._settings = settings
        self._is_over = self._is_silent = False
        self._stopped: Callable[[], bool] = lambda: self._is_over or stopped()
        self._threads: list[threading.Thread] = []
        self._preparation: Preparation | None = None
        with ExitStack() as opened:
            self._context: Context = zmq.Context()
            opened.callback(self._context.destroy, linger=0)
            self._build(opened)
            self._opened = opened.pop_all()

    def _build(self, opened: ExitStack) -> None:
        settings = self._settings
        self._model = open_model(Path(settings.model), settings.dtype)
        self._spec: ModelSpec = self._model.spec
        store = self._model.store if settings.store is None else open_store_of(self._model, Path(settings.store))
        data = Path(settings.data)
        self._journal = opened.enter_context(closing(Journal(data / "agent.journal", settings.node)))
        budget = make_budget(settings, self._spec, self._model.layout, self._journal.state)
        self._computing = Computing(settings, self._model, budget.precision)
        self._faults: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        memory = self._computing.memory
        budget = replace(budget, memory=memory)
        self._machine = m.AgentMachine(self._journal.state, budget)
        self._allowance = Allowance(self._computing.residency, budget, settings.device_budget)
        self._holdings = Holdings(self._computing.residency, store, data, disk_budget=memory.disk, fetch=self._fetch)
        self._counters = Counters(self._spec.layers, self._spec.experts)
        self._ahead = learnt_from(Path(settings.predictor), self._spec) if settings.predictor is not None else None
        self._quality = QualityBudget(settings, self._spec)
        self._quality.require()
        self._activation = Activation(settings, self._spec, holdings=self._holdings, quality=self._quality)
        self._incarnation = uuid.uuid4().hex
        self._work = Work()
        self._outcomes: queue.SimpleQueue[tuple[Preparation, m.Obtained | m.NotObtained]] = queue.SimpleQueue()
        endpoints = self._bind(opened)
        line = opened.enter_context(closing(ControlLine(self._context, settings.coordinator, settings.node)))
        reporter = Reporter(
            Identity(settings, self._incarnation, self._spec, endpoints, budget.offers),
            computing=self._computing,
            holdings=self._holdings,
            counters=self._counters,
            work=self._work,
            board=self._activation.board,
            traffic=self._plane.traffic,
            quality=self._quality,
        )
        self._registration = Registration(
            line,
            reporter,
            coordinator=settings.coordinator,
            serves=lambda: self._machine.state.active is not None,
        )

    def _bind(self, opened: ExitStack) -> msg.Endpoints:
        """Bind all planes before any thread starts, so that a port in use ends the program cleanly."""
        settings, spec = self._settings, self._spec
        self._limits = Limits(
            spec.layers, spec.experts, spec.top_k, spec.hidden_size, max(1024, settings.context.tokens)
        )
        router, ports, host = zmq.ROUTER, settings.ports, settings.address
        expert = make_socket(self._context, router, "expert", frame_bytes=self._limits.call_bytes)
        weights = make_socket(self._context, router, "weights")
        client = make_socket(self._context, router, "control")
        session = make_socket(self._context, router, "session", frame_bytes=self._limits.call_bytes)
        endpoints = msg.Endpoints(
            address=host,
            expert=bind(expert, Address(host, ports.expert), "expert calls"),
            weights=bind(weights, Address(host, ports.weights), "weights"),
            client=bind(client, Address(host, ports.client), "clients"),
            session=bind(session, Address(host, ports.session), "sessions"),
        )
        self._plane = SessionPlane(
            self._context,
            session,
            me=Sender(settings.node, self._incarnation),
            limits=self._limits,
            layers=spec.num_decoder_layers,
            endpoints=lambda: self._registration.peers,
            make_caller=self._make_caller,
            device=self._computing.torch_device,
            is_device_fault=self._note_fault,
            stopped=lambda: self._is_silent,
        )
        opened.callback(self._plane.close)
        self._layers = Layers(
            settings,
            self._model,
            self._machine.budget,
            device=self._computing.torch_device,
            make_segment=self._make_segment,
            plane=self._plane,
        )
        self._threads = [
            ExpertServer(
                expert,
                lambda: self._computing.residency,
                self._limits,
                self._work,
                self._stopped,
                is_device_fault=self._note_fault,
            ),
            WeightsServer(weights, self._holdings, self._stopped),
            ClientServer(
                self._context,
                client,
                workers=settings.context.sessions,
                make_source=self._make_generator,
                set_budget=self._set_budget,
                stopped=self._stopped,
            ),
        ]
        self._workers = self._plane.workers(min(_MOST_WORKERS, 2 * settings.context.sessions + 1))
        return endpoints

    def _make_generator(self) -> Generator:
        return Generator(
            self._plane,
            ingress=lambda: self._layers.ingress,
            way=self._way,
            patience_s=self._settings.absence_timeout_s,
        )

    def _make_caller(self) -> PeerCaller:
        return PeerCaller(
            self._context,
            endpoints=lambda: self._registration.peers,
            routes=lambda: self._activation.routes,
            residency=lambda: self._computing.residency,
            limits=self._limits,
            patience=Patience(answer_s=self._settings.call_timeout_s, absence_s=self._settings.absence_timeout_s),
        )

    def _fetch(self, replica: msg.AssignedReplica) -> Record:
        """Bring one record from the nodes that hold it; in the thread that needs it."""
        puller = Puller(self._context, self._endpoints_of, stopped=self._stopped)
        wanted = Wanted(replica.record.sha256, replica.record.bytes, deque(replica.sources))
        for record in puller.pull([wanted]):
            return record.data
        raise RuntimeFault("the agent is being stopped")

    def _set_budget(self, device: int) -> msg.BudgetChanged:
        device = self._allowance.change(device)
        residency = self._computing.residency
        experts, used = residency.budgets["device"], residency.used()["device"]
        return msg.BudgetChanged(device=device, experts=experts, used=used)

    def _make_segment(self, trunk: Trunk) -> Segment:
        return Segment(
            trunk,
            self._computing.residency,
            self._activation.board,
            counters=self._counters,
            kv_budget=0,
            ahead=self._ahead,
        )

    def run(self) -> None:
        """Serve until stopped; then say goodbye."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        torch.set_num_threads(self._settings.threads)
        state = self._machine.state
        kept = (*state.kept, *((state.active,) if state.active else ()))
        self._holdings.open(wanted_replicas(kept), wanted_parts(kept))
        for thread in (*self._workers, *self._threads):
            thread.start()
        self._handle(m.Started())
        while not self._stopped():
            for event in self._registration.events(_POLL_MS):
                self._handle(event)
            self._take_outcomes()
            self._take_faults()
            self._release()
            self._speak()
            self._require_threads()
        self._registration.say_goodbye()

    def _require_threads(self) -> None:
        """End where a thread has ended by itself: half an agent would look alive and answer nothing."""
        for thread in (*self._threads, *self._workers):
            if not thread.is_alive() and not self._stopped():
                raise ThreadLost(
                    f"the thread that serves {thread.name} ended by itself, see above; start the agent again"
                )

    def close(self) -> None:
        """Stop every thread and close every socket."""
        self._is_over = True
        if self._preparation is not None:
            self._preparation.stop()
            self._preparation.join(CLOSE_S)  # it may be loading layers, and ends with the process
        self._join(self._threads)
        self._is_silent = True  # only now: answers that were cancelled have told the nodes of their paths
        self._join(self._workers)
        self._opened.close()

    @staticmethod
    def _join(threads: Iterable[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join()

    def _take_outcomes(self) -> None:
        """Hand on how preparations ended, but for those that were stopped before anyone looked."""
        while not self._outcomes.empty():
            preparation, outcome = self._outcomes.get()
            if not preparation.is_stopped:
                self._handle(outcome)

    def _note_fault(self, error: BaseException) -> bool:
        """Whether an error is a device's; if it is that of this node's own, the processor takes over soon."""
        if self._computing.is_fault(error):
            self._faults.put(error)
        return self._computing.is_of_device(error)

    def _take_faults(self) -> None:
        """Let the processor take over once the device has failed: weights are obtained anew, answers begin again."""
        while not self._faults.empty():
            error = self._faults.get()
            if not self._computing.is_fault(error):
                continue  # of the device that is used no more
            self._stop_preparation()
            self._computing.fall(error)
            self._use_residency()
            self._machine.budget = replace(self._machine.budget, memory=self._computing.memory)
            self._allowance.limit(self._computing.memory.device)
            self._registration.renew()  # with the memory that it has
            self._handle(m.WeightsLost())
            del error  # with all that lies on the device
            release_device_memory()

    def _use_residency(self) -> None:
        """Let everybody hold, and find, experts where they lie from now on."""
        self._layers.move(self._computing.torch_device)
        self._holdings.residency = self._allowance.residency = self._computing.residency

    def _handle(self, event: m.Event) -> None:
        """Let the machine decide, and do what it says in its order."""
        for instruction in self._machine.handle(event):
            try:
                self._perform(instruction)
            except JournalUnwritable as error:
                self._take_back(event, error)
                return
        self._set_fence()
        self._speak()

    def _take_back(self, event: m.Event, error: JournalUnwritable) -> None:
        """Refuse a preparation that cannot be journalled; anything else ends the process, which then starts over."""
        if not isinstance(event, m.PrepareReceived):
            raise error
        self._machine.take_back(self._journal.state, event.assignment, str(error))
        self._speak()

    def _perform(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.Persist(state):
                self._journal.write(state)
            case m.HoldIn(precision):
                self._computing.hold_in(precision)
                self._use_residency()
            case m.Obtain():
                self._stop_preparation()
                self._allowance.fit(instruction.assignments)
                self._preparation = Preparation(
                    instruction,
                    self._holdings,
                    self._context,
                    endpoints=self._endpoints_of,
                    layers=self._layers,
                    report=self._outcomes.put,
                    is_device_fault=self._note_fault,
                    after=self._preparation,
                )
                self._preparation.start()
            case m.StopObtaining():
                self._stop_preparation()
            case m.Activate(assignment):
                self._set_fence()
                self._activation.activate(assignment, self._layers, self._machine.budget)
            case m.Keep(assignments):
                self._set_fence()  # first: a call that is let in must find its expert
                self._holdings.keep(wanted_replicas(assignments), wanted_parts(assignments))
                if (active := self._machine.state.active) is not None:
                    self._activation.invite(active)  # what was dropped just now may come back as a guest
                self._release()
                self._allowance.fit(assignments)
            case _:
                assert_never(instruction)

    def _endpoints_of(self, node: str) -> msg.Endpoints | None:
        return self._registration.peers.get(node)

    def _stop_preparation(self) -> None:
        if self._preparation is not None:
            self._preparation.stop()

    def _release(self) -> None:
        self._layers.release(self._machine.assignments, self._machine.state.active)

    def _way(self) -> Way:
        return self._activation.way(self._layers, has_epoch=self._machine.state.active is not None)

    def _set_fence(self) -> None:
        machine = self._machine
        self._work.fence = Fence(machine.state.retired, machine.served_epochs, machine.active_epoch)

    def _speak(self) -> None:
        pending, preparation = self._machine.state.pending, self._preparation
        is_pending = pending is not None and preparation is not None and preparation.order.epoch == pending.epoch
        self._registration.speak(
            self._machine.standing(self._activation.board.oldest_running()),
            cluster=self._machine.state.cluster,
            used=self._used,
            preparation=preparation if is_pending else None,
        )

    def _used(self) -> msg.TierBytes:
        """Bytes taken of each tier: experts, backing copies, and the trunk and KV cache of the layers that run here."""
        used = dict(self._computing.residency.used())
        used["disk"] += self._holdings.backing_bytes
        used[self._machine.budget.trunk_tier] += self._layers.used_bytes(self._machine.assignments)
        return msg.TierBytes(**used)
