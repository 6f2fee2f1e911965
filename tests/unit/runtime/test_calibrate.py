"""Calibration: text run in decode order against caches and placements, and the shares that a budget buys."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agent.calibrating import calibrate as command
from runtime.calibrate import calibrate, policy_of, require_text
from runtime.errors import InvalidInput
from runtime.forcing import WARMUP, Bench, Cached, Supply, cut_pieces
from runtime.policy.cache import Cache
from runtime.policy.eviction import EVICTIONS
from runtime.policy.quality import Allowance, Controller
from runtime.policy.routing import Exact, LeaveOut
from runtime.policy.uses import LearnedUses
from runtime.predictors import Lesson, learn_uses, write_predictor
from runtime.rounding import held_in
from schemas.calibration import Situation, load_calibration
from schemas.checkpoint import read_checkpoint
from schemas.files import InvalidFile
from schemas.plan import write_plan
from tests.demo import DEMO, TEXT
from tests.recordings import E, K, L, planted
from tests.small_plans import path, plan_through, replicas, route


def test_pieces_share_a_token_with_their_neighbours():
    pieces = cut_pieces([[1, 2, 3], [4, 5, 6, 7]], window=2, max_tokens=5)
    assert pieces.tolist() == [[1, 2, 3], [3, 4, 5]]
    assert cut_pieces([[1, 2]], window=2, max_tokens=9).shape == (0, 3)


@given(st.sampled_from(["steady", "lru"]), st.integers(2, 6), st.integers(0, 1000))
def test_the_cache_evicts_as_its_policy_does(name, capacity, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(8) for _ in range(40)])
    quick = Cached(8, capacity, 2, is_lru=name == "lru")
    eviction = EVICTIONS[name](1, 8)
    slow = Cache(1, 8, capacity, eviction, per_layer=True)
    for half in (ids[:20], ids[20:]):
        quick.begin(half, np.ones(half.shape))
        for token, ranked in enumerate(half):
            eviction.observe(0, ranked[None], np.ones((1, 8)), 2)
            loads = slow.request(0, ranked[:2]).loads
            assert quick.request(token, ranked[:2].tolist()) == len(loads)
            assert (quick.resident == slow.resident).all()


def test_a_layers_cache_evicts_by_learnt_uses_as_a_residency_does():
    uses, text = learn_uses(planted(300)), planted(40, seed=3).chosen
    held = Supply(L, E, 3, uses=uses).holding(K, is_lru=False)
    eviction = LearnedUses(uses)
    slow = Cache(L, E, 3, eviction, per_layer=True)
    for layer in range(L):  # a text runs layer by layer here, token by token there
        held[layer].begin(text[:, layer], np.ones((len(text), K)))
    for token, layers in enumerate(text):
        for layer, chosen in enumerate(layers):
            eviction.observe(layer, chosen[None], np.ones((1, K)), K)
            loads = slow.request(layer, chosen).loads
            assert held[layer].request(token, chosen.tolist()) == len(loads)
            assert (held[layer].resident == slow.resident_of(layer)).all()


def test_exact_runs_change_no_prediction(bench):
    plain = bench.model(input_ids=bench.pieces[:, :-1], use_cache=False).logits.log_softmax(-1)
    want = -plain.gather(-1, bench.pieces[:, 1:, None])[..., 0].mean(1)
    run = bench.run(Exact(), is_lru=True)
    np.testing.assert_allclose(run.nll, want.numpy(), rtol=1e-5)
    assert 0 < run.waits.sum() < 8
    assert not run.lost.any()


def test_more_room_or_more_given_up_waits_less(bench):
    exact, some, much = (bench.run(policy_of([share], is_whole=False)) for share in (0.0, 0.02, 0.2))
    assert exact.waits.sum() > some.waits.sum() > much.waits.sum()
    assert 0 == exact.lost.sum() < some.lost.sum() < much.lost.sum()
    roomy = Bench(bench.model, bench.pieces, Supply(4, 16, 12), 2).run(Exact())
    assert roomy.waits.sum() < exact.waits.sum()


def test_a_placement_waits_once_for_a_layer_and_gives_up_all_or_nothing(bench):
    masks = np.zeros((4, 16), dtype=bool)
    masks[:, ::2] = True
    placed = Bench(bench.model, bench.pieces, Supply(4, 16, masks=masks), 2)
    exact = placed.run(Exact(), keep=True)
    assert (exact.waits <= 1).all()
    spared = placed.run(policy_of([0.1], is_whole=True))
    assert spared.waits.sum() < exact.waits.sum()
    assert spared.divergence > 0
    left_out = placed.run(LeaveOut((0.1,)))
    assert 0 < left_out.waits.sum() < exact.waits.sum()
    assert left_out.lost.sum() > 0
    everything = placed.run(policy_of([1e9], is_whole=True))
    assert not everything.waits.any()


def test_runs_diverge_from_what_was_kept_last(bench):
    twice = replace(bench, pieces=bench.pieces[:2])
    twice.run(Exact(), keep=True)
    with held_in(bench.model, "int4"):
        assert twice.run(Exact()).divergence > 1e-4
        twice.run(Exact(), keep=True)
        assert twice.run(Exact()).divergence == pytest.approx(0, abs=1e-5)


def test_calibration_finds_more_room_in_larger_budgets(bench):
    seen = []
    found = calibrate(
        bench,
        model="demo",
        situation=Situation(capacity=6, eviction="steady"),
        budgets=[0.6, 0.3],
        progress=lambda done, total: seen.append((done, total)),
    )
    small, large = found.settings
    assert (small.budget, large.budget) == (0.3, 0.6)
    assert all(a <= b for a, b in zip(small.shares, large.shares, strict=True))
    assert sum(small.nll) == pytest.approx(math.log1p(0.3))
    assert small.low <= small.rise <= small.high
    assert large.waits_share <= small.waits_share < 1
    assert found.setting(0.4) == small
    assert found.setting(0.2) is None
    assert found.warmup == WARMUP
    assert np.shape(found.prices) == (4, 16)
    assert np.mean(found.prices) == pytest.approx(1)
    assert np.shape(found.token_prices.given)[:2] == (4, 32)
    assert found.stand_in < 1
    assert small.slope > 0
    assert seen[0][0] == 1


def test_probes_find_text_dearer_than_its_calibration(bench):
    policy = policy_of([0.05], is_whole=False)
    unscaled = bench.run(policy)
    runs = {}
    for slope in (math.inf, 1e-6):
        account = Controller(Allowance(0.01, (0.01,), (1.0,), slope=slope, probe_every=8))
        runs[slope] = bench.run(policy, account=account)
        assert account.scale == (1 if slope == math.inf else pytest.approx(0, abs=0.01))
    like, dear = runs.values()
    assert (like.nll == unscaled.nll).all(), "probes change nothing"
    assert len(like.slopes) == math.ceil(len(bench.pieces) / 8)
    assert min(like.slopes) > 0
    assert dear.waits.sum() > like.waits.sum()


def test_budgets_pay_for_the_precision_in_which_experts_are_held(bench, caplog):
    held = Situation(capacity=6, eviction="steady", precision="int4")
    before = [weights.clone() for weights in bench.model.parameters()]
    bench = replace(bench, pieces=bench.pieces[:8])
    found = calibrate(bench, model="demo", situation=held, budgets=[0.6, 1e-9])
    assert all(map(torch.equal, before, bench.model.parameters()))
    assert [each.budget for each in found.settings] == [0.6]
    assert "holding every expert in int4 costs" in caplog.text
    (setting,) = found.settings
    assert 0 < sum(setting.nll) < math.log1p(0.6), "the precision's part is not there to be spent"
    assert setting.low <= setting.rise <= 0.6
    with pytest.raises(InvalidInput, match=r"holding every expert in int4 costs .* alone; give a budget above that"):
        calibrate(bench, model="demo", situation=held, budgets=[1e-9])


def test_a_budget_that_cannot_be_spent_is_not_refused(bench):
    roomy = replace(bench, supply=Supply(4, 16, 15))
    found = calibrate(roomy, model="demo", situation=Situation(capacity=15), budgets=[0.02])
    assert max(found.settings[0].shares) < 1, "no more is allowed than text was run with"


def test_too_little_text_is_refused_with_how_much_is_needed(bench):
    with pytest.raises(
        InvalidInput, match=r"1000 tokens of text are too few for a budget of 0.50%.*about 16000 tokens"
    ):
        require_text(0.01, 0.005, tokens=1000)
    few = Bench(bench.model, bench.pieces[:3], bench.supply, 2)
    with pytest.raises(InvalidInput, match="3 pieces of 64 tokens"):
        calibrate(few, model="demo", situation=Situation(capacity=6))


def test_the_command_writes_what_agents_read(tmp_path):
    output = tmp_path / "c.json"
    options = ["--text", str(TEXT), "--capacity", "6", "--budget", "50 %", "--window", "64", "--tokens", "1024"]
    options += ["--precision", "none"]
    result = CliRunner().invoke(command, [str(DEMO), *options, "-o", str(output), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["situation"]["capacity"] == 6
    found = load_calibration(output)
    assert found.settings[0].budget == 0.5
    output.write_text(found.model_copy(update={"layers": 5}).model_dump_json())
    with pytest.raises(InvalidFile, match=r"settings\[0\].shares: has 4 numbers, the model has 5 layers"):
        load_calibration(output)
    output.write_text(found.model_copy(update={"prices": (*found.prices[:3], (1.0,))}).model_dump_json())
    with pytest.raises(InvalidFile, match=r"prices\[3\]: has 1 numbers, the model has 16 experts"):
        load_calibration(output)
    tokens = found.token_prices
    for what, said in (
        ({"bias": tokens.bias[:3]}, r"token_prices.bias: has 3 layers, the model has 4"),
        ({"given": (tokens.given[0][1:], *tokens.given[1:])}, r"token_prices.given\[0\]: has 31 inputs, expected two"),
        ({"out": (tokens.out[0][1:], *tokens.out[1:])}, r"token_prices: has layers of 15, 16 hidden units"),
    ):
        broken = found.model_copy(update={"token_prices": tokens.model_copy(update=what)})
        output.write_text(broken.model_dump_json())
        with pytest.raises(InvalidFile, match=said):
            load_calibration(output)
    older = found.model_dump(mode="json", exclude={"prices", "stand_in", "token_prices"})
    output.write_text(json.dumps(older))
    read = load_calibration(output)
    assert (read.prices, read.stand_in, read.token_prices) == ((), 1.0, None)


def test_the_command_measures_with_learnt_uses(tmp_path):
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(16)[:2] for _ in range(400)]).reshape(100, 4, 2)
    write_predictor(
        tmp_path / "u", learn_uses(Lesson(chosen, np.arange(100) == 0, 16)), model="demo", top_k=2, tokens=100
    )
    options = ["--text", str(TEXT), "--capacity", "6", "--budget", "80 %", "--window", "32", "--tokens", "512"]
    options += ["--precision", "none", "--uses", str(tmp_path / "u"), "-o", str(tmp_path / "c.json")]
    result = CliRunner().invoke(command, [str(DEMO), *options])
    assert result.exit_code == 0, result.output
    assert load_calibration(tmp_path / "c.json").situation == Situation(capacity=6, eviction="learned")


def test_the_command_counts_experts_as_they_are_held(tmp_path):
    size = 4 * 6 * 73728  # bytes of six experts of each layer in the checkpoint's precision, or eleven in int8
    options = ["--text", str(TEXT), "--capacity", f"{size} B", "--budget", "80 %", "--window", "32", "--tokens", "512"]
    options += ["--precision", "none", "--held", "int8", "-o", str(tmp_path / "c.json")]
    result = CliRunner().invoke(command, [str(DEMO), *options])
    assert result.exit_code == 0, result.output
    held = Situation(capacity=11, eviction="steady", precision="int8")
    assert load_calibration(tmp_path / "c.json").situation == held


def test_the_command_takes_what_a_plan_places(tmp_path):
    placed = {(layer, expert): ["ab"[expert % 2]] for layer in range(4) for expert in range(16)}
    away = [route("a", key, "b") for key, (node,) in placed.items() if node == "b"]
    plan = plan_through(replicas(placed), routes=away, trunk=[path("a", *"aaaa")])
    plan = plan.model_copy(update={"model": read_checkpoint(DEMO).model_spec}).sealed()
    write_plan(tmp_path / "p.json", plan)
    options = ["--text", str(TEXT), "--budget", "100 %", "--window", "64", "--tokens", "1024"]
    options += ["--precision", "none"]
    base = [str(DEMO), *options, "--plan", str(tmp_path / "p.json"), "-o", str(tmp_path / "c.json")]
    result = CliRunner().invoke(command, [*base, "--node", "a"])
    assert result.exit_code == 0, result.output
    assert "of the waits of exact routing" in result.stdout
    found = load_calibration(tmp_path / "c.json")
    assert found.situation == Situation(node="a", plan=plan.digest, placement=("5555",) * 4, is_whole=True)
    assert found.warmup == 0
    assert found.settings[0].waits_share < 0.9
    assert (found.prices, found.token_prices, found.stand_in) == ((), None, 1.0)  # all or none: nothing changes
    elsewhere = CliRunner().invoke(command, [*base, "--node", "c"])
    assert "no layer runs at node 'c', and no tokens enter there; name one of a" in str(elsewhere.exception)


def test_the_command_refuses_what_it_cannot_measure(tmp_path):
    base = [str(DEMO), "--text", str(TEXT), "-o", str(tmp_path / "c.json")]
    for options, said in (
        ([], "--capacity, or --plan and --node"),
        (["--capacity", "1"], "a token needs 2 at once"),
        (["--capacity", "6", "--budget", "0 %"], "needs no calibration"),
        (["--plan", "p.json"], "--capacity, or --plan and --node"),
        (["--plan", "p.json", "--node", "a", "--uses", "u"], "under a --plan nothing does"),
        (["--plan", "p.json", "--node", "a", "--price-tokens", "9"], "under a --plan nothing has a price"),
    ):
        result = CliRunner().invoke(command, [*base, *options])
        assert result.exit_code == 2
        assert said in result.stderr


def test_unlike_tokens_of_a_piece_are_compared_once(bench):
    run = bench.run(Exact(), keep=False)
    assert run.divergence == pytest.approx(0, abs=1e-5)
    assert torch.is_tensor(bench.pieces)
