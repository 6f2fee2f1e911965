"""Several sequences through one cache, exact and with substitution: experts are read once for all, memory is given back."""

import pytest
import torch

from runtime.engine import Segment
from runtime.errors import ContextFull, KvBudgetExceeded
from runtime.generation import generate
from runtime.importance import Importance
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import MassBudget
from tests.families import make_checkpoint, make_store
from tests.unit.runtime.test_cached import cached, resident, trunk_and_board

PROMPTS = ([5, 9, 200, 17], [3, 1, 4], [90, 91, 92, 93, 94])
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("together")
    path = make_checkpoint("qwen3_moe", root / "model")
    store = make_store(path, root / "store")
    return store, *trunk_and_board(path, store)


def importance(layers, share):
    """Gives up to a share of the router's mass from the first token on."""
    allowance = Allowance(budget=10.0, nll=(1.0,) * layers, nll_per_mass=(1.0,) * layers, horizon=1000)
    account = Controller(allowance)
    account.advance(1, range(layers), {})
    return Importance(MassBudget((share,)), account, is_whole=False)


@pytest.fixture(params=["exact", "substituting"])
def segment(parts, request):
    """A cache of 12 of the 32 experts, for three sequences of 20 tokens."""
    store, trunk, board = parts
    given_up = importance(store.manifest.model.layers, 0.3) if request.param == "substituting" else None
    segment = Segment(trunk, cached(store, slots=12, prefetch=False), board, importance=given_up)
    segment.sessions.kv_budget = 3 * segment.kv_bytes(20)
    return segment


def begin(segment):
    rows = []
    for name, prompt in zip(NAMES, PROMPTS, strict=True):
        segment.open(name, 20)
        rows.append(segment.step(name, torch.tensor(prompt)))
    return torch.cat(rows).argmax(-1)


def test_an_expert_that_several_sequences_need_is_lent_once(segment, monkeypatch):
    """Three sequences that are the same ask for the same experts; they are read and run as for one of them."""
    lent: list[tuple[int, int]] = []
    lend, take = segment.residency.lend, segment.residency.take

    def lent_one_by_one(layer, experts, *options, **more):
        lent.extend((layer, expert) for expert in experts)
        return lend(layer, experts, *options, **more)

    def taken_at_once(layer, experts):
        copies = take(layer, experts)
        lent.extend((layer, expert) for expert in experts if copies)
        return copies

    for name in NAMES:
        segment.open(name, 20)
        segment.step(name, torch.tensor(PROMPTS[0]))
    monkeypatch.setattr(segment.residency, "lend", lent_one_by_one)
    monkeypatch.setattr(segment.residency, "take", taken_at_once)
    before = segment.counters.snapshot()
    segment.step_batch(NAMES, torch.tensor([7, 7, 7]))
    counts = segment.counters.snapshot()
    assert counts.rows - before.rows == 3 * 2 * 4
    assert len(lent) == len(set(lent)) == 2 * 4
    assert counts.local_calls - before.local_calls == 4


def test_together_they_say_what_each_says_alone(parts, segment):
    """To the token where nothing is given up; else each has what stands in for it."""
    got = [begin(segment)]
    for _ in range(6):
        got.append(segment.step_batch(NAMES, got[-1]).argmax(-1))
    counts = segment.counters.snapshot()
    assert counts.tokens == sum(map(len, PROMPTS)) + 6 * 3
    if segment.importance is None:
        store, trunk, board = parts
        alone = Segment(trunk, resident(store), board)
        want = [list(generate(alone, prompt, max_tokens=7, stop_ids=frozenset())) for prompt in PROMPTS]
        assert torch.stack(got, dim=1).tolist() == want
        assert counts.replaced_rows == 0
    else:
        assert 0 < counts.replaced_rows < counts.rows


def test_what_ends_gives_its_memory_back_and_limits_hold(segment):
    begin(segment)
    slots = segment.residency.used()
    with pytest.raises(KvBudgetExceeded):
        segment.open("d", 20)
    with pytest.raises(ContextFull, match="21 tokens"):
        segment.step("a", torch.ones(17, dtype=torch.int64))
    segment.step_batch(NAMES, torch.tensor([7, 8, 9]))  # which changed nothing for the others
    answer = generate(segment, [5, 6], max_tokens=3, stop_ids=frozenset())
    segment.close("b")  # cancelled: there is room for another
    next(answer)
    answer.close()
    segment.open("d", 20)
    segment.step_batch(["a", "c"], torch.tensor([7, 9]))
    for name in ("a", "c", "d"):
        segment.close(name)
    assert (segment.sessions.kv_used, len(segment.sessions)) == (0, 0)
    assert segment.residency.used() == slots  # the cache's slots are its own
