"""What a quality budget buys: loads per token against exact LRU, perplexity on text that calibration did not see.

    python -m tests.bench.quality MODEL TEXTS [--capacity 8] [--capacity 16] [--budget 0.5 %] [--uses FILE]

TEXTS has a directory per domain with calibration.jsonl and eval.jsonl. Shares are calibrated on the calibration text of
the mixed domains alone, then judged on their evaluation text, mixed and one by one, and on domains that calibration
never saw. Intervals are 95 %. FILE is what `agent learn --kind uses` made of traces of calibration text.
"""

import math
import time
from pathlib import Path

import click
import torch

from runtime.calibrate import Rise, calibrate, policy_of
from runtime.forcing import Bench, Supply, cut_pieces
from runtime.loading import load_tokenizer, load_whole
from runtime.policy.routing import Exact
from runtime.predictors import read_uses
from runtime.recorder import read_texts
from schemas.calibration import Calibration, Setting, Situation
from schemas.checkpoint import read_checkpoint
from schemas.units import parse_share


def pieces(tokenizer, texts: Path, domains: list[str], split: str, tokens: int) -> torch.Tensor:
    end = [tokenizer.eos_token_id]
    cut = []
    for domain in domains:
        ids = (
            tokenizer(text, verbose=False)["input_ids"] + end
            for text in read_texts([texts / domain / f"{split}.jsonl"])
        )
        cut.append(cut_pieces(ids, window=256, max_tokens=tokens // len(domains)))
    return torch.cat(cut)


def judge(bench: Bench, found: Calibration, setting: Setting, name: str) -> None:
    exact = bench.run(Exact(), is_lru=True, keep=True)
    run = bench.run(policy_of(setting.shares, is_whole=False, prices=found.prices, stand_in=found.stand_in))
    rise, loads, base = Rise.between(exact, run), run.waits.sum(), exact.waits.sum()
    low, high = (math.expm1(rise.mean + sign * 1.96 * rise.error) for sign in (-1, 1))
    print(
        f"  {name:28s} perplexity {math.expm1(rise.mean):+.2%} ({low:+.2%} … {high:+.2%}), KL {run.divergence:.4f}, "
        f"loads per token {loads:.2f} of {base:.2f} = {loads / base:.1%}",
        flush=True,
    )


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", type=click.Path(path_type=Path))
@click.option("--capacity", "capacities", multiple=True, type=int, default=(8, 16))
@click.option("--budget", "budgets", multiple=True, default=("0.5 %",))
@click.option("--mixed", default="code,dialogue,prose")
@click.option("--single", default="code,dialogue,prose,math,french")
@click.option("--tokens", default=24576)
@click.option("--uses", type=click.Path(path_type=Path), help="Of agent learn --kind uses: what caches evict by.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(model, texts, capacities, budgets, mixed, single, tokens, uses, output):
    torch.set_num_threads(1)
    spec, tokenizer = read_checkpoint(model).model_spec, load_tokenizer(model)
    loaded = load_whole(model, dtype="float32")
    domains = mixed.split(",")
    foreseen = read_uses(uses, spec)
    for capacity in capacities:
        supply, began = Supply(spec.layers, spec.experts, capacity, uses=foreseen), time.perf_counter()
        text = pieces(tokenizer, texts, domains, "calibration", tokens)
        situation = Situation(capacity=capacity, eviction="steady" if foreseen is None else "learned")
        wanted = [parse_share(each) for each in budgets]
        found = calibrate(Bench(loaded, text, supply, spec.top_k), model=spec.id, situation=situation, budgets=wanted)
        seconds = time.perf_counter() - began
        if output is not None:
            (output / f"{spec.id}-{capacity}.json").write_text(found.model_dump_json(indent=1) + "\n")
        for setting in found.settings:
            print(
                f"{capacity} of {spec.experts}, budget {setting.budget:.2%}: calibrated on {found.tokens} tokens in "
                f"{seconds:.0f} s, {setting.rise:+.2%} ({setting.low:+.2%} … {setting.high:+.2%}) there",
                flush=True,
            )
            text = pieces(tokenizer, texts, domains, "eval", 2 * tokens)
            judge(Bench(loaded, text, supply, spec.top_k), found, setting, mixed)
            for domain in single.split(",") if single else ():
                text = pieces(tokenizer, texts, [domain], "eval", tokens // 2)
                judge(Bench(loaded, text, supply, spec.top_k), found, setting, domain)


if __name__ == "__main__":
    main()
