"""Which messages a segment takes, from whom, and what runs next."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.sessions import LEASE_S, MAX_BATCH, MAX_PIECES, Objection, Registry, Sender
from schemas.plan import Segment, TrunkPath
from schemas.sessions import OpenSession, StepHeader

A, B, C, OTHER = (Sender(node, "1") for node in "abcz")
RANGES = {(0, 1), (2, 3)}


def cut(count):
    return [slice(start, min(start + 64, count)) for start in range(0, count, 64)]


def opening(number=1, *, combine="partial", prompt=3, resumed=0, most=200, epoch=1, ingress="a", nodes="bc"):
    segments = tuple(Segment(node=node, first_layer=2 * i, last_layer=2 * i + 1) for i, node in enumerate(nodes))
    return OpenSession(
        session=f"{number:032x}", epoch=epoch, path=TrunkPath(ingress=ingress, segments=segments),
        prompt_tokens=prompt, resumed=resumed, max_tokens=most, combine=combine,
    )  # fmt: skip


def registry(node="b"):
    return Registry(node, layers=4, cut=cut)


def opened(node="b", **options):
    there = registry(node)
    there.open(A, opening(**options), 0.0, epoch=1, ranges=RANGES)
    return there


def ids(count=3, number=1):
    return StepHeader(f"{number:032x}", 0, 0, count, "ids")


def token(position, number=1):
    return StepHeader(f"{number:032x}", 0, position, 1, "token")


def hidden(position, count=1, number=1, segment=1):
    return StepHeader(f"{number:032x}", segment, position, count, "hidden", 8)


def take(there, sender, header):
    there.take(sender, header, list(range(header.position, header.position + header.count)), 0.0)


def refused(code, act):
    with pytest.raises(Objection) as caught:
        act()
    assert caught.value.code == code
    return caught.value.message


def run(there):
    """Run the next batch; returns [(session number, position, count)]."""
    batch = there.next_batch()
    if batch is None:
        return []
    for entry, step in zip(batch.entries, batch.steps, strict=True):
        there.ran(entry, step)
    return [(int(e.session, 16), s.position, s.count) for e, s in zip(batch.entries, batch.steps, strict=True)]


def test_an_open_that_cannot_be_met_is_answered_with_the_reason():
    there = registry()

    def tried(sender=A, epoch=1, ranges=RANGES, **options):
        return lambda: there.open(sender, opening(**options), 0.0, epoch=epoch, ranges=ranges)

    assert "cannot be opened by z" in refused("not_yours", tried(OTHER))
    assert "epoch 1 is not active here yet" in refused("not_ready", tried(epoch=0))
    assert "layers 0 … 1 are not run here" in refused("stale_epoch", tried(ranges={(2, 3)}))
    assert "no segment of the path is on b" in refused("refused", tried(nodes="cd"))
    assert "no way through layers" in refused("refused", tried(nodes="b"))
    assert "3 tokens to begin with in 3" in refused("refused", tried(most=3))
    assert "3 tokens to begin with" in refused("refused", tried(resumed=3))
    assert len(there) == 0


def test_opening_twice_is_harmless_and_nobody_else_gets_in():
    there = opened()
    assert there.open(A, opening(), 1.0, epoch=1, ranges=RANGES) == []
    refused("not_yours", lambda: there.open(Sender("a", "2"), opening(), 1.0, epoch=1, ranges=RANGES))
    for act in (there.close, lambda who, session: there.alive(who, session, 0.0)):
        refused("not_yours", lambda act=act: act(OTHER, opening().session))
        refused("not_yours", lambda act=act: act(Sender("a", "2"), opening().session))
        refused("unknown_session", lambda act=act: act(A, opening(7).session))
    assert len(there) == 1


def test_steps_come_from_the_node_before_and_from_nobody_else():
    first, second = opened("b"), opened("c")
    for sender in (B, C, OTHER):
        refused("not_yours", lambda sender=sender: take(first, sender, ids()))
    refused("not_yours", lambda: take(first, Sender("a", "2"), ids()))
    take(first, A, ids())
    for sender in (A, B, OTHER):
        refused("not_yours", lambda sender=sender: take(first, sender, token(3)))
    take(first, C, token(3))
    refused("not_yours", lambda: take(first, C, StepHeader(f"{1:032x}", 0, 4, 1, "hidden", 8)))
    for sender in (A, C, OTHER):
        refused("not_yours", lambda sender=sender: take(second, sender, hidden(0, 3)))
    take(second, B, hidden(0, 3))
    refused("unknown_session", lambda: take(second, B, hidden(0, 3, number=9)))
    refused("unknown_session", lambda: take(second, B, hidden(0, 3, segment=0)))


def test_steps_keep_their_order_and_the_room_that_was_reserved():
    there = opened("c", most=5)
    take(there, B, hidden(0, 3))
    take(there, B, hidden(0, 3))  # again
    refused("lost", lambda: take(there, B, hidden(4)))
    refused("context_full", lambda: take(there, B, hidden(3, 3)))
    take(there, B, hidden(3))
    take(there, B, hidden(4))
    assert [run(there) for _ in range(4)] == [[(1, 0, 3)], [(1, 3, 1)], [(1, 4, 1)], []]
    assert "4 tokens where 3 were announced" in refused("refused", lambda: take(opened("b"), A, ids(4)))


def test_a_token_before_the_prompt_is_refused_and_the_prompt_still_runs():
    there = opened("b")
    assert "within the 3 to run first" in refused("refused", lambda: take(there, C, token(0)))
    take(there, A, ids())
    assert run(there) == [(1, 0, 3)]


def test_tokens_of_an_answer_come_one_by_one():
    """Several would not fit among other answers' tokens in a batch, which all fail with it."""
    there = opened("c")
    assert "one is generated at a time" in refused("refused", lambda: take(there, B, hidden(0, 4)))
    take(there, B, hidden(0, 3))
    assert "one is generated at a time" in refused("refused", lambda: take(there, B, hidden(3, 2)))
    take(there, B, hidden(3))
    assert [run(there), run(there), run(there)] == [[(1, 0, 3)], [(1, 3, 1)], []]


def test_a_prompt_is_cut_and_what_was_generated_runs_again_as_it_did():
    partial, ordered = opened(prompt=70, resumed=2), opened(prompt=70, resumed=2, combine="ordered")
    for there in (partial, ordered):
        take(there, A, ids(70))
    assert [run(partial) for _ in range(3)] == [[(1, 0, 64)], [(1, 64, 6)], []]
    assert [run(ordered) for _ in range(5)] == [[(1, 0, 64)], [(1, 64, 4)], [(1, 68, 1)], [(1, 69, 1)], []]


def test_tokens_of_several_answers_run_together_and_prompts_in_between():
    there = registry()
    for number in (1, 2, 3, 4):
        there.open(A, opening(number, prompt=1 if number < 4 else 150), 0.0, epoch=1, ranges=RANGES)
        take(there, A, ids(1 if number < 4 else 150, number))
    assert [run(there) for _ in range(3)] == [[(1, 0, 1)], [(2, 0, 1)], [(3, 0, 1)]]
    for number in (1, 2, 3):
        take(there, C, token(1, number))
    assert run(there) == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]
    take(there, C, token(2, 1))
    take(there, C, token(2, 2))
    assert [run(there) for _ in range(4)] == [[(4, 0, 64)], [(1, 2, 1), (2, 2, 1)], [(4, 64, 64)], [(4, 128, 22)]]


def test_ordered_sums_and_other_layers_are_not_batched():
    there = Registry("b", layers=4, cut=cut)
    for number, options in ((1, {"combine": "ordered"}), (2, {}), (3, {"nodes": "cb"})):
        there.open(A, opening(number, prompt=1, **options), 0.0, epoch=1, ranges=RANGES)
    for sender, header in ((A, ids(1, 1)), (A, ids(1, 2)), (C, hidden(0, 1, number=3))):
        take(there, sender, header)
        run(there)
    for header in (token(1, 1), token(1, 2), hidden(1, 1, number=3)):
        take(there, C, header)
    assert [run(there) for _ in range(4)] == [[(1, 1, 1)], [(2, 1, 1)], [(3, 1, 1)], []]


def test_pieces_of_a_prompt_run_behind_each_other_and_tokens_after_the_one_before():
    there = opened("c", prompt=20)
    take(there, B, hidden(0, 6))
    first = there.next_batch()
    assert there.has_others  # more of the prompt is to come
    take(there, B, hidden(6, 13))
    second = there.next_batch()
    assert [batch.steps[0].position for batch in (first, second)] == [0, 6]
    take(there, B, hidden(19, 1))
    assert there.next_batch() is None  # one token: it would wait for all of the others anyway
    for batch in (first, second):
        there.ran(batch.entries[0], batch.steps[0])
    assert run(there) == [(1, 19, 1)]
    take(there, B, hidden(20, 1))
    last = there.next_batch()
    assert (last.steps[0].position, there.has_others, there.has_work) == (20, False, False)


def test_only_so_many_pieces_run_at_the_same_time():
    there = opened("b", prompt=64 * (MAX_PIECES + 2), most=900)
    take(there, A, ids(64 * (MAX_PIECES + 2)))
    batches = [there.next_batch() for _ in range(MAX_PIECES)]
    assert [batch.steps[0].position for batch in batches] == [64 * n for n in range(MAX_PIECES)]
    assert (there.next_batch(), there.has_work) == (None, False)
    there.ran(batches[0].entries[0], batches[0].steps[0])
    assert there.next_batch().steps[0].position == 64 * MAX_PIECES
    assert there.alive(A, opening().session, 1.0) == (64, True)


def test_a_session_that_nobody_asks_for_is_freed_and_one_that_is_alive_is_not():
    there = registry()
    for number in (1, 2):
        there.open(A, opening(number), 0.0, epoch=1, ranges=RANGES)
    assert there.alive(A, opening(1).session, 4.0) == (0, False)
    assert [entry.name for entry in there.expire(LEASE_S + 1)] == [f"{2:032x}.0"]
    assert len(there) == 1


def test_a_retired_range_takes_its_sessions_with_it():
    there = opened("b")
    take(there, A, ids())
    batch = there.next_batch()
    assert [entry.range for entry in there.drop(lambda entry: entry.range != (2, 3))] == [(0, 1)]
    there.ran(batch.entries[0], batch.steps[0])
    assert (len(there), there.next_batch(), batch.entries[0].is_closed) == (0, None, True)


def test_a_path_may_come_through_a_node_twice():
    there = Registry("b", layers=6, cut=cut)
    entries = there.open(A, opening(nodes="bcb"), 0.0, epoch=1, ranges={(0, 1), (4, 5)})
    assert [(e.name[-1], e.range, e.is_first, e.is_last, e.next_node) for e in entries] == [
        ("0", (0, 1), True, False, "c"),
        ("2", (4, 5), False, True, "b"),
    ]
    assert len(there) == 1


class Sessions(RuleBasedStateMachine):
    """One node in the middle of many answers: whatever comes, nothing runs twice, out of order or for a stranger."""

    def __init__(self):
        super().__init__()
        self.there = registry()
        self.now = 0.0
        self.open = {}  # number → tokens arrived
        self.ran = {}
        self.running = []

    @rule(number=st.integers(1, 6), ordered=st.booleans(), prompt=st.integers(1, 70))
    def open_one(self, number, ordered, prompt):
        message = opening(number, combine="ordered" if ordered else "partial", prompt=prompt)
        if self.there.open(A, message, self.now, epoch=1, ranges=RANGES):
            self.open[number] = self.ran[number] = 0

    @rule(number=st.integers(1, 6), sender=st.sampled_from([A, B, C, OTHER, Sender("a", "2")]))
    def begin(self, number, sender):
        known = self.there.at(f"{number:032x}")
        count = known[0].opened.prompt_tokens if known else 3
        try:
            take(self.there, sender, ids(count, number))
        except Objection:
            assert sender != A or number not in self.open
        else:
            assert sender == A
            self.open[number] = max(self.open[number], count)

    @rule(number=st.integers(1, 6), sender=st.sampled_from([A, C, OTHER]), skip=st.sampled_from([-1, 0, 0, 0, 1]))
    def sample(self, number, sender, skip):
        position = max(0, self.open.get(number, 0) + skip)
        try:
            take(self.there, sender, token(position, number))
        except Objection:
            known = self.there.at(f"{number:032x}")
            assert sender != C or not known or skip > 0 or not known[0].opened.prompt_tokens <= position < 200
        else:
            assert sender == C
            self.open[number] = max(self.open[number], position + 1)

    @rule()
    def start(self):
        batch = self.there.next_batch()
        if batch is not None:
            assert len(batch.entries) <= MAX_BATCH
            assert len({entry.range for entry in batch.entries}) == 1
            if len(batch.entries) > 1:
                assert all(step.count == 1 for step in batch.steps)
                assert all(entry.opened.combine == "partial" for entry in batch.entries)
            self.running.append(batch)

    @rule()
    def end(self):
        if self.running:
            batch = self.running.pop(0)
            for entry, step in zip(batch.entries, batch.steps, strict=True):
                self.there.ran(entry, step)
                number = int(entry.session, 16)
                if not entry.is_closed:
                    assert step.position == self.ran[number]
                    self.ran[number] += step.count

    @rule(number=st.integers(1, 6), sender=st.sampled_from([A, B, OTHER]))
    def close(self, number, sender):
        if number in self.open and sender == A:
            assert len(self.there.close(sender, f"{number:032x}")) == 1
            del self.open[number], self.ran[number]
        else:
            wrong = "unknown_session" if number not in self.open else "not_yours"
            refused(wrong, lambda: self.there.close(sender, f"{number:032x}"))

    @rule(seconds=st.floats(0, 3), alive=st.sets(st.integers(1, 6)))
    def wait(self, seconds, alive):
        self.now += seconds
        for number in alive & self.open.keys():
            self.there.alive(A, f"{number:032x}", self.now)
        for entry in self.there.expire(self.now):
            number = int(entry.session, 16)
            assert number not in alive
            del self.open[number], self.ran[number]

    @invariant()
    def knows_what_is_open(self):
        assert len(self.there) == len(self.open)
        for number, arrived in self.open.items():
            (entry,) = self.there.at(f"{number:032x}")
            assert entry.done == self.ran[number] <= entry.arrived == arrived
            in_line = sum(step.count for step in entry.in_line)
            under_way = sum(
                s.count for b in self.running for e, s in zip(b.entries, b.steps, strict=True) if e is entry
            )
            assert entry.done + under_way + in_line == arrived


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prompt_of_this_node_alone_is_cut_otherwise():
    for nodes, counts in (("bc", [64, 36]), ("b", [100])):
        there = Registry("b", layers=2 * len(nodes), cut=cut, cut_alone=lambda count: [slice(0, count)])
        there.open(A, opening(prompt=100, nodes=nodes), 0.0, epoch=1, ranges=RANGES)
        take(there, A, ids(100))
        (entry,) = there.snapshot()
        assert [step.count for step in entry.in_line] == counts
