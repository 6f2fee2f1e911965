"""KV caches: written in place they hold what transformers' own do; rows of a batch see their own tokens."""

import pytest
import torch
from transformers import DynamicCache

from runtime.caches import BatchCache, decode_mask, session_cache
from tests.families import config_of


def states(count, seed):
    return torch.randn(1, 2, count, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_session_cache_holds_what_the_librarys_own_does(family):
    config = config_of(family)  # every other layer of gpt_oss has a window of 16
    ours, theirs = session_cache(config, 40), DynamicCache(config=config)
    for step, count in enumerate([20, 7, 1, 1, 11]):
        for layer in range(4):
            keys, values = states(count, step), states(count, 100 + step)
            assert ours.layers[layer].get_mask_sizes(count) == theirs.layers[layer].get_mask_sizes(count)
            got, want = ours.update(keys, values, layer), theirs.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)


def test_a_new_token_is_written_beside_the_others():
    cache = session_cache(config_of("qwen3_moe"), 8)
    first, _ = cache.update(states(3, 1), states(3, 2), 0)
    second, _ = cache.update(states(1, 3), states(1, 4), 0)
    assert first.data_ptr() == second.data_ptr()


def test_rows_of_a_batch_keep_their_lengths():
    caches = [session_cache(config_of("gpt_oss"), 40) for _ in range(3)]
    for length, cache in zip([20, 3, 0], caches, strict=True):
        if length:
            for layer in range(4):
                cache.update(states(length, length), states(length, length), layer)
    new = torch.cat([states(1, seed) for seed in (7, 8, 9)])
    for layer, (window, held) in enumerate([(16, [16, 4, 1]), (None, [21, 4, 1])]):
        keys, _ = BatchCache(caches).update(new, new, layer)
        mask = decode_mask([21, 4, 1], window, additive=None)
        assert keys.shape[2] == max(held)
        assert mask.shape == (3, 1, 1, max(held))
        assert mask.sum((1, 2, 3)).tolist() == held
        for row, length in enumerate(held):
            assert torch.equal(keys[row, :, length - 1], new[row, :, 0])
            assert not keys[row, :, length:].any()
    assert decode_mask([30, 20], 16, additive=None) is None
    assert decode_mask([1, 2], None, additive=torch.float16)[0, 0, 0, 1] == torch.finfo(torch.float16).min
