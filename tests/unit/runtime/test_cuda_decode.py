"""Steps that look their slots up by themselves, run with plain torch where there is no device."""

from pathlib import Path
from typing import Any

import pytest

from runtime.alone import open_alone
from runtime.cuda import reference
from runtime.cuda.decode import CapturedDecode
from runtime.cuda.layers import step_parts
from runtime.engine import Segment, generate

PROMPT = [5, 17, 99, 3, 42, 7]


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


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
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
