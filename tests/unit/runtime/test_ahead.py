"""What is loaded ahead by a predictor's guesses: the same tokens, and only where the link has time."""

import pytest

from runtime.ahead import learnt_from
from runtime.alone import open_alone
from runtime.errors import InvalidInput
from runtime.generation import generate
from runtime.models import open_model
from runtime.policy.prefetch import Slack
from runtime.predictors import learn, learn_uses, write_predictor
from runtime.recorder import record_trace
from runtime.recording import read_recording
from schemas.predictor import GUESS_KINDS
from tests.unit.runtime.test_recorder import Letters

PROMPT = [5, 9, 60, 8, 5, 9, 60, 8]


@pytest.fixture(scope="module")
def predictors(checkpoint, tmp_path_factory):
    import runtime.loading

    root = tmp_path_factory.mktemp("ahead")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runtime.loading, "load_tokenizer", lambda _: Letters())
        trace = record_trace(
            checkpoint("qwen3_moe"), ["a text that is learnt from, " * 8], workload="w", has_guesses=True
        )
    trace.write(root / "trace.safetensors")
    lesson = read_recording(root / "trace.safetensors").lesson()
    for kind in GUESS_KINDS:
        write_predictor(root / kind, learn(kind, lesson), model="tiny", top_k=2, tokens=len(lesson.chosen))
    write_predictor(root / "uses", learn_uses(lesson), model="tiny", top_k=2, tokens=len(lesson.chosen))
    return root


def spoken(store, **options):
    spec = open_model(store.path).spec
    whole = (
        spec.range_bytes(range(spec.num_decoder_layers)) + 64 * spec.num_decoder_layers * spec.kv_bytes_per_token_layer
    )
    budget = whole + spec.total_expert_bytes // 3
    segment = open_alone(store.path, budget=budget, max_tokens=64, **options)
    segment.residency.slack = Slack(load_s=1e3, idle_s=1e7, _is_new=False)  # as if loads were slow and layers slower
    return list(generate(segment, PROMPT, max_tokens=12)), segment.residency.counts


@pytest.mark.parametrize("kind", GUESS_KINDS)
def test_whoever_guesses_tokens_are_the_same(store, predictors, kind):
    plain, _ = spoken(store("qwen3_moe"), prefetch=False)
    guessed, counts = spoken(store("qwen3_moe"), predictor=predictors / kind)
    assert guessed == plain
    assert sum(counts.prefetched) >= sum(counts.prefetch_hits) > 0


def test_whoever_evicts_tokens_are_the_same(store, predictors):
    plain, _ = spoken(store("qwen3_moe"), prefetch=False)
    kept, counts = spoken(store("qwen3_moe"), uses=predictors / "uses", prefetch=False)
    assert kept == plain
    assert counts.evictions > 0


def test_where_the_link_has_no_time_nothing_is_loaded_ahead(store, predictors):
    segment = open_alone(store("qwen3_moe").path, max_tokens=64, predictor=predictors / "learned")
    segment.residency.slack = Slack(load_s=1e3, idle_s=1.0, _is_new=False)
    list(generate(segment, PROMPT, max_tokens=4))
    assert sum(segment.residency.counts.prefetched) == 0


def test_a_predictor_of_another_model_is_refused(store, predictors):
    spec = open_model(store("mixtral").path).spec.model_copy(update={"experts": 16})
    with pytest.raises(InvalidInput, match="learn one from traces of this model"):
        learnt_from(predictors / "learned", spec)


def test_a_trace_may_hold_what_gates_would_have_guessed(predictors):
    recording = read_recording(predictors / "trace.safetensors")
    assert recording.has_guesses
    assert [batch.guesses is None for batch in recording.batches[: recording.layers]] == [False] * 3 + [True]
