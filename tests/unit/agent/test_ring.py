"""One answer's state machine, told as stories. Events: see `Story.act`."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import ring
from schemas.plan import Segment, TrunkPath
from tests.scenario_files import check

FILES = sorted((Path(__file__).parent / "rings").glob("*.txt"))


class Story:
    """An answer to the prompt 1 2 3, three tokens long, whose path may be in trouble for ten seconds."""

    def __init__(self) -> None:
        numbers = itertools.count(1)
        self.now = 0.0
        self.make = lambda combine: ring.Ring(
            ring.Wanted((1, 2, 3), 3, combine=combine), patience_s=10, new_id=lambda: f"{next(numbers):032x}"
        )
        self.ring = self.make("partial")

    def act(self, words: list[str]) -> Iterator[str]:
        match words:
            case ["ordered"]:
                self.ring = self.make("ordered")
                return
            case ["wait", seconds]:
                """Time passes, tick by tick; what happens is told with its time."""
                for _ in range(round(float(seconds) * 20)):
                    self.now += 0.05
                    for instruction in self.ring.handle(ring.Ticked(), self.now):
                        yield f"{self.now:.2f} s: {told(instruction)}"
                return
        yield from map(told, self.ring.handle(event(words), self.now))


def event(words: list[str]) -> ring.Event:
    match words:
        case ["way", epoch, "none"]:
            return ring.WayIs(ring.Way(int(epoch), None, "takes no tokens in"))
        case ["way", epoch, *segments]:
            return ring.WayIs(ring.Way(int(epoch), path(segments)))
        case ["opened", session, node]:
            return ring.OpenedAt(name(session), node)
        case ["token", session, position, token, *end]:
            return ring.TokenCame(name(session), int(position), int(token), end[0] if end else "")  # type: ignore[arg-type]
        case ["stood", session, node, state]:
            return ring.Stood(name(session), node, state == "busy")
        case ["fault", session, node, code, *text]:
            return ring.Faulted(name(session), node, code, " ".join(text))  # type: ignore[arg-type]
        case ["cancel"]:
            return ring.Cancelled()
    raise ValueError(f"no such event: {words}")


def name(session: str) -> str:
    return f"{int(session.removeprefix('s')):032x}"


def path(segments: list[str]) -> TrunkPath:
    parts = []
    for segment in segments:
        node, _, layers = segment.partition(":")
        first, last = layers.split("-")
        parts.append(Segment(node=node, first_layer=int(first), last_layer=int(last)))
    return TrunkPath(ingress="a", segments=tuple(parts))


def told(instruction: ring.Instruction) -> str:
    match instruction:
        case ring.Open(opening, nodes):
            extra = f" {opening.resumed} resumed" if opening.resumed else ""
            room = f"{opening.prompt_tokens} of {opening.max_tokens} tokens{extra}"
            return f"open s{int(opening.session, 16)} at {' '.join(nodes)}: {room}, epoch {opening.epoch}"
        case ring.Feed(session, node, ids):
            return f"feed s{int(session, 16)} at {node}: {' '.join(map(str, ids))}"
        case ring.KeepAlive(session, nodes):
            return f"alive s{int(session, 16)} at {' '.join(nodes)}"
        case ring.Close(session, nodes):
            return f"close s{int(session, 16)} at {' '.join(nodes)}"
        case ring.Emit(token):
            return f"emit {token}"
        case ring.Finish(reason):
            return f"finish: {reason}"
        case ring.Fail(message, exit_code):
            return f"fail {int(exit_code)}: {message}"


def test_forced_tokens_come_with_how_unlikely_they_were() -> None:
    wanted = ring.Wanted((5,), 2, forced=(7, 9))
    machine = ring.Ring(wanted, patience_s=10.0, new_id=lambda: "0" * 32)
    session = "0" * 32
    opened, fed = machine.handle(ring.WayIs(ring.Way(1, path(["a:0-1"]))), 0.0)
    assert isinstance(opened, ring.Open)
    assert fed == ring.Feed(session, "a", (5,))
    assert (opened.opening.forced, opened.opening.max_tokens) == ((7, 9), 3)
    assert [opened.opening.forced_at(position) for position in (1, 2)] == [7, 9]
    machine.handle(ring.OpenedAt(session, "a"), 0.0)
    assert machine.handle(ring.ScoreCame(session, 1, 0.5), 0.0) == []
    assert machine.handle(ring.TokenCame(session, 1, 7, ""), 0.0) == [ring.Emit(7, 0.5)]
    closed = machine.handle(ring.TokenCame(session, 2, 9, "length"), 0.0)
    assert [type(each) for each in closed] == [ring.Close], "a score that was lost is no score of the token before"
    (again,) = machine.handle(ring.Ticked(), 1.0)
    assert isinstance(again, ring.Open)
    assert (again.opening.prompt_tokens, again.opening.resumed, again.opening.forced_at(2)) == (2, 1, 9)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_stories_of_an_answer(file: Path, rewrite_scenarios: bool) -> None:
    check(file, Story().act, rewrite=rewrite_scenarios)
