"""An agent with memory left caches what it calls others for: the same tokens, fewer calls, told in status."""

from pathlib import Path

from tests.cluster import PROMPTS, make_plan, running, spread, wait_for
from tests.integration.conftest import NUM_TOKENS


def test_what_is_called_over_and_over_is_cached(tmp_path: Path, store: Path, reference: dict[str, list[int]]) -> None:
    with running(tmp_path, 2, store=store, settings={"peer_cache": True}) as cluster:
        cluster.reach(make_plan(cluster, spread(["n1", "n0"]), ingresses=["n1"]))  # n1 has no store: it asks n0
        options = ("--max-tokens", str(NUM_TOKENS), "--combine", "ordered")
        for _ in range(3):
            assert cluster.generate("n1", PROMPTS[0], *options)["tokens"] == reference[PROMPTS[0]]
        status = wait_for(
            lambda: (s := cluster.node_status("n1"))["cache"] and s["cache"]["guest_hits"] and s,
            timeout_s=5,
            what="hits",
        )
        assert 0 < status["cache"]["brought"] <= 32
        assert status["cache"]["loads"] == 0, "no step waits for a load"
        assert status["experts"]["device"] == 32, "guests are not held"
        cluster.require_budgets()
        assert "experts of other nodes" in cluster.planner("status", "--coordinator", cluster.coordinator).stdout
