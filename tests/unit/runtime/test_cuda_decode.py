"""Steps that look their slots up by themselves, run with plain torch where there is no device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.alone import expert_sources, open_alone
from runtime.copies import Copy
from runtime.cuda import reference
from runtime.cuda.decode import CapturedDecode
from runtime.cuda.fetched import DeviceStep
from runtime.cuda.parts import step_parts
from runtime.cuda.runners import States
from runtime.engine import Segment
from runtime.errors import ContextFull, DamagedRecord, ExpertLost
from runtime.generation import generate
from runtime.importance import Importance
from runtime.loading import load_trunk
from runtime.models import open_model
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import MassBudget
from runtime.records import CheckpointExpert
from runtime.routing import EpochBoard, Routing
from runtime.shelf import Shelf
from runtime.slots import Caching, Residency

CAPTURED = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe")
PROMPT = [5, 17, 99, 3, 42, 7]


def apart(path: Path, *, slots: int, host: int | None = None, layers: tuple[int, int | None] = (0, None)) -> Segment:
    """Open layers whose experts are computed from so many slots only, to which they come from host memory."""
    model = open_model(path)
    spec, room = model.spec, model.layout.bytes
    residency = Residency(
        model.layout,
        {"device": slots * room, "host": (spec.layers * spec.experts if host is None else host) * room},
        caching=Caching(spec.layers, spec.experts),
        is_apart=True,
    )
    for key, source in expert_sources(path, model).items():
        residency.place(key, source)
    board = EpochBoard(Routing.all_local(1, layers=spec.layers, experts=spec.experts))
    segment = Segment(load_trunk(path, first_layer=layers[0], last_layer=layers[1]), residency, board)
    parts = step_parts(segment.trunk, residency.layout)
    assert parts is not None
    segment.captured = CapturedDecode(parts, residency, reference)
    return segment


def opened(path: Path, *, slots: int | None = None, is_captured: bool = True, **options: Any) -> Segment:
    """Open a model with room for so many experts, whose steps are captured with plain torch."""
    segment = open_alone(path, max_tokens=64, **options)
    spec = segment.trunk.spec
    if slots is not None:
        budget = sum(segment.residency.budgets.values()) - spec.total_expert_bytes + slots * spec.expert_bytes
        segment.residency.set_budget("device", budget)
    if is_captured:
        parts = step_parts(segment.trunk, segment.residency.layout)
        assert parts is not None
        segment.captured = CapturedDecode(parts, segment.residency, reference)
    return segment


@pytest.mark.parametrize("family", CAPTURED)
@pytest.mark.parametrize("slots", [None, 7, 3])
def test_tokens_are_those_of_the_ordinary_way(checkpoint: Any, family: str, slots: int | None) -> None:
    path = checkpoint(family)
    want = list(generate(opened(path, is_captured=False), PROMPT, max_tokens=20, stop_ids=frozenset()))
    segment = opened(path, slots=slots)
    assert list(generate(segment, PROMPT, max_tokens=20, stop_ids=frozenset())) == want
    counts, tiers = segment.counters.snapshot(), segment.residency.counts
    assert counts.rows == counts.routed.sum() == (len(PROMPT) + 19) * 4 * 2
    assert sum(counts.tier_rows.values()) == counts.rows
    assert (sum(tiers.loads) > 60) == (slots is not None)


def batched(segment: Segment, count: int) -> list[list[int]]:
    """Decode two sessions of different lengths together, greedily."""
    prompts = {"a": PROMPT, "b": PROMPT[:3]}
    last = []
    for name, prompt in prompts.items():
        segment.open(name, 32)
        last.append(int(segment.step(name, torch.tensor(prompt))[-1].argmax()))
    made = [[token] for token in last]
    for _ in range(count):
        last = segment.step_batch(list(prompts), torch.tensor(last)).argmax(-1).tolist()
        for answer, token in zip(made, last, strict=True):
            answer.append(token)
    return made


@pytest.mark.parametrize("family", CAPTURED)
def test_several_sessions_in_one_step(checkpoint: Any, family: str) -> None:
    path = checkpoint(family)
    want = batched(opened(path, is_captured=False), 10)
    assert batched(opened(path, slots=7), 10) == want


@pytest.mark.parametrize("family", CAPTURED)
def test_logits_are_rounded_where_the_ordinary_way_rounds(checkpoint: Any, family: str) -> None:
    ordinary, captured = (opened(checkpoint(family), is_captured=own, dtype="bfloat16") for own in (False, True))
    for number, token in enumerate(PROMPT):
        answers = []
        for segment in (ordinary, captured):
            if not number:
                segment.open("a", 32)
                segment.step("a", torch.tensor(PROMPT))
            answers.append(segment.step_batch(["a"], torch.tensor([token])).double())
        assert (answers[1] - answers[0]).norm() < 2e-3 * answers[0].norm()  # one rounding too few is worse
    assert captured.captured is not None
    assert sum(captured.captured.services.values()) == len(PROMPT)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_ranges_of_layers_in_a_row(checkpoint: Any, family: str) -> None:
    path = checkpoint(family)
    want = list(generate(opened(path, is_captured=False), PROMPT, max_tokens=10, stop_ids=frozenset()))
    segments = [apart(path, slots=12, layers=layers) for layers in ((0, 0), (1, 3))]
    made, inputs = [], torch.tensor(PROMPT)
    for segment in segments:
        segment.open("a", 32)
    while len(made) < 10:
        for segment in segments:
            inputs = segment.step_batch(["a"], inputs) if made else segment.step("a", inputs)
        inputs = inputs[-1:].argmax(-1)
        made.append(int(inputs))
    assert made == want
    assert [segment.captured.services["device"] for segment in segments if segment.captured] == [9, 9]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_a_layer_that_lacks_experts_may_get_others(checkpoint: Any, family: str) -> None:
    path = checkpoint(family)
    loads = []
    for is_exact in (True, False):
        segment = opened(path, slots=7)
        if not is_exact:
            allowance = Allowance(budget=1.0, nll=(1.0,) * 4, nll_per_mass=(1.0,) * 4)
            segment.importance = Importance(MassBudget((0.5,) * 4), Controller(allowance), is_whole=False)
        list(generate(segment, PROMPT, max_tokens=20, stop_ids=frozenset()))
        counts = segment.counters.snapshot()
        assert (counts.replaced_rows > 0) != is_exact
        loads.append(sum(segment.residency.counts.loads))
    assert loads[1] < loads[0]


@pytest.mark.parametrize("is_apart", [False, True])
def test_an_expert_that_is_lost_ends_the_step_and_nothing_else(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, is_apart: bool
) -> None:
    path = checkpoint("qwen3_moe")
    segment = apart(path, slots=7, host=4) if is_apart else opened(path, slots=7)
    want = list(generate(segment, PROMPT, max_tokens=8, stop_ids=frozenset()))
    read = CheckpointExpert.read_into

    def failing(self: CheckpointExpert, parts: Any, *, check: bool) -> None:
        raise DamagedRecord("a disk", "it was lost")

    tokens = generate(segment, PROMPT, max_tokens=8, stop_ids=frozenset())
    next(tokens)
    monkeypatch.setattr(CheckpointExpert, "read_into", failing)
    with pytest.raises(ExpertLost):
        list(tokens)
    monkeypatch.setattr(CheckpointExpert, "read_into", read)
    assert list(generate(segment, PROMPT, max_tokens=8, stop_ids=frozenset())) == want


@pytest.mark.parametrize("family", CAPTURED)
@pytest.mark.parametrize(("slots", "host"), [(14, None), (24, 9), (7, None), (3, 9)])
def test_a_device_that_brings_experts_by_itself(checkpoint: Any, family: str, slots: int, host: int | None) -> None:
    path = checkpoint(family)
    want = list(generate(opened(path, is_captured=False), PROMPT, max_tokens=30, stop_ids=frozenset()))
    segment = apart(path, slots=slots, host=host)
    for _ in range(2):
        assert list(generate(segment, PROMPT, max_tokens=30, stop_ids=frozenset())) == want
    assert segment.captured is not None
    assert segment.captured.services == {"none": 0, "host": 0, "device": 58}
    counts, tiers = segment.counters.snapshot(), segment.residency.counts
    assert counts.rows == counts.routed.sum() == sum(counts.tier_rows.values()) == 2 * (len(PROMPT) + 29) * 4 * 2
    assert sum(tiers.loads) + sum(map(sum, tiers.found.values())) >= 2 * 29 * 4 * 2
    held, used = segment.residency.inside.shelf, segment.residency.used()
    on_device = [copy for copy in held.copies.values() if copy.tier == "device"]
    assert used["device"] == len(on_device) * segment.residency.layout.bytes
    assert len({copy.slot for copy in on_device} | set(held.free["device"])) == slots
    if slots == 14:
        for _ in range(20):  # one guess of five comes true, and which are made hangs on what took how long
            if sum(tiers.prefetch_hits):
                break
            assert list(generate(segment, PROMPT, max_tokens=30, stop_ids=frozenset())) == want
        assert sum(tiers.prefetched) >= sum(tiers.prefetch_hits) > 0


@pytest.mark.parametrize("host", [2, 5])
def test_what_a_layer_finds_in_host_memory_makes_no_room_for_what_it_lacks_there(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, host: int
) -> None:
    wanted, given_up = set[Any](), list[Any]()
    bring, evict = DeviceStep._bring_to_host, Shelf.evict

    def bring_noted(step: DeviceStep, number: int, experts: Sequence[int]) -> None:
        wanted.update((number, expert) for expert in experts)
        bring(step, number, experts)
        wanted.clear()

    def evict_noted(shelf: Shelf, copy: Copy, *, give_back: bool = False) -> None:
        if copy.tier == "host" and copy.key in wanted:
            given_up.append(copy.key)
        evict(shelf, copy, give_back=give_back)

    monkeypatch.setattr(DeviceStep, "_bring_to_host", bring_noted)
    monkeypatch.setattr(Shelf, "evict", evict_noted)
    segment = apart(checkpoint("qwen3_moe"), slots=14, host=host)
    assert len(list(generate(segment, PROMPT, max_tokens=50, stop_ids=frozenset()))) == 50
    assert not given_up


def test_a_device_brings_experts_for_several_sessions(checkpoint: Any) -> None:
    path = checkpoint("qwen3_moe")
    want = batched(opened(path, is_captured=False), 10)
    segment = apart(path, slots=12)
    assert batched(segment, 10) == want
    assert segment.captured is not None
    assert segment.captured.services["device"] == 10


@pytest.mark.parametrize("slots", [12, 14])
def test_a_last_layer_is_brought_what_spares_came_back(checkpoint: Any, slots: int) -> None:
    """The slot of a guess that proved wrong is given to the device again before the last layer needs it."""
    path = checkpoint("qwen3_moe")
    ordinary = opened(path, is_captured=False)
    for first in range(0, 84, 7):
        prompt = [(first + 3 * number) % 96 for number in range(5)]
        want = list(generate(ordinary, prompt, max_tokens=50, stop_ids=frozenset()))
        assert list(generate(apart(path, slots=slots), prompt, max_tokens=50, stop_ids=frozenset())) == want


@pytest.mark.parametrize("slots", [None, 12])
def test_a_device_goes_on_with_its_own_choice(checkpoint: Any, slots: int | None) -> None:
    path = checkpoint("qwen3_moe")
    want = list(generate(opened(path, is_captured=False), PROMPT, max_tokens=12, stop_ids=frozenset()))
    segment = opened(path) if slots is None else apart(path, slots=slots)
    segment.open("a", len(PROMPT) + 11)
    made = [int(segment.step("a", torch.tensor(PROMPT))[-1].argmax())]
    while len(made) < 12:  # how many come at once depends on how long they take
        made += segment.go_on("a", made[-1], 12 - len(made))
        if len(made) < 10:
            made.append(int(segment.step_batch(["a"], torch.tensor(made[-1:])).argmax()))
    assert made == want
    counts = segment.counters.snapshot()
    assert (counts.steps, counts.tokens, counts.rows) == (12, len(PROMPT) + 11, (len(PROMPT) + 11) * 4 * 2)
    assert segment.residency.inside.shelf.is_frozen is False
    with pytest.raises(ContextFull):
        segment.go_on("a", made[-1], 1)
    stop = want.index(want[6]) + 1
    assert list(generate(segment, PROMPT, max_tokens=12, stop_ids=frozenset({want[6]}))) == want[:stop]


def test_steps_that_others_choose_for_are_run_one_by_one(checkpoint: Any) -> None:
    segment = opened(checkpoint("qwen3_moe"), is_captured=False)
    segment.open("a", 8)
    segment.step("a", torch.tensor(PROMPT))
    assert segment.go_on("a", 3, 2) == []
    assert segment.step("a", torch.tensor([3])).shape[0] == 1


def in_turns(segment: Segment, count: int) -> list[int]:
    """Decode two sessions greedily, together and each on its own by turns."""
    last = {}
    for name, prompt in {"a": PROMPT, "b": PROMPT[:3]}.items():
        segment.open(name, 64)
        last[name] = int(segment.step(name, torch.tensor(prompt))[-1].argmax())
    made = []
    for turn in range(count):
        names = (["a", "b"], ["a"], ["b"])[turn % 3]
        answers = segment.step_batch(names, torch.tensor([last[name] for name in names])).argmax(-1).tolist()
        last.update(zip(names, answers, strict=True))
        made += answers
    return made


@pytest.mark.parametrize("is_apart", [False, True])
def test_steps_of_other_sizes_know_what_changed_meanwhile(checkpoint: Any, is_apart: bool) -> None:
    path = checkpoint("qwen3_moe")
    want = in_turns(opened(path, is_captured=False), 12)
    segment = apart(path, slots=12) if is_apart else opened(path, slots=12)
    assert in_turns(segment, 12) == want
    assert segment.captured is not None
    assert segment.captured.services["device" if is_apart else "host"] == 12


def test_experts_put_in_host_memory_beside_the_device_are_brought_by_it(checkpoint: Any) -> None:
    path = checkpoint("qwen3_moe")
    want = list(generate(opened(path, is_captured=False), PROMPT, max_tokens=8, stop_ids=frozenset()))
    segment = apart(path, slots=12)
    for expert in range(4):
        key = (0, expert)
        segment.residency.put(key, "host", segment.residency.record(key))
    assert list(generate(segment, PROMPT, max_tokens=8, stop_ids=frozenset())) == want
    assert segment.captured is not None
    assert segment.captured.services["device"] == 7


def test_where_keys_lie_is_told_anew_for_another_session() -> None:
    """Found on a GPU: what had been told of a session that was over was taken for that of the next one."""
    seen = set()
    for _ in range(20):  # Python gives the memory of what is freed to the next of its kind
        states = States([], np.zeros((0, 2), dtype=np.int64), 0)
        seen.add(states.number)
        del states
    assert len(seen) == 20
