"""`agent learn`: what guesses the next layer's experts, or foresees uses of them, learnt from recorded routing.

Decides how a predictor is asked for and its worth told. The work is done by `runtime.predictors`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from agent.options import progress_bar, require_directory
from agent.replaying import LEARNT_SHARE
from schemas.predictor import PREDICTOR_KINDS, PredictorKind
from schemas.units import format_bytes, format_share

if TYPE_CHECKING:
    from runtime.predictors import Lesson
    from runtime.recording import Recording

_JUDGED: Final = 2000  # tokens of each trace: a few hundred say it within a percent


@click.command()
@click.argument(
    "traces", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="TRACE..."
)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option(
    "--kind", type=click.Choice(PREDICTOR_KINDS), default="learned", show_default=True,
    help="What to load ahead: a small network, or counts of what followed what, which go on being counted while text "
    "is made. What to keep: how often each expert will be used soon.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def learn(*, traces: tuple[Path, ...], output: Path, kind: PredictorKind, as_json: bool) -> None:
    """Learn to guess the experts of the next layer from traces (trace files or *.route.csv) of one model.

    The first 70 % of each trace's tokens are learnt from, the rest says how many of the experts that were chosen are
    guessed with as many guesses. agent generate --predictor uses the file, agent replay --predictor judges it.

    With --kind uses: how often each expert will be used by the next tokens, by which caches evict better. agent
    calibrate --uses, agent generate --uses and uses: in an agent's config take the file.
    """
    from runtime.errors import InvalidInput
    from runtime.predictors import joined, learn_uses, write_predictor
    from runtime.predictors import learn as make
    from runtime.recording import read_recording

    require_directory(output)
    recordings = [read_recording(trace) for trace in traces]
    _require_one_model(recordings)
    first = recordings[0]
    whole = [recording.lesson() for recording in recordings]
    cuts = [int(LEARNT_SHARE * len(lesson.chosen)) for lesson in whole]
    if min(cuts) < 1:
        raise InvalidInput(f"{first.name}: too few tokens to learn from some and judge the others")
    lesson = joined([each.part(0, cut) for each, cut in zip(whole, cuts, strict=True)])
    with progress_bar("Learning", "layers") as progress:
        made = learn_uses(lesson, progress=progress) if kind == "uses" else make(kind, lesson, progress=progress)
    size = write_predictor(output, made, model=first.model, top_k=first.top_k, tokens=len(lesson.chosen))
    rest = joined([each.part(cut, cut + _JUDGED) for each, cut in zip(whole, cuts, strict=True)])
    worth, told = _judged(output, rest)
    document: dict[str, Any] = {
        "predictor": str(output),
        "kind": kind,
        "model": first.model,
        "layers": first.layers,
        "experts": first.experts,
        "top_k": first.top_k,
        "tokens": len(lesson.chosen),
        "judged_tokens": len(rest.chosen),
        "bytes": size,
        **worth,
    }
    text = (
        f"{output}: {kind}, from {len(lesson.chosen)} tokens of {first.model}, {first.layers} layers × {first.experts} "
        f"experts, top-{first.top_k}, {format_bytes(size)}\n"
        f"  of what {len(rest.chosen)} other tokens chose {told}"
    )
    click.echo(json.dumps(document) if as_json else text)


def _judged(file: Path, rest: "Lesson") -> tuple[dict[str, float], str]:
    """Return what a file is worth on other tokens than it was learnt from, as numbers and in words."""
    from runtime.policy.eviction import EVICTIONS
    from runtime.policy.guessing import Previous
    from runtime.policy.uses import LearnedUses, Uses
    from runtime.predictors import loads_share, read_predictor, recall

    layers, experts, made = rest.chosen.shape[1], rest.experts, read_predictor(file)[1]
    if isinstance(made, Uses):
        ours, theirs = loads_share(LearnedUses(made), rest), loads_share(EVICTIONS["steady"](layers, experts), rest)
        return (
            {"loads": ours, "loads_of_steady": theirs},
            f"{format_share(ours)} would be loaded with room for a quarter of each layer's experts, and "
            f"{format_share(theirs)} where steady evicts",
        )
    found, before = recall(made, rest), recall(Previous(layers, experts), rest)
    return (
        {"recall": found, "recall_of_token_before": before},
        f"it guessed {format_share(found)} with as many guesses; what the token before chose is {format_share(before)}",
    )


def _require_one_model(recordings: list["Recording"]) -> None:
    """Refuse traces that are not of one model."""
    from runtime.errors import InvalidInput

    first = recordings[0]
    for each in recordings[1:]:
        shapes = [(one.model, one.layers, one.experts, one.top_k) for one in (first, each)]
        if shapes[0] != shapes[1]:
            shown = " and ".join(f"{model} ({layers} layers × {e} experts, top-{k})" for model, layers, e, k in shapes)
            raise InvalidInput(f"{each.name}: is of another model than {first.name}: {shown}")


COMMANDS: Final = (learn,)
