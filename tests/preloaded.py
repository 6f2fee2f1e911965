"""What agents and commands import, imported once by the process that `tests.forked` forks them from."""

import transformers.models.auto.tokenization_auto
import transformers.models.qwen3_moe.modeling_qwen3_moe
import transformers.tokenization_utils_tokenizers  # noqa: F401

import agent.cli
import agent.node  # noqa: F401
import planner.cli
import planner.control.cli  # noqa: F401
