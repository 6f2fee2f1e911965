"""Session planes with real sockets and real segments, several in one process: rings, healing, memory, strangers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

from agent import early, plane, sessions
from agent import ring as states
from agent.errors import AgentError, RequestCancelled
from agent.generation import Generator, Ingress
from agent.offer import Offer
from agent.peers import Patience, PeerCaller
from agent.plane import SessionPlane
from agent.ring import Way
from agent.routes import EpochRoutes
from agent.serving import ExpertServer, Fence, Work
from agent.sessions import Sender
from agent.transport import bind, make_socket
from runtime.engine import Segment as Runner
from runtime.errors import ContextFull
from runtime.loading import TensorPool, load_tokenizer, load_trunk
from runtime.records import RecordFile
from runtime.routing import EpochBoard, Routing
from runtime.sampling import PREFILL_CHUNK
from runtime.slots import Caching, Residency
from runtime.store import Store
from schemas import messages as msg
from schemas.address import Address
from schemas.placement import Route
from schemas.plan import TrunkPath
from schemas.sessions import CloseSession, OpenSession, SessionAlive, StepHeader, encode_session, pack_step
from schemas.store import RECORDS_NAME
from schemas.wire import Limits
from tests.cluster import MODEL, PROMPTS, ring, spec, wait_for
from tests.integration.conftest import NUM_TOKENS

LIMITS = Limits(4, 16, 2, 192, 1024)
SESSIONS = 4
Reference = dict[str, list[int]]


TWO = ring("a", "a:0-1", "b:2-3")


class Node:
    """One node's plane with its worker threads and segments."""

    def __init__(self, world: "World", name: str) -> None:
        self.context = zmq.Context()
        self.over = threading.Event()
        socket = make_socket(self.context, zmq.ROUTER, "session", frame_bytes=LIMITS.call_bytes)
        port = bind(socket, Address("127.0.0.1", 0), "session")
        self.endpoints = msg.Endpoints(address="127.0.0.1", expert=1, weights=1, client=1, session=port)
        self.plane = SessionPlane(
            self.context, socket, me=Sender(name, f"{time.monotonic_ns()}"), limits=LIMITS, layers=4,
            endpoints=lambda: world.endpoints_for(name), make_caller=lambda: world.make_caller(self.context),
            stopped=self.over.is_set,
        )  # fmt: skip
        self.workers = self.plane.workers(2)
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        self.over.set()
        for worker in self.workers:
            worker.join()
        self.plane.close()
        self.context.destroy(linger=0)


class World:
    """Nodes a, b and c, every expert at each of them, and the path of what enters at a."""

    def __init__(self, store: Path, *, share: float = 1.0) -> None:
        opened = Store.open(store)
        self.model = spec()
        self.residency = Residency(
            opened.manifest.layout,
            {"device": round(share * self.model.total_expert_bytes)},
            caching=Caching(4, 16) if share < 1 else None,
        )
        for key, record in opened.by_key.items():
            if share < 1:
                self.residency.place(key, RecordFile(store / RECORDS_NAME, record.sha256, record.offset))
            else:
                self.residency.put(key, "device", opened.read(record.sha256))
        self.board = EpochBoard(Routing.all_local(1, layers=4, experts=16))
        self.pool = TensorPool()
        self.endpoints: dict[str, msg.Endpoints] = {}
        self.gone: set[tuple[str, str]] = set()  # links, from whom to whom
        self.holders: dict[str, msg.Endpoints] = {}  # of experts that are called
        self.nodes: dict[str, Node] = {}
        self.ingress = Ingress(load_tokenizer(MODEL), 1024)
        self.ranges = {
            (a, b): load_trunk(MODEL, dtype="float32", first_layer=a, last_layer=b, pool=self.pool)
            for a, b in [(0, 3), (0, 1), (2, 3), (1, 2), (0, 0), (3, 3)]
        }
        for name in "abc":
            self.start(name)
        self.use(TWO)

    def start(self, name: str) -> None:
        self.nodes[name] = Node(self, name)
        self.endpoints = {**self.endpoints, name: self.nodes[name].endpoints}
        self.offer(name, 1)

    def endpoints_for(self, name: str) -> dict[str, msg.Endpoints]:
        return {other: where for other, where in self.endpoints.items() if (name, other) not in self.gone}

    def offer(self, name: str, epoch: int, *, without: tuple[tuple[int, int], ...] = ()) -> None:
        segments = {
            key: Runner(trunk, self.residency, self.board, kv_budget=self.kv_budget(*key))
            for key, trunk in self.ranges.items()
            if key not in without
        }
        known = self.nodes[name].plane.offer.segments
        segments = {key: known.get(key, segment) for key, segment in segments.items()}
        self.nodes[name].plane.run_now(Offer(epoch, segments, frozenset(segments)))

    def kv_budget(self, first: int, last: int) -> int:
        return self.model.kv_bytes_per_token_layer * (last - first + 1) * 1024 * SESSIONS

    def make_caller(self, context: zmq.Context) -> PeerCaller:
        nothing = Routing.all_local(1, layers=4, experts=16)
        return PeerCaller(
            context, endpoints=lambda: self.holders, routes=lambda: EpochRoutes(nothing, {}, frozenset()), residency=lambda: self.residency,
            limits=LIMITS, patience=Patience(),
        )  # fmt: skip

    def use(self, path: TrunkPath, epoch: int = 1) -> None:
        self.way = Way(epoch, path)

    def generate(
        self, prompt: str, count: int = NUM_TOKENS, *, enough: int | None = None,
        seen: Callable[[int], None] = lambda _: None, patience_s: float = 20.0,
        stop: threading.Event | None = None, **options: object,
    ) -> list[int]:  # fmt: skip
        """Answer a prompt; cancel after `enough` tokens; tell `seen` how many there are."""
        generator = Generator(
            self.nodes["a"].plane, ingress=lambda: self.ingress, way=lambda: self.way, patience_s=patience_s
        )
        request = msg.GenerateRequest(request="r", prompt=prompt, max_tokens=count, **options)  # type: ignore[arg-type]
        tokens: list[int] = []
        try:
            is_over = stop.is_set if stop else lambda: enough is not None and len(tokens) >= enough
            for message in generator.generate(request, is_over):
                if isinstance(message, msg.Generated):
                    tokens.append(message.token)
                    seen(len(tokens))
        except RequestCancelled:
            assert enough is not None or stop is not None
        return tokens

    def routed(self) -> np.ndarray:
        """Tokens routed to each expert so far at any node, [L, E]."""
        counted = [s.counters.snapshot() for node in self.nodes.values() for s in node.plane.offer.segments.values()]
        return np.sum([counts.routed for counts in counted], axis=0)

    def kv_used(self) -> int:
        return sum(s.sessions.kv_used for node in self.nodes.values() for s in node.plane.offer.segments.values())

    def require_clean(self) -> None:
        """Nothing is held for any session any more."""

        def left() -> list[object]:
            all_segments = [node.plane._segments for node in self.nodes.values()]
            held = [(s.registry.snapshot(), s._open, len(s.fronts)) for s in all_segments]
            return [each for each in held if any(each)]

        wait_for(lambda: not self.kv_used() and not left(), timeout_s=10, what=lambda: f"nothing left of {left()}")

    def stop(self) -> None:
        for node in self.nodes.values():
            node.stop()


@contextmanager
def made(store: Path, **options: float) -> Iterator[World]:
    world = World(store, **options)
    try:
        yield world
    finally:
        world.stop()


@pytest.fixture(scope="module")
def shared(store: Path) -> Iterator[World]:
    with made(store) as world:
        yield world


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    shared.use(TWO)
    yield shared
    shared.require_clean()


@pytest.mark.parametrize(
    "path",
    [
        ring("a", "a:0-3"),
        ring("a", "b:0-3"),
        TWO,
        ring("a", "b:0-1", "c:2-3"),
        ring("a", "b:0-0", "c:1-2", "b:3-3"),
        ring("a", "a:0-0", "b:1-2", "a:3-3"),
    ],
    ids=lambda path: " ".join(f"{s.node}{s.first_layer}-{s.last_layer}" for s in path.segments),
)
def test_any_ring_gives_one_node_tokens(world: World, reference: Reference, path: TrunkPath) -> None:
    world.use(path)
    assert world.generate(PROMPTS[0], combine="ordered") == reference[PROMPTS[0]]
    assert world.generate(PROMPTS[1]) == reference[PROMPTS[1]]


def test_sampling_does_not_depend_on_the_path(world: World) -> None:
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    first = world.generate(PROMPTS[2], **options)
    world.use(ring("a", "b:0-1", "c:2-3"))
    assert world.generate(PROMPTS[2], **options) == first


def test_answers_that_meet_at_a_node_keep_their_own_tokens(
    world: World, one_node: Callable[[str, int], list[int]]
) -> None:
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answers[number] = world.generate(PROMPTS[number % 3], 40 + number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(SESSIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: one_node(PROMPTS[number % 3], 40 + number) for number in range(SESSIONS)}


def test_one_that_waits_long_holds_nobody_up_and_frees_what_it_took(
    store: Path, one_node: Callable[[str, int], list[int]]
) -> None:
    """Through a cache of a quarter of the experts; one answer needs an expert whose holder does not answer."""
    quick, slow = PROMPTS[2], PROMPTS[0]
    with made(store, share=0.25) as world:
        world.use(ring("a", "b:0-3"))
        assert world.generate(quick, 24) == one_node(quick, 24)
        asked = world.routed()
        assert world.generate(slow, 1) == one_node(slow, 1)
        layer, expert = map(int, np.argwhere((world.routed() > asked) & (asked == 0))[0])
        routes = [Route(ingress="b", layer=layer, expert=expert, holder="dead")]
        local = [(n // 16, n % 16) for n in range(64) if (n // 16, n % 16) != (layer, expert)]
        world.board.install(Routing.build(2, layers=4, experts=16, local=local, routes=routes))
        given_up = threading.Event()
        waits = threading.Thread(target=lambda: world.generate(slow, 24, stop=given_up))
        waits.start()
        wait_for(world.kv_used, timeout_s=5, what="the session")
        loads = sum(world.residency.counts.loads)
        for _ in range(2):
            assert world.generate(quick, 24) == one_node(quick, 24)
        assert sum(world.residency.counts.loads) > loads
        assert waits.is_alive(), "it did not wait"
        given_up.set()
        waits.join(10)
        world.require_clean()
        assert world.residency.used()["device"] <= world.residency.budgets["device"]


@pytest.mark.parametrize("combine", ["partial", "ordered"])
def test_another_path_in_mid_answer(world: World, reference: Reference, combine: str) -> None:
    def turn(count: int) -> None:
        if count == 20:
            world.use(ring("a", "b:0-1", "c:2-3"), 1)
        if count == 40:
            world.use(ring("a", "a:0-3"), 1)

    assert world.generate(PROMPTS[0], seen=turn, combine=combine) == reference[PROMPTS[0]]


def test_a_node_that_starts_anew_in_mid_answer(store: Path, reference: Reference) -> None:
    """Under a new port and without memory of any session; tokens on their way to it are lost."""

    def restart(count: int) -> None:
        if count == 20:
            world.nodes["b"].stop()
            world.start("b")

    with made(store) as world:
        assert world.generate(PROMPTS[0], seen=restart) == reference[PROMPTS[0]]
        world.require_clean()


def test_a_range_that_is_retired_in_mid_answer(store: Path, reference: Reference) -> None:
    """The segment says so at once; the ingress goes on along its newer path as soon as it has one."""

    def retire(count: int) -> None:
        if count == 20:
            world.offer("b", 2, without=((2, 3),))
            threading.Timer(0.5, lambda: world.use(ring("a", "a:0-1", "c:2-3"), 1)).start()

    with made(store) as world:
        assert world.generate(PROMPTS[0], seen=retire) == reference[PROMPTS[0]]
        world.require_clean()


def test_a_node_that_stays_away_is_named(store: Path) -> None:
    with made(store) as world:
        world.nodes["b"].stop()
        began = time.monotonic()
        with pytest.raises(AgentError, match="layers 2 … 3 on b: cannot be reached; given up after 2 s"):
            world.generate(PROMPTS[0], patience_s=2.0)
        assert time.monotonic() - began < 6
        world.nodes["b"] = Node(world, "b")
        world.offer("b", 1)
        world.require_clean()


@pytest.mark.parametrize(
    ("link", "trouble"),
    [
        (("b", "c"), "layers 2 … 3 on c: cannot be reached from b"),
        (("c", "b"), "layers 0 … 1 on b: cannot be reached from c"),  # one token comes of every run
        (("c", "a"), "no token, and no node is at work on one"),
    ],
    ids=["onward", "around", "to the ingress"],
)
def test_a_link_that_is_gone_between_nodes_of_a_path_is_named(
    store: Path, monkeypatch: pytest.MonkeyPatch, link: tuple[str, str], trouble: str
) -> None:
    """All of them answer their ingress, so that the path opens again and again."""
    monkeypatch.setattr(states, "ALIVE_S", 0.2)
    monkeypatch.setattr(plane, "STEP_PATIENCE_S", 0.6)
    with made(store) as world:
        world.gone.add(link)
        world.use(ring("a", "b:0-1", "c:2-3"))
        with pytest.raises(AgentError, match=f"{trouble}; given up after 2 s"):
            world.generate(PROMPTS[0], patience_s=2.0)
        world.require_clean()


def test_memory_is_as_before_after_many_sessions_a_third_of_them_cancelled(world: World, reference: Reference) -> None:
    def ask(first: int) -> None:
        for number in range(first, 48, SESSIONS):
            enough = number % 5 if number % 3 == 0 else None
            got = world.generate(PROMPTS[number % 3], 6, enough=enough)
            assert got == reference[PROMPTS[number % 3]][: len(got)]
            done.append(len(got) == 6)

    done: list[bool] = []
    threads = [threading.Thread(target=ask, args=(first,)) for first in range(SESSIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), done.count(True) >= 32) == (48, True)
    world.require_clean()


def test_sessions_beyond_the_kv_budget_wait_for_room_or_say_that_there_is_none(world: World) -> None:
    ingress, world.ingress = world.ingress, Ingress(world.ingress.tokenizer, 4096)
    with pytest.raises(AgentError, match="exceed the model's context of 2048"):
        world.generate(PROMPTS[0], 3000)
    world.ingress = ingress
    with pytest.raises(ContextFull, match=r"exceed the planned context\.tokens of 1024"):
        world.generate(PROMPTS[0], 1024)
    holding = [Stranger(world, "a") for _ in range(SESSIONS)]
    for number, peer in enumerate(holding, start=1):
        assert peer.ask(opening(f"{number:032x}", most=1024))["type"] == "opened"
    with pytest.raises(AgentError, match=r"layers 2 … 3 on b: KV cache: .* would exceed the budget of"):
        world.generate(PROMPTS[0], 900, patience_s=1.0)
    for number, peer in enumerate(holding, start=1):
        peer.tell(CloseSession(session=f"{number:032x}"))
        peer.stop(wait_s=0.2)


def test_a_prompt_beyond_what_a_node_takes_is_told_with_the_limit(world: World) -> None:
    """The ingress was given more context than the node that runs the first layers."""
    ingress, world.ingress = world.ingress, Ingress(world.ingress.tokenizer, 4096)
    world.use(ring("a", "b:0-3"))
    with pytest.raises(AgentError, match=r"layers 0 … 3 on b: refused a frame: 1\d\d\d tokens, the limit is 1024"):
        world.generate("hello " * 360, 2)
    world.ingress = ingress


def test_a_session_whose_ingress_is_gone_is_freed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LEASE_S", 0.5)
    peer = Stranger(world, "a")
    assert peer.ask(opening("1" * 32))["type"] == "opened"
    assert world.kv_used()
    peer.stop()
    world.require_clean()


def test_a_node_whose_steps_all_wait_for_a_dead_holder_still_answers(store: Path, reference: Reference) -> None:
    """As many prompts as there are threads that compute; the node can do nothing else, but it listens."""
    path = ring("a", "b:0-3")
    with made(store) as world:
        routes = [Route(ingress="b", layer=n // 16, expert=n % 16, holder="dead") for n in range(64)]
        world.board.install(Routing.build(2, layers=4, experts=16, local=[], routes=routes))
        peer = Stranger(world, "a")
        names = [f"{number:032x}" for number in range(1, 4)]
        for name, count in zip(names, (600, 3, 3), strict=True):  # the first one's pieces wait for each other too
            assert peer.ask(opening(name, path=path, prompt=count, most=700))["type"] == "opened"
            peer.tell(pack_step(StepHeader(name, 0, 0, count, "ids"), bytes(4 * count)))
        time.sleep(0.5)  # all wait by now
        began = time.monotonic()
        for name in names:
            assert peer.ask(SessionAlive(session=name))["is_busy"]
        assert time.monotonic() - began < 1.0
        for name in names:
            peer.tell(CloseSession(session=name))
        peer.stop(wait_s=0.2)
        world.require_clean()
        world.board.install(Routing.all_local(3, layers=4, experts=16))
        assert world.generate(PROMPTS[0]) == reference[PROMPTS[0]]


def test_pieces_of_a_prompt_that_wait_for_calls_give_one_node_tokens(
    store: Path, one_node: Callable[[str, int], list[int]]
) -> None:
    """Every second expert is called; each node has several pieces to go on with."""
    prompt = "The sum of 3 and 4 is seven, and so on. " * 60
    with made(store) as world, holding(world) as where:
        assert len(world.ingress.tokenizer(prompt)["input_ids"]) > 2 * PREFILL_CHUNK
        world.holders = {"h": where}
        routes = [Route(ingress="x", layer=n // 16, expert=n % 16, holder="h") for n in range(0, 64, 2)]
        local = [(n // 16, n % 16) for n in range(1, 64, 2)]
        world.board.install(Routing.build(1, layers=4, experts=16, local=local, routes=routes))
        world.use(ring("a", "a:0-0", "b:1-2", "a:3-3"))
        want = one_node(prompt, 4)
        assert world.generate(prompt, 4, combine="ordered") == want
        assert world.generate(prompt, 4) == want
        world.require_clean()


@contextmanager
def holding(world: World) -> Iterator[msg.Endpoints]:
    """Answer expert calls from what the world holds."""
    context, over = zmq.Context(), threading.Event()
    socket = make_socket(context, zmq.ROUTER, "expert", frame_bytes=LIMITS.call_bytes)
    port = bind(socket, Address("127.0.0.1", 0), "experts")
    work = Work(fence=Fence(0, frozenset({1}), 1))
    server = ExpertServer(socket, lambda: world.residency, LIMITS, work, over.is_set)
    server.start()
    try:
        yield msg.Endpoints(address="127.0.0.1", expert=port, weights=1, client=1, session=1)
    finally:
        over.set()
        server.join()
        context.destroy(linger=0)
    assert work.ended > 0


def test_the_beginning_of_a_prompt_may_come_before_its_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "EARLY_S", 0.6)
    ingress, before = Stranger(world, "a"), Stranger(world, "c")
    path, mine, other = ring("a", "c:0-1", "b:2-3"), "1" * 32, "2" * 32
    for name in (mine, other):
        for position in (0, 1):
            before.tell(pack_step(StepHeader(name, 1, position, 1, "hidden", 192), bytes(768)))
    time.sleep(0.1)
    assert ingress.ask(opening(mine, path=path))["type"] == "opened"
    wait_for(
        lambda: ingress.ask(SessionAlive(session=mine))["position"] == 2, timeout_s=5, what=lambda: "both were kept"
    )
    answers = [before.hear() for _ in range(2)]
    assert [(each["session"], each["code"]) for each in answers] == [(other, "unknown_session")] * 2
    before.tell(pack_step(StepHeader(other, 1, 0, 1, "hidden", 192), bytes(768)))
    ingress.tell(CloseSession(session=mine))
    for peer in (ingress, before):
        peer.stop(wait_s=0.1)


class Stranger:
    """Whoever speaks to b's session plane by hand, under any name."""

    def __init__(self, world: World, node: str, incarnation: str = "") -> None:
        self.context = zmq.Context()
        name = f"{node}/{incarnation or time.monotonic_ns()}".encode()
        self.socket = make_socket(self.context, zmq.DEALER, "session", frame_bytes=1 << 20, identity=name)
        self.socket.connect(f"tcp://127.0.0.1:{world.endpoints['b'].session}")

    def tell(self, *frames: object) -> None:
        self.socket.send_multipart([f if isinstance(f, bytes) else encode_session(f) for f in frames])  # type: ignore[arg-type]

    def ask(self, *frames: object) -> dict[str, object]:
        self.tell(*frames)
        return self.hear()

    def hear(self) -> dict[str, object]:
        assert self.socket.poll(5000), "no answer"
        return json.loads(self.socket.recv())  # type: ignore[no-any-return]

    def stop(self, wait_s: float = 0.0) -> None:
        time.sleep(wait_s)
        self.context.destroy(linger=0)


def opening(session: str, *, path: TrunkPath = TWO, prompt: int = 3, most: int = 100, epoch: int = 1) -> OpenSession:
    return OpenSession(session=session, epoch=epoch, path=path, prompt_tokens=prompt, max_tokens=most)


def test_strangers_get_a_typed_answer_and_change_nothing(world: World, reference: Reference) -> None:
    peer, other = Stranger(world, "a"), Stranger(world, "z")
    mine, unknown = "1" * 32, "2" * 32
    assert peer.ask(opening(mine))["type"] == "opened"
    used = world.kv_used()

    def code(who: Stranger, *frames: object) -> object:
        answer = who.ask(*frames)
        assert answer["type"] == "session_fault"
        assert answer["node"] == "b"
        return answer["code"]

    step = pack_step(StepHeader(mine, 1, 0, 1, "hidden", 192), bytes(768))
    assert code(other, opening(unknown)) == "not_yours"
    assert code(other, opening(mine)) == "not_yours"
    assert code(peer, opening(unknown, path=ring("z", "b:0-3"))) == "not_yours"
    assert code(other, CloseSession(session=mine)) == "not_yours"
    assert code(other, SessionAlive(session=mine)) == "not_yours"
    assert code(other, step) == "not_yours"
    assert code(peer, SessionAlive(session=unknown)) == "unknown_session"
    assert code(peer, CloseSession(session=unknown)) == "unknown_session"
    assert code(peer, pack_step(StepHeader(unknown, 1, 1, 1, "hidden", 192), bytes(768))) == "unknown_session"
    assert code(peer, pack_step(StepHeader(unknown, 0, 0, 1, "token"), bytes(4))) == "unknown_session"
    assert code(peer, opening(unknown, epoch=9)) == "not_ready"
    assert code(peer, opening(unknown, path=ring("a", "b:0-2", "c:3-3"))) == "stale_epoch"
    assert code(peer, opening(unknown, path=ring("a", "c:0-3"))) == "refused"
    assert code(peer, opening(unknown, most=4000)) == "context_full"
    assert code(peer, b"no message") == "refused"
    assert code(peer, step[:-1]) == "refused"
    assert code(peer, step[:20]) == "refused"
    assert code(peer, b"a", b"b", b"c") == "refused"
    before = peer.ask(opening("3" * 32, path=ring("a", "b:0-1", "c:2-3")))
    assert before["type"] == "opened"
    assert code(peer, pack_step(StepHeader("3" * 32, 0, 0, 3, "ids"), b"\xff" * 12)) == "refused"
    peer.tell(CloseSession(session="3" * 32))
    last = Stranger(world, "a", "another start")
    assert code(last, CloseSession(session=mine)) == "not_yours"
    assert peer.ask(SessionAlive(session=mine)) == {
        "type": "session_standing", "session": mine, "position": 0, "is_busy": False
    }  # fmt: skip
    assert world.kv_used() == used
    assert world.generate(PROMPTS[0]) == reference[PROMPTS[0]]
    peer.tell(CloseSession(session=mine))
    for each in (peer, other, last):
        each.stop(wait_s=0.1)
