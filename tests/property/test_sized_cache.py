"""Caches of bytes and what is brought in ahead: never more than fits, and nothing in use gives way."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.policy.cache import Cache
from runtime.policy.eviction import EVICTIONS

L, E, K = 3, 6, 2


@st.composite
def scenes(draw):
    sizes = np.array(draw(st.lists(st.integers(1, 9), min_size=L * E, max_size=L * E)), dtype=float)
    steps = draw(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, E - 1), min_size=K, max_size=K, unique=True),
                st.lists(st.integers(0, E - 1), max_size=3, unique=True),
            ),
            min_size=1,
            max_size=30,
        )
    )
    return sizes, steps, draw(st.integers(18, 60)), draw(st.sampled_from(sorted(EVICTIONS))), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(scene=scenes(), is_sized=st.booleans())
def test_a_cache_holds_what_fits_and_what_is_used(scene, is_sized):
    sizes, steps, capacity, name, per_layer = scene
    taken = sizes if is_sized else np.ones(L * E)
    slots = capacity if is_sized else K + capacity % 7
    eviction = EVICTIONS[name](L, E)
    cache = Cache(L, E, slots, eviction, per_layer=per_layer, sizes=sizes if is_sized else None)

    def check(used_layer, used):
        assert cache.resident_of(used_layer)[used].all()
        held = (cache.resident * taken).reshape(L, E).sum(axis=1)
        assert (held.max() if per_layer else held.sum()) <= slots

    for number, (chosen, guessed) in enumerate(steps):
        layer, used, ahead = number % L, np.array(chosen), np.array(guessed, dtype=np.int64)
        eviction.observe(layer, used[None], np.ones((1, K)), K)
        was = cache.resident.copy()
        access = cache.request(layer, used)
        assert len(access.hits) + len(access.loads) == K
        assert was[access.hits].all()
        assert not was[access.loads].any()
        check(layer, used)
        if layer + 1 < L:
            was = cache.resident.copy()
            brought = cache.bring(layer + 1, ahead, layer, used)
            assert not was[brought].any()
            assert cache.resident[brought].all()
            assert set(brought) <= set((layer + 1) * E + ahead)
            check(layer, used)
