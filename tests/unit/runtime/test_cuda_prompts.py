"""Prompts run by their own operations, with experts computed together as they come: plain torch where no device is."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.comebacks import Origin
from runtime.copies import Copy
from runtime.cuda import prompt_reference
from runtime.cuda.prompts import DevicePrompts
from runtime.engine import Segment
from runtime.errors import DamagedRecord, ExpertLost
from runtime.generation import generate
from runtime.records import CheckpointExpert
from tests.unit.runtime.test_cuda_decode import CAPTURED, apart, opened

PROMPT = torch.randint(2, 250, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def with_prompts(segment: Segment) -> Segment:
    """Let a segment whose steps are captured run prompts likewise."""
    assert segment.captured is not None
    segment.prompts = DevicePrompts(segment.captured, prompt_reference)
    return segment


def whole(path: Path) -> Segment:
    """Open a model whose experts are all in slots, loaded before."""
    segment = opened(path)
    spec = segment.trunk.spec
    for layer in range(spec.layers):
        list(segment.residency.lend(layer, range(spec.experts)))
    return with_prompts(segment)


def answered(segment: Segment, count: int = 6, prompt: list[int] = PROMPT) -> list[int]:
    return list(generate(segment, prompt, max_tokens=count, stop_ids=frozenset()))


def logits_of(segment: Segment, *pieces: int) -> torch.Tensor:
    """Run the prompt in pieces of such sizes; returns the logits of each token, [T, V]."""
    segment.open("logits", len(PROMPT))
    made = [segment.step("logits", piece, keep="all") for piece in torch.tensor(PROMPT).split(list(pieces))]
    segment.close("logits")
    return torch.cat(made)


@pytest.mark.parametrize("family", CAPTURED)
def test_with_all_experts_in_slots(checkpoint: Any, family: str) -> None:
    path = checkpoint(family)
    ordinary, segment = opened(path, is_captured=False), whole(path)
    for pieces in ((40,), (25, 15)):
        torch.testing.assert_close(logits_of(segment, *pieces), logits_of(ordinary, *pieces))
    assert answered(segment) == answered(ordinary)
    got, want = segment.counters.snapshot(), ordinary.counters.snapshot()
    assert np.array_equal(got.routed, want.routed)
    assert (got.rows, got.events, got.tokens, got.local_calls) == (
        want.rows,
        want.events,
        want.tokens,
        want.local_calls,
    )
    assert got.tier_rows == {"device": got.rows}
    assert not segment.residency.inside.shelf.is_frozen


@pytest.mark.parametrize("family", CAPTURED)
@pytest.mark.parametrize(("slots", "host"), [(24, None), (7, None), (3, None), (24, 9)])
def test_experts_come_while_others_are_computed(checkpoint: Any, family: str, slots: int, host: int | None) -> None:
    path = checkpoint(family)
    ordinary, segment = opened(path, is_captured=False), with_prompts(apart(path, slots=slots, host=host))
    for pieces in ((40,), (25, 15)):
        torch.testing.assert_close(logits_of(segment, *pieces), logits_of(ordinary, *pieces))
    assert answered(segment) == answered(ordinary)
    got, want = segment.counters.snapshot(), ordinary.counters.snapshot()
    assert np.array_equal(got.routed, want.routed)
    assert (got.rows, sum(got.tier_rows.values())) == (want.rows, want.rows)
    check_books(segment, slots)
    tiers = segment.residency.counts
    if slots == 24:
        assert sum(tiers.prefetch_hits) > 0.5 * sum(tiers.prefetched) > 0
        assert sum(tiers.loads) < 3 * 32  # what is here is used


def check_books(segment: Segment, slots: int) -> None:
    """Nothing is in use or on its way any more, and every slot is either free or a copy's."""
    shelf, changed = segment.residency.inside.shelf, segment.residency.inside.changed

    def on_device() -> list[Copy]:
        return [copy for copy in shelf.copies.values() if copy.tier == "device"]

    with changed:  # other threads may still read what was begun ahead
        assert changed.wait_for(lambda: all(copy.is_ready for copy in on_device()), 5)
    assert not any(copy.users or copy.launch for copy in on_device())
    assert len({copy.slot for copy in on_device()} | set(shelf.free["device"])) == slots
    assert segment.residency.used()["device"] == len(on_device()) * segment.residency.layout.bytes


def test_what_the_processor_computes_meanwhile(checkpoint: Any) -> None:
    path = checkpoint("qwen3_moe")
    want = logits_of(opened(path, is_captured=False), 40)
    segment = with_prompts(apart(path, slots=12))
    logits_of(segment, 40)  # brings records to host memory
    for tokens in (1, 64):
        segment.residency.ways.processor.observe(tokens, 1e-9)
    segment.residency.inside.shelf.comebacks.observe(Origin("host"), 10.0)
    torch.testing.assert_close(logits_of(segment, 40), want)
    assert sum(segment.residency.counts.found["host"]) > 0
    check_books(segment, 12)


def test_a_lost_expert_ends_the_prompt_and_nothing_else(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint("qwen3_moe")
    segment = with_prompts(apart(path, slots=24, host=4))
    want = answered(segment)
    read = CheckpointExpert.read_into

    def failing(self: CheckpointExpert, parts: Any, *, check: bool) -> None:
        if self.key[0] == 2:
            raise DamagedRecord("a disk", "it was lost")
        read(self, parts, check=check)

    segment.residency.set_budget("device", 2 * segment.residency.layout.bytes)
    segment.residency.set_budget("device", 24 * segment.residency.layout.bytes)
    monkeypatch.setattr(CheckpointExpert, "read_into", failing)
    with pytest.raises(ExpertLost):
        answered(segment)
    check_books(segment, 24)
    monkeypatch.setattr(CheckpointExpert, "read_into", read)
    assert answered(segment) == want


def test_steps_that_are_not_for_it_go_the_ordinary_way(checkpoint: Any) -> None:
    path = checkpoint("qwen3_moe")
    segment = with_prompts(opened(path, slots=7))  # both memories are computed from: no device is apart
    assert answered(segment) == answered(opened(path, is_captured=False))
    ordered = whole(path)
    want = opened(path, is_captured=False)
    for each in (ordered, want):
        each.open("ordered", 64)
    got = [each.step("ordered", torch.tensor(PROMPT), combine="ordered") for each in (ordered, want)]
    assert torch.equal(*got)


def test_prompts_and_tokens_of_other_sessions_at_once(checkpoint: Any) -> None:
    path = checkpoint("qwen3_moe")
    prompts = [PROMPT[n : n + 30] for n in range(4)]
    ordinary = opened(path, is_captured=False)
    want = [answered(ordinary, 12, prompt) for prompt in prompts]
    for segment in (with_prompts(apart(path, slots=9)), whole(path)):
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(partial(answered, segment, 12), prompts)) == want
