"""What kernels of one token and of a prompt choose experts with: a router's scores, the best of them, their weights.

Called by kernels of `expert_kernels` and `prompt_kernels`. Axes: E experts, K top-k; each padded to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def best_of(raw, experts, is_expert, TOP: tl.constexpr, TOP_BLOCK: tl.constexpr):
    """Return the scores of logits [E], and the best K experts with theirs, best first."""
    wide = tl.where(is_expert, raw.to(tl.float32), -1e30)
    odds = tl.where(is_expert, tl.exp(wide - tl.max(wide, axis=0)), 0.0)
    scores = odds / tl.sum(odds, axis=0)
    left = tl.where(is_expert, scores, -1.0)
    places = tl.arange(0, TOP_BLOCK)
    chosen = tl.zeros([TOP_BLOCK], tl.int32)
    best = tl.zeros([TOP_BLOCK], tl.float32)
    for place in tl.static_range(TOP):
        at = tl.argmax(left, axis=0)
        best = tl.where(places == place, tl.max(left, axis=0), best)
        chosen = tl.where(places == place, at, chosen)
        left = tl.where(experts == at, -1.0, left)
    return scores, chosen, best


@triton.jit
def weights_of(best, is_place, DTYPE: tl.constexpr, IS_NORMALISED: tl.constexpr, IS_ROUNDED: tl.constexpr):
    """Return the weights of the best by their scores."""
    if IS_NORMALISED:
        best = best / tl.sum(tl.where(is_place, best, 0.0), axis=0)
    if IS_ROUNDED:
        best = best.to(DTYPE).to(tl.float32)
    return best
