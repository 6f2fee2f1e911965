import numpy as np
import pytest

from runtime.policy.cache import Cache, CacheTooSmall
from runtime.policy.eviction import EVICTIONS, Belady, CycLfu, Deferred, LeastStale, Lfu, Lru, Rates, ScoreAverage

L, E, K = 3, 4, 2


def feed(eviction, events):
    """Let an eviction see (layer, experts) events, one token each, all scores 1."""
    for layer, chosen in events:
        eviction.observe(layer, np.array([chosen]), np.ones((1, len(chosen))), len(chosen))


def order(eviction, keys, layer=0):
    """Keys in the order in which they would go."""
    keys = np.array(keys)
    return keys[np.argsort(eviction.worth(keys, layer), kind="stable")].tolist()


def test_lru_lets_the_least_recently_used_go():
    eviction = Lru(L, E)
    feed(eviction, [(0, [0, 1]), (1, [2]), (0, [0])])
    assert order(eviction, [0, 1, 6]) == [1, 6, 0]


def test_lfu_counts_and_breaks_ties_by_recency():
    eviction = Lfu(L, E)
    feed(eviction, [(0, [0]), (0, [1]), (0, [1]), (0, [2])])
    assert order(eviction, [0, 1, 2]) == [0, 2, 1]


def test_score_average_counts_experts_that_were_not_chosen():
    eviction = ScoreAverage(L, E)
    eviction.observe(0, np.array([[0, 1, 2]]), np.array([[0.5, 0.3, 0.2]]), 1)
    assert order(eviction, [0, 1, 2, 3]) == [3, 2, 1, 0]


def test_least_stale_prefers_experts_of_layers_that_come_soon():
    eviction = LeastStale(L, E)
    feed(eviction, [(0, [0]), (1, [0]), (2, [0]), (0, [1])])
    assert order(eviction, [0, 4, 8], layer=0) == [0, 8, 4]  # stale; then fresh ones, the far layer first


def test_cyclfu_forgets_what_was_popular_once():
    eviction = CycLfu(1, E)
    feed(eviction, [(0, [0])] * 3 + [(0, [1])] * 20 + [(0, [2])] * 2)
    assert order(eviction, [0, 1, 2]) == [0, 2, 1]


def test_rates_weigh_chance_by_how_far_it_is():
    eviction = Rates(4, 2)
    feed(eviction, [(layer, [0]) for _ in range(50) for layer in range(4)])
    assert order(eviction, [0, 2, 4, 6], layer=0) == [0, 6, 4, 2]


def test_rates_of_a_batch_are_those_of_its_tokens_one_by_one():
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(E)[:K] for _ in range(7)])
    together, apart = Rates(1, E), Rates(1, E)
    together.observe(0, ids, np.ones(ids.shape), K)
    for row in ids:
        apart.observe(0, row[None], np.ones((1, K)), K)
    keys = np.arange(E)
    assert np.allclose(together.worth(keys, 0), apart.worth(keys, 0))


def random_events(seed, tokens=40, layers=L, experts=E):
    rng = np.random.default_rng(seed)
    return [(layer, rng.permutation(experts)[:K]) for _ in range(tokens) for layer in range(layers)]


def hits(eviction, events, slots):
    cache, found = Cache(L, E, slots, eviction), 0
    for layer, chosen in events:
        eviction.observe(layer, chosen[None], np.ones((1, K)), K)
        found += len(cache.request(layer, chosen).hits)
        assert cache.resident.sum() <= slots
        assert cache.resident_of(layer)[chosen].all()
    return found


@pytest.mark.parametrize("name", EVICTIONS)
@pytest.mark.parametrize("slots", [2, 4, 7])
def test_no_policy_beats_belady(name, slots):
    events = random_events(slots)
    uses = np.array([layer * E + chosen for layer, chosen in events])
    assert hits(EVICTIONS[name](L, E), events, slots) <= hits(Belady(uses, L * E), events, slots)


def test_everything_fits_then_each_expert_is_loaded_once():
    events = random_events(3)
    seen = {(layer, int(expert)) for layer, chosen in events for expert in chosen}
    assert hits(Lru(L, E), events, L * E) == len(events) * K - len(seen)


def test_a_layer_keeps_to_its_own_slots():
    eviction = Lru(L, E)
    cache = Cache(L, E, 2, eviction, per_layer=True)
    for layer, chosen in random_events(5):
        eviction.observe(layer, chosen[None], np.ones((1, K)), K)
        cache.request(layer, chosen)
        assert max(cache.resident_of(each).sum() for each in range(L)) <= 2


def test_a_cache_below_top_k_is_refused():
    with pytest.raises(CacheTooSmall, match="needs 3 experts at once, the cache has 2 slots; give it at least 3"):
        Cache(L, E, 2, Lru(L, E)).request(0, np.array([0, 1, 2]))


@pytest.mark.parametrize("name", EVICTIONS)
def test_what_is_learnt_when_asked_is_the_same(name):
    now, later = EVICTIONS[name](L, E), Deferred(EVICTIONS[name](L, E))
    draw = np.random.default_rng(4)
    for _ in range(20):
        for layer in range(L):
            chosen, scores = draw.permutation(E)[:K], draw.random(K).astype(np.float32)
            now.observe(layer, chosen[None], scores[None].astype(np.float64), K)
            if draw.random() < 0.6:
                later.note(layer, chosen.tolist(), scores)
            elif draw.random() < 0.5:
                later.note(layer, chosen, scores, np.zeros(K, dtype=np.int64))
            else:
                later.observe(layer, chosen[None], scores[None].astype(np.float64), K)
        np.testing.assert_array_equal(now.worth(np.arange(L * E), 1), later.worth(np.arange(L * E), 1))


@pytest.mark.parametrize("name", EVICTIONS)
def test_rows_of_several_tokens_are_learnt_token_by_token(name):
    together, apart = Deferred(EVICTIONS[name](L, E)), EVICTIONS[name](L, E)
    token, expert = np.array([1, 0, 1, 0]), np.array([0, 1, 2, 3])
    together.note(0, expert, np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32), token)
    scores = np.array([[0.4, 0.2], [0.3, 0.1]], dtype=np.float32).astype(np.float64)
    apart.observe(0, np.array([[3, 1], [2, 0]]), scores, 2)
    np.testing.assert_array_equal(together.worth(np.arange(L * E), 0), apart.worth(np.arange(L * E), 0))


def test_what_lies_far_back_is_forgotten_unless_somebody_asks():
    later = Deferred(Lru(1, 4), most=2)
    for expert in range(4):
        later.note(0, [expert], np.ones(1, dtype=np.float32))
    assert later.worth(np.arange(4), 0).tolist() == [-1, -1, 1, 2]
