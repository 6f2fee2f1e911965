"""A device budget has room for trunk, KV cache and one layer's experts of one token, or is refused with what it takes."""

import pytest

from agent.allowance import Allowance
from agent.budget import MemoryBudget
from runtime.errors import BudgetTooSmall
from runtime.slots import Caching, Residency
from schemas.messages import Assignment, TierBytes
from schemas.topology import Context
from tests.families import make_checkpoint, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("allowance")
    return make_store(make_checkpoint("qwen3_moe", directory / "model"), directory / "store")


def test_the_budget_is_what_trunk_and_kv_cache_leave(store):
    spec = store.manifest.model
    memory = TierBytes(device=1 << 20, host=4096, disk=0)
    budget = MemoryBudget("n0", memory, "device", spec, Context(tokens=16, sessions=1))
    residency = Residency(
        store.manifest.layout, {"device": 1 << 20, "host": 4096}, caching=Caching(spec.layers, spec.experts)
    )
    allowance = Allowance(residency, budget, None)
    assignment = Assignment.model_construct(epoch=1, plan="", ingress=True, paths=(), replicas=(), trunk=())
    allowance.fit([assignment])
    trunk = budget.path_memory([assignment]).total
    assert residency.budgets["device"] == (1 << 20) - trunk
    assert residency.budgets["host"] == 4096
    least = trunk + spec.top_k * spec.expert_bytes
    assert allowance.change(least) == least
    assert residency.budgets["device"] == spec.top_k * spec.expert_bytes
    with pytest.raises(BudgetTooSmall, match=r"2 experts of .* and .* for trunk and KV cache") as caught:
        allowance.change(least - 1)
    assert caught.value.needed == least
    assert allowance.change(1 << 40) == 1 << 20
    with pytest.raises(BudgetTooSmall):
        Allowance(residency, budget, spec.expert_bytes)
