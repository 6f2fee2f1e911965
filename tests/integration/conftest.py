import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import AGENT, MODEL, PROMPTS, Cluster, call, running

NUM_TOKENS = 64
LONGEST = {PROMPTS[0]: 900, PROMPTS[1]: 400}  # what some test compares


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "float32"
    done = call(*AGENT, "prepare", str(MODEL), "-o", str(path), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def one_node() -> Callable[[str, int], list[int]]:
    """Greedy tokens of one-node transformers in float32, eager experts, for a prompt."""
    import torch

    from runtime.loading import load_tokenizer, load_whole

    torch.set_num_threads(1)  # the agents need the cores too
    tokenizer, model = load_tokenizer(MODEL), load_whole(MODEL, dtype="float32")

    @functools.cache
    def longest(prompt: str) -> list[int]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        count = LONGEST.get(prompt, NUM_TOKENS)
        with torch.inference_mode():
            out = model.generate(ids, do_sample=False, max_new_tokens=count, attention_mask=torch.ones_like(ids))
        return out[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return lambda prompt, count: longest(prompt)[:count]


@pytest.fixture(scope="session")
def reference(one_node: Callable[[str, int], list[int]]) -> dict[str, list[int]]:
    """The first tokens that follow every prompt."""
    return {prompt: one_node(prompt, NUM_TOKENS) for prompt in PROMPTS}


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Cluster]:
    """Two nodes without a plan at first; what a module leaves, the next one finds."""
    settings = {"absence_timeout_s": 2}
    with running(tmp_path_factory.mktemp("pair"), 2, store=store, settings=settings, verbose=False) as cluster:
        yield cluster
