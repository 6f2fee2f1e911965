from pathlib import Path

import pytest

from tests.cluster import AGENT, MODEL, PROMPTS, call

NUM_TOKENS = 64


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "float32"
    done = call(*AGENT, "prepare", str(MODEL), "-o", str(path), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def reference() -> dict[str, list[int]]:
    """Greedy tokens of one-node transformers in float32, eager experts, per prompt."""
    import torch

    from runtime.loading import load_tokenizer, load_whole

    torch.set_num_threads(1)  # the agents need the cores too
    tokenizer, model = load_tokenizer(MODEL), load_whole(MODEL, dtype="float32")
    answers = {}
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            out = model.generate(ids, do_sample=False, max_new_tokens=NUM_TOKENS, attention_mask=torch.ones_like(ids))
            answers[prompt] = out[0, ids.shape[1] :].tolist()
    return answers
