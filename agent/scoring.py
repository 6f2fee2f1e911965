"""`agent score`: how well the running cluster predicts given text, perplexity included, as it decodes.

Decides how texts are spelled, joined into requests and summed up. Tokens are run one by one along the path that answers
take, with whatever substitution the plan's quality budget allows, so that what it costs can be seen on one's own text:
score a text, let the budget be 0 %, score it again. Must not know how tokens are made.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from agent.options import coordinator_option


@click.command()
@click.option("--node", required=True, help="Where the text enters: an ingress of the topology.")
@click.option(
    "--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path), help="A text or .jsonl."
)
@click.option("--tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="To score at most.")
@click.option("--window", type=click.IntRange(min=1), default=256, show_default=True, help="Context in tokens.")
@click.option(
    "--combine", type=click.Choice(["partial", "ordered"]), default="partial", show_default=True,
    help="ordered is exact, whatever the budget.",
)  # fmt: skip
@coordinator_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with each token's figure.")
def score(*, texts: tuple[Path, ...], tokens: int, as_json: bool, **wanted: Any) -> None:
    """Tell how unlikely the running cluster finds each token of a text, and its perplexity."""
    from agent.errors import AgentError
    from runtime.recorder import read_texts
    from schemas.outcome import ExitCode

    nll = [each for _, each in zip(range(tokens), scored(read_texts(list(texts)), **wanted), strict=False)]
    if not nll:
        raise AgentError("the text has fewer than two tokens, so that nothing follows from anything", ExitCode.INVALID)
    mean = sum(nll) / len(nll)
    error = math.sqrt(sum((each - mean) ** 2 for each in nll) / len(nll) / max(1, len(nll) - 1))
    perplexity = math.exp(min(mean, 700.0))
    if as_json:
        click.echo(
            json.dumps({"tokens": len(nll), "nll": mean, "nll_error": error, "perplexity": perplexity, "each": nll})
        )
    else:
        click.echo(f"{len(nll)} tokens: {mean:.4f} ± {error:.4f} nats each, perplexity {perplexity:.3f}")


def scored(texts: Iterator[str], *, node: str, coordinator: str, window: int, combine: str) -> Iterator[float]:
    """Yield the negative log-likelihood of every token but the first of each text; nats."""
    from agent.client import Answer, stream

    for text in texts:
        answer, told = Answer(), 0
        for _ in stream(node, coordinator, answer, prompt=text, max_tokens=window, combine=combine, score=True):
            yield from answer.nll[told:]
            told = len(answer.nll)


COMMANDS: Final = (score,)
