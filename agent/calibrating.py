"""`agent calibrate`: what substitution of experts costs on given text, and how much of it each budget buys.

Decides how situations and budgets are spelled and results shown. The work is done by `runtime.calibrate`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from agent.options import DTYPES, progress_bar, require_directory
from agent.replaying import Capacity
from schemas.calibration import Calibration, Situation, layer_mask
from schemas.files import write_atomic
from schemas.model import ModelSpec
from schemas.paths import layers_run, path_nodes
from schemas.plan import Plan, load_plan
from schemas.precision import LOW_PRECISIONS, PRECISIONS, Precision
from schemas.units import format_share, parse_share

if TYPE_CHECKING:
    from runtime.forcing import Supply
    from runtime.policy.eviction import Bools


class PerplexityRise(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """A rise of perplexity: ``0.5 %``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share."""
        try:
            share = value if isinstance(value, float) else parse_share(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return share if share > 0 else self.fail("a budget of nothing needs no calibration", param, ctx)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path), help="A text or .jsonl."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Calibration file to write.")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=PerplexityRise(),
    help="Rise of perplexity.  [default: 0.25, 0.5, 1 and 2 %]",
)
@click.option("--capacity", type=Capacity(), help="Experts of each layer at hand: 8, 25 %, or bytes for all layers.")
@click.option(
    "--uses", type=click.Path(path_type=Path), help="With --capacity: what caches evict by, of agent learn --kind uses."
)
@click.option("--plan", type=click.Path(path_type=Path), help="Instead: what this plan has at hand for --node.")
@click.option("--node", help="A node of --plan that takes tokens in, or runs layers.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=24576,
    show_default=True,
    help="Of all texts, an equal part of each.",
)
@click.option(
    "--price-tokens", type=click.IntRange(min=1),
    help="With --capacity: of all texts, that prices are measured on, once.  [default: 4 times --tokens]",
)  # fmt: skip
@click.option("--window", type=click.IntRange(min=16), default=256, show_default=True, help="Context in tokens.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="To compute in.")
@click.option(
    "--held", type=click.Choice(PRECISIONS), default="checkpoint", show_default=True,
    help="In which the agent holds every expert (its precision): budgets pay for that, too.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice([*LOW_PRECISIONS, "none"]), default=LOW_PRECISIONS,
    show_default=True, help="Measure too what executing every expert in this costs.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def calibrate(
    *,
    model: Path,
    texts: tuple[Path, ...],
    output: Path,
    budgets: tuple[float, ...],
    capacity: tuple[str, float] | None,
    uses: Path | None,
    plan: Path | None,
    node: str | None,
    tokens: int,
    price_tokens: int | None,
    window: int,
    dtype: Any,
    held: Precision,
    precisions: tuple[Any, ...],
    as_json: bool,
) -> None:
    """Measure on text how much of its routers' choice MODEL may give up for a budget of quality."""
    from runtime.calibrate import BUDGETS
    from runtime.calibrate import calibrate as measure
    from runtime.degrading import precision_costs
    from runtime.forcing import Bench
    from runtime.loading import load_whole
    from schemas.checkpoint import read_checkpoint
    from schemas.sizes import sizes_of_checkpoint

    if (capacity is None) == (plan is None) or (plan is None) != (node is None):
        raise click.UsageError("give --capacity, or --plan and --node: what is at hand decides what is given up")
    if uses is not None and plan is not None:
        raise click.UsageError("--uses says what makes room in caches: under a --plan nothing does")
    if price_tokens is not None and plan is not None:
        raise click.UsageError("--price-tokens is for caches: under a --plan nothing has a price")
    require_directory(output)
    checkpoint = read_checkpoint(model)
    spec = checkpoint.model_spec
    if capacity:
        supply, situation = _cached(spec, *capacity, uses, sizes_of_checkpoint(checkpoint, "checkpoint").get(held))
    else:
        supply, situation = _placed(spec, plan or Path(), node or "")
    situation = situation.model_copy(update={"precision": held})
    pieces = _pieces(model, texts, tokens=tokens, window=window)
    priced = _pieces(model, texts, tokens=price_tokens or 4 * tokens, window=window) if capacity else None
    loaded = load_whole(model, dtype=checkpoint.dtype if dtype == "checkpoint" else dtype)
    bench = Bench(loaded, pieces, supply, spec.top_k)
    with progress_bar("Calibrating", "runs") as progress:
        found = measure(
            bench,
            model=spec.id,
            situation=situation,
            budgets=budgets or BUDGETS,
            priced=priced,
            progress=progress,
        )
    wanted = [each for each in LOW_PRECISIONS if each in precisions]
    if wanted:
        with progress_bar("Rounding", "runs") as progress:
            costs = precision_costs(bench, wanted, progress=progress)
        found = found.model_copy(update={"precisions": tuple(costs)})
    write_atomic(output, found.model_dump_json(indent=1) + "\n")
    click.echo(json.dumps({"calibration": str(output), **found.model_dump()}) if as_json else _shown(output, found))


def _cached(
    spec: ModelSpec, kind: str, number: float, uses: Path | None, expert_bytes: int | None
) -> "tuple[Supply, Situation]":
    """Return the situation of a cache, in which an expert takes so many bytes (None: as in the checkpoint)."""
    from runtime.forcing import Supply
    from runtime.predictors import read_uses

    if kind == "bytes":
        number //= (expert_bytes or spec.expert_bytes) * spec.layers
    elif kind == "share":
        number = round(number * spec.experts)
    slots = min(int(number), spec.experts)
    if slots < spec.top_k:
        raise click.UsageError(
            f"--capacity: room for {slots} of a layer's experts, but a token needs {spec.top_k} at once; give at least "
            f"{spec.top_k}"
        )
    eviction = "steady" if uses is None else "learned"
    supply = Supply(spec.layers, spec.experts, slots, uses=read_uses(uses, spec))
    return supply, Situation(capacity=slots, eviction=eviction)


def _placed(spec: ModelSpec, file: Path, node: str) -> "tuple[Supply, Situation]":
    """Return the situation of a node under a plan: what it must call others for is not at hand."""
    from runtime.errors import InvalidInput
    from runtime.forcing import Supply

    plan = load_plan(file)
    if (plan.model.layers, plan.model.experts) != (spec.layers, spec.experts):
        raise InvalidInput(f"{file}: is for {plan.model.id}, of another shape than {spec.id}")
    if not layer_runners(plan, node):
        known = ", ".join(sorted(path_nodes(plan.trunk)))
        raise InvalidInput(f"{file}: no layer runs at node {node!r}, and no tokens enter there; name one of {known}")
    masks = planned_at_hand(plan, node)
    placement = tuple(layer_mask(mask.nonzero()[0].tolist()) for mask in masks)
    situation = Situation(node=node, plan=plan.digest, placement=placement, is_whole=True)
    return Supply(spec.layers, spec.experts, masks=masks), situation


def planned_at_hand(plan: Plan, node: str) -> "Bools":
    """Return what is at hand in each layer where it runs for tokens of `node`, bool [L, E].

    What must be called, even though it is there too, is not at hand, nor is what is on disk alone.
    """
    import numpy as np

    runners = layer_runners(plan, node)
    masks = np.zeros((plan.model.layers, plan.model.experts), dtype=bool)
    for replica in plan.placement:
        if replica.node == runners[replica.layer] and replica.tier != "disk":
            masks[replica.layer, replica.expert] = True
    for route in plan.routes:
        if route.ingress == runners[route.layer] and route.holder != route.ingress:
            masks[route.layer, route.expert] = False
    return masks


def layer_runners(plan: Plan, node: str) -> list[str]:
    """Return where each layer with experts runs for tokens of `node`, which runs those itself that it runs for any.

    Tokens are those that enter there, or else the first that pass; empty where none do.
    """
    paths = [path for path in plan.trunk if path.ingress == node]
    paths += [path for path in plan.trunk if any(segment.node == node for segment in path.segments)]
    if not paths:
        return []
    runners = {
        layer: segment.node
        for segment in paths[0].segments
        for layer in range(segment.first_layer, segment.last_layer + 1)
    }
    runners |= dict.fromkeys(layers_run(node, plan.trunk), node)
    return [runners[layer] for layer in plan.model.moe_layer_indices]


def _pieces(model: Path, texts: tuple[Path, ...], *, tokens: int, window: int) -> Any:
    """Return the pieces of all files, an equal part of each."""
    import torch

    from runtime.forcing import cut_pieces
    from runtime.loading import load_tokenizer
    from runtime.recorder import read_texts

    tokenizer = load_tokenizer(model)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    cut = []
    for file in texts:
        ids = (tokenizer(text, verbose=False)["input_ids"] + end for text in read_texts([file]))
        cut.append(cut_pieces(ids, window=window, max_tokens=max(tokens // len(texts), window)))
    return torch.cat(cut)


def _shown(output: Path, found: Calibration) -> str:
    what = "waits" if found.situation.is_whole else "loads"
    lines = [f"{output}: {found.model}, {found.tokens} tokens in {found.pieces} pieces"]
    for each in found.settings:
        interval = f"{each.low:+.2%} … {each.high:+.2%}"
        lines.append(
            f"  budget {format_share(each.budget)}: perplexity {each.rise:+.2%} ({interval}), "
            f"{format_share(each.waits_share)} of the {what} of exact routing"
        )
    for cost in found.precisions:
        interval = f"{cost.low:+.2%} … {cost.high:+.2%}"
        lines.append(f"  every expert in {cost.precision}: perplexity {cost.rise:+.2%} ({interval})")
    return "\n".join(lines)


COMMANDS: Final = (calibrate,)
