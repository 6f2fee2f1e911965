"""What a quality budget buys: loads per token against exact LRU, perplexity on text that calibration did not see.

    python -m tests.bench.quality [MODEL] [TEXTS] [--capacity 8] [--capacity 16] [--budget 0.5 %] [--uses FILE] [--held int8]

TEXTS has a directory per domain with calibration.jsonl and eval.jsonl. Shares are calibrated on the calibration text of
the mixed domains alone, and prices on four times as much of it (as `agent calibrate` does), then judged on their evaluation text, mixed and one by one, and on domains that calibration
never saw. Intervals are 95 %. As at run time, probes (`runtime.policy.quality`) let less be given up on text that is
dearer; the loads that they cause at run time are not counted here. FILE is what `agent learn --kind uses` made of traces of calibration text. With --held
int8 the memory of C experts of the checkpoint's precision holds experts in int8, as many of them as fit; the budget pays
for that, too, and what loads are compared with stays LRU of C experts in the checkpoint's precision.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

from agent.quality import importance_of
from runtime.calibrate import Prices, Rise, calibrate, policy_of
from runtime.forcing import Bench, Supply, cut_pieces
from runtime.loading import load_tokenizer, load_whole
from runtime.policy.routing import Exact
from runtime.predictors import read_uses
from runtime.recorder import read_texts
from runtime.rounding import held_in
from schemas.calibration import Calibration, Setting, Situation
from schemas.checkpoint import read_checkpoint
from schemas.precision import PRECISIONS
from schemas.sizes import sizes_of_checkpoint
from schemas.units import parse_share
from tests.bench.given import MODEL, TEXTS


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


def judge(bench: Bench, found: Calibration, setting: Setting, name: str, capacity: int) -> None:
    plain = Supply(bench.supply.layers, bench.supply.experts, capacity)
    exact_bench = Bench(bench.model, bench.pieces, plain, bench.top_k)
    exact = exact_bench.run(Exact(), is_lru=True, keep=True)
    compared = replace(exact_bench, supply=bench.supply)  # with its predictions
    policy = policy_of(setting.shares, is_whole=False, prices=Prices.of(found), stand_in=found.stand_in)
    account = importance_of(found, setting.budget).controller
    with held_in(bench.model, found.situation.precision):
        run = compared.run(policy, account=account)
    rise, loads, base = Rise.between(exact, run), run.waits.sum(), exact.waits.sum()
    low, high = (math.expm1(rise.mean + sign * 1.96 * rise.error) for sign in (-1, 1))
    print(
        f"  {name:28s} perplexity {math.expm1(rise.mean):+.2%} ({low:+.2%} … {high:+.2%}), KL {run.divergence:.4f}, "
        f"loads per token {loads:.2f} of {base:.2f} = {loads / base:.1%}, at last {account.scale:.0%} of its shares",
        flush=True,
    )


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default=MODEL)
@click.argument("texts", type=click.Path(path_type=Path, exists=True), default=TEXTS)
@click.option("--capacity", "capacities", multiple=True, type=int, default=(8, 16))
@click.option("--budget", "budgets", multiple=True, default=("0.5 %",))
@click.option("--mixed", default="code,dialogue,prose")
@click.option("--single", default="code,dialogue,prose,math,french")
@click.option("--tokens", default=24576)
@click.option("--uses", type=click.Path(path_type=Path), help="Of agent learn --kind uses: what caches evict by.")
@click.option("--held", type=click.Choice(PRECISIONS), default="checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(model, texts, capacities, budgets, mixed, single, tokens, uses, held, output):
    torch.set_num_threads(1)
    checkpoint, tokenizer = read_checkpoint(model), load_tokenizer(model)
    spec, size = checkpoint.model_spec, sizes_of_checkpoint(checkpoint, "checkpoint")[held]
    loaded = load_whole(model, dtype="float32")
    domains = mixed.split(",")
    foreseen = read_uses(uses, spec)
    for capacity in capacities:
        slots, began = min(capacity * spec.expert_bytes // size, spec.experts), time.perf_counter()
        supply = Supply(spec.layers, spec.experts, slots, uses=foreseen)
        text = pieces(tokenizer, texts, domains, "calibration", tokens)
        situation = Situation(capacity=slots, eviction="steady" if foreseen is None else "learned", precision=held)
        wanted = [parse_share(each) for each in budgets]
        found = calibrate(
            Bench(loaded, text, supply, spec.top_k),
            model=spec.id,
            situation=situation,
            budgets=wanted,
            priced=pieces(tokenizer, texts, domains, "calibration", 4 * tokens),
        )
        seconds = time.perf_counter() - began
        if output is not None:
            (output / f"{spec.id}-{capacity}.json").write_text(found.model_dump_json(indent=1) + "\n")
        told = "" if held == "checkpoint" else f" (in their memory, {slots} in {held})"
        for setting in found.settings:
            print(
                f"{capacity} of {spec.experts}{told}, budget {setting.budget:.2%}: calibrated on {found.tokens} tokens in "
                f"{seconds:.0f} s, {setting.rise:+.2%} ({setting.low:+.2%} … {setting.high:+.2%}) there",
                flush=True,
            )
            text = pieces(tokenizer, texts, domains, "eval", 2 * tokens)
            judge(Bench(loaded, text, supply, spec.top_k), found, setting, mixed, capacity)
            for domain in single.split(",") if single else ():
                text = pieces(tokenizer, texts, [domain], "eval", tokens // 2)
                judge(Bench(loaded, text, supply, spec.top_k), found, setting, domain, capacity)


if __name__ == "__main__":
    main()
