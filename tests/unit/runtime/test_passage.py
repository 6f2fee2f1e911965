"""Pieces of one prompt that follow each other layer by layer: the bits of one after another, and faults that spread."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from runtime.errors import CallFailed, StepAbandoned
from runtime.passage import Passage, passed
from tests.families import FAMILIES, InProcessCaller, chain_model, split_model, spread

PROMPT = torch.randint(2, 256, (75,), generator=torch.Generator().manual_seed(5))
PIECES = [PROMPT[start : start + 20] for start in range(0, 75, 20)]  # windows are 16
SOON_S = 10.0


class Slow:
    """Makes whoever waits for an answer wait a little, as drawn, and keeps the order of what happens."""

    def __init__(self, caller: InProcessCaller, seed: int, story: list[tuple[str, int, int]], piece: int = 0) -> None:
        self._caller, self._draw, self._story, self._piece = caller, random.Random(seed), story, piece

    def begin(self, call):
        self._story.append(("asked", self._piece, call.layer))
        pending, wait_s = self._caller.begin(call), self._draw.random() * 0.02
        return Late(pending, wait_s, lambda: self._story.append(("answered", self._piece, call.layer)))


class Late:
    def __init__(self, pending, wait_s, done) -> None:
        self._pending, self._wait_s, self._done = pending, wait_s, done

    def result(self):
        time.sleep(self._wait_s)
        self._done()
        return self._pending.result()


def begun(segment, name, count):
    """Wait until steps of so many tokens were let in."""
    deadline = time.monotonic() + SOON_S
    while segment.sessions[name].begun < count and time.monotonic() < deadline:
        time.sleep(0.0005)


def follow(segment, caller_of, pool, pieces=PIECES, **options):
    """Run pieces at the same time, let in one after the other; returns what each came to."""
    futures, count = [], 0
    for number, piece in enumerate(pieces):
        keep = "last" if number == len(pieces) - 1 else "none"
        futures.append(pool.submit(segment.step, "s", piece, caller=caller_of(number), keep=keep, **options))
        count += len(piece)
        begun(segment, "s", count)
    return futures


@pytest.fixture
def pool():
    with ThreadPoolExecutor(len(PIECES)) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("combine", ["partial", "ordered"])
def test_pieces_that_overlap_have_the_bits_of_one_after_another(checkpoint, store, family, combine, pool):
    split = split_model(checkpoint(family), store(family), spread(store(family)))
    segment = split.segment
    segment.open("s", 90)
    want = [segment.step("s", piece, caller=split.caller, combine=combine) for piece in PIECES][-1]
    want = torch.cat([want, segment.step("s", torch.tensor([7]), caller=split.caller, combine=combine)])
    segment.close("s")
    segment.open("s", 90)
    story = []
    futures = follow(segment, lambda n: Slow(split.caller, n, story, n), pool, combine=combine)
    last = futures[-1].result(SOON_S)
    got = torch.cat([last, segment.step("s", torch.tensor([7]), caller=split.caller, combine=combine)])
    assert torch.equal(got, want)
    first_end = max(index for index, (what, piece, _) in enumerate(story) if (what, piece) == ("answered", 0))
    assert any(piece > 0 for _, piece, _ in story[:first_end])  # they did overlap
    assert split.board.running_before(99) == 0


def test_a_piece_of_middle_layers_follows_too(checkpoint, store, pool):
    keys = [record.key for record in store("gpt_oss").manifest.records]
    chain = chain_model(checkpoint("gpt_oss"), store("gpt_oss"), [1, 3], {key: sum(key) % 3 for key in keys})
    middle = chain.segments[1]
    hidden = [torch.randn(len(piece), 64, generator=torch.Generator().manual_seed(len(piece))) for piece in PIECES]
    middle.open("s", 80)
    want = [middle.step("s", piece, caller=chain.caller) for piece in hidden]
    middle.close("s")
    middle.open("s", 80)
    got = [future.result(SOON_S) for future in follow(middle, lambda n: Slow(chain.caller, n, []), pool, hidden)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Failing:
    """Waits, then fails."""

    def __init__(self, caller, layer, may_fail) -> None:
        self._caller, self._layer, self._may_fail = caller, layer, may_fail

    def begin(self, call):
        if call.layer < self._layer:
            return self._caller.begin(call)
        self._may_fail.wait(SOON_S)
        raise CallFailed(call.layer, (0,), call.holder, "gone")


def test_a_fault_ends_the_pieces_behind_it_and_nothing_is_left(checkpoint, store, pool):
    split = split_model(checkpoint("qwen3_moe"), store("qwen3_moe"), spread(store("qwen3_moe")))
    segment, may_fail, resting = split.segment, threading.Event(), []

    @contextmanager
    def rest():
        resting.append(True)
        if resting.count(True) == 2:
            may_fail.set()
        yield
        resting.append(False)

    segment.open("s", 90)
    callers = [split.caller, Failing(split.caller, 2, may_fail), split.caller, split.caller]
    futures = follow(segment, callers.__getitem__, pool, rest=rest)
    futures[0].result(SOON_S)
    with pytest.raises(CallFailed, match="gone"):
        futures[1].result(SOON_S)
    for future in futures[2:]:
        with pytest.raises(StepAbandoned, match="an earlier step of this session failed"):
            future.result(SOON_S)
    with pytest.raises(StepAbandoned):
        segment.step("s", torch.tensor([7]), caller=split.caller)
    assert resting.count(True) == resting.count(False) > 1
    segment.close("s")
    assert (segment.sessions.kv_used, split.board.running_before(99)) == (0, 0)


def test_a_step_waits_for_the_layer_that_it_needs_and_no_longer():
    passage, rests = Passage(), []

    @contextmanager
    def rest():
        rests.append(1)
        threading.Timer(0.01, lambda: passage.wrote(1)).start()
        yield

    passage.wrote(0)
    passage.await_layer(0, rest)
    assert not rests
    passage.await_layer(1, rest)
    assert len(rests) == 1
    passage.end(failed=True)
    with pytest.raises(StepAbandoned):
        passage.await_layer(1, rest)
    passed().await_end(rest)
    assert len(rests) == 1
