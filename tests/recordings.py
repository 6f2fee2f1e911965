"""Small recordings of routing, made on the spot, that policies can be told apart by."""

import numpy as np

from runtime.predictors import Lesson
from runtime.recording import Batch, Recording

L, E, K = 3, 8, 2


def planted(tokens, seed=0, noise=0.1):
    """Layer 0 is drawn; what layer l chose says what layer l + 1 chooses, but for some noise."""
    rng = np.random.default_rng(seed)
    rule = [np.random.default_rng(9 + layer).permutation(E) for layer in range(L)]
    chosen = np.empty((tokens, L, K), dtype=np.int64)
    for token in range(tokens):
        picked = rng.permutation(E)[:K]
        for layer in range(L):
            picked = rule[layer][picked] if rng.random() > noise else rng.permutation(E)[:K]
            chosen[token, layer] = picked
    return Lesson(chosen, np.arange(tokens) == 0, E)


def leaning(tokens, kind, seed):
    """Texts of two kinds, each with half of 16 experts for its own, mostly; top-4 in 4 layers."""
    rng = np.random.default_rng(seed)
    rule = [np.random.default_rng(9 + layer).permutation(16) for layer in range(4)]
    weight = np.where(np.arange(16) // 8 == kind, 8.0, 1.0)
    chosen = np.empty((tokens, 4, 4), dtype=np.int64)
    for token in range(tokens):
        picked = rng.choice(16, 4, replace=False, p=weight / weight.sum())
        for layer in range(4):
            kept = rule[layer][picked][rng.random(4) < 0.6]
            others = [expert for expert in rng.permutation(16) if expert not in kept]
            picked = np.concatenate([kept, others])[:4].astype(np.int64)
            chosen[token, layer] = picked
    return Lesson(chosen, np.arange(tokens) == 0, 16)


def recording_of(chosen, **more):
    """Every token decoded by itself."""
    tokens, layers, top_k = chosen.shape
    scores = np.linspace(0.6, 0.4, top_k)[None]
    batches = tuple(
        Batch(layer, chosen[token, layer][None], scores, is_decode=True, is_start=token == 0)
        for token in range(tokens)
        for layer in range(layers)
    )
    return Recording("made", layers, E, top_k, batches, **more)


def skewed_recording(tokens=400):
    """Some experts far more often than others, and those of layer 1 twice as large."""
    rng = np.random.default_rng(3)
    weight = 1 / np.arange(1, E + 1)
    draw = [rng.permutation(E) for _ in range(L)]
    chosen = np.array(
        [
            [draw[layer][rng.choice(E, K, replace=False, p=weight / weight.sum())] for layer in range(L)]
            for _ in range(tokens)
        ]
    )
    return recording_of(chosen, expert_bytes=np.array([100.0, 200.0, 100.0]))
