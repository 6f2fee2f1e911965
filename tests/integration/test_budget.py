"""A device budget below what the plan gives a node: the same tokens, within the budget, changed while it runs."""

import json
from pathlib import Path

import pytest

from agent.client import change_budget
from agent.errors import Refused
from schemas.outcome import ExitCode
from tests.cluster import AGENT, MIB, PROMPTS, call, make_plan, running, save, spec, spread, wait_for
from tests.integration.conftest import NUM_TOKENS


def test_a_budget_below_the_plan_and_a_live_change(
    tmp_path: Path, store: Path, reference: dict[str, list[int]]
) -> None:
    context = {"tokens": 256, "sessions": 1}
    with running(tmp_path, 1, store=store, settings={"context": context, "device_budget": "14 MiB"}) as cluster:
        plan = make_plan(cluster, spread(cluster.nodes))
        assert cluster.apply(save(cluster, plan)).returncode == 0

        def used() -> int:
            return int(cluster.status()["nodes"][0]["memory_used"]["device"])

        def ask(prompt: str) -> list[int]:
            return cluster.generate("n0", prompt, "--max-tokens", str(NUM_TOKENS))["tokens"]  # type: ignore[no-any-return]

        assert ask(PROMPTS[0]) == reference[PROMPTS[0]]
        wait_for(lambda: 7 * MIB < used() <= 14 * MIB, timeout_s=10, what=lambda: f"{used()} bytes are used")
        lower = change_budget("n0", cluster.coordinator, 9 * MIB)
        assert lower.used <= lower.experts <= 9 * MIB - spec().trunk_bytes
        for prompt in PROMPTS:
            assert ask(prompt) == reference[prompt]
        wait_for(lambda: used() <= 9 * MIB, timeout_s=10, what=lambda: f"{used()} bytes are used")
        cache = cluster.status()["nodes"][0]["cache"]
        assert cache["load_bytes"] == cache["loads"] * spec().expert_bytes > 0
        assert cache["found"] > cache["loads"]
        report = cluster.planner("status", "--coordinator", cluster.coordinator, "--layers", "--json").stdout
        layers = json.loads(report)["layers"][0]["layers"]
        assert sum(layer["loads"] for layer in layers) >= cache["loads"]
        assert all(layer["load_bytes"] == layer["loads"] * spec().expert_bytes > 0 for layer in layers)
        assert all(layer["local_s"] >= layer["load_wait_s"] > 0 for layer in layers)
        with pytest.raises(Refused, match=r"n0: device budget of 6 MiB is too small: at least .* are needed") as caught:
            change_budget("n0", cluster.coordinator, 6 * MIB)
        assert caught.value.exit_code == ExitCode.INFEASIBLE
        higher = call(*AGENT, "budget", "n0", "1TiB", "--coordinator", cluster.coordinator)
        assert higher.stdout.startswith("n0: 64 MiB of the device")
        assert higher.stderr == "n0: memory.device of its config allows no more than 64 MiB\n"
        assert ask(PROMPTS[1]) == reference[PROMPTS[1]]
