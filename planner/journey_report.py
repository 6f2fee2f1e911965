"""A token's way as text: one line for each path, a table for every layer.

Decides wording and columns only; the figures are those of the plan.
"""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from planner.journey import Leg, legs_of
from schemas.plan import PathSummary
from schemas.units import format_seconds


def path_lines(paths: Sequence[PathSummary], *, why: bool = False) -> Iterator[str]:
    """Yield the ways of tokens, ingresses with the same one together, and where asked why each is as it is."""
    alike: dict[str, list[PathSummary]] = {}
    for path in paths:
        alike.setdefault(_way(path), []).append(path)
    for way, together in alike.items():
        totals = sorted(sum(leg.total_s for leg in legs_of(path)) for path in together)
        ends = dict.fromkeys(format_seconds(total) for total in (totals[0], totals[-1]))
        names, takes = ", ".join(path.ingress for path in together), " … ".join(ends)
        yield f"tokens of {names}: {way}, {takes} each{_prompts(together)}"
        for path in together if why else ():
            yield f"  {path.ingress}: {path.why or cost_text(legs_of(path))}"


def _prompts(paths: Sequence[PathSummary]) -> str:
    """Write how long the first token takes behind prompts that were planned for."""
    planned = [(path.prompt_tokens, path.prompt_s) for path in paths if path.prompt_tokens and path.prompt_s]
    if not planned:
        return ""
    tokens, seconds = (sorted(column) for column in zip(*planned, strict=True))
    sizes = dict.fromkeys((str(tokens[0]), str(tokens[-1])))
    times = dict.fromkeys(format_seconds(value) for value in (seconds[0], seconds[-1]))
    return f", the first one behind a prompt of {' … '.join(sizes)} tokens {' … '.join(times)}"


def _way(path: PathSummary) -> str:
    legs = legs_of(path)
    stays = len(legs) == 1 and legs[0].node == path.ingress
    return "every layer where they enter" if stays else route_text(legs)


def route_text(legs: Sequence[Leg]) -> str:
    """Write a way: ``layers 0 … 7 on a → 8 … 25 on b → back``."""
    way = " → ".join(f"{layers_text(leg)} on {leg.node}" for leg in legs)
    return f"layers {way}{' → back' if any(leg.hops for leg in legs) else ''}"


def layers_text(leg: Leg) -> str:
    """Write the layers of a leg."""
    return str(leg.first_layer) if leg.first_layer == leg.last_layer else f"{leg.first_layer} … {leg.last_layer}"


def cost_text(legs: Sequence[Leg]) -> str:
    """Write what a way takes and of what."""
    compute, waits, hops = (sum(getattr(leg, name) for leg in legs) for name in ("compute_s", "wait_s", "hop_s"))
    return (
        f"{format_seconds(compute + waits + hops)} a token: {format_seconds(compute)} of compute, "
        f"{format_seconds(waits)} of waits, {format_seconds(hops)} of hops"
    )


def leg_table(paths: Sequence[PathSummary]) -> Table:
    """Return one row for each node that tokens of an ingress visit."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("tokens of", "layers", "run on"):
        table.add_column(heading, no_wrap=True)
    for heading in ("calls", "compute", "waits", "hop onward", "together"):
        table.add_column(heading, justify="right")
    for path in paths:
        for leg in legs_of(path):
            times = (leg.compute_s, leg.wait_s, leg.hop_s, leg.total_s)
            table.add_row(path.ingress, layers_text(leg), leg.node, f"{leg.calls:.3g}", *map(format_seconds, times))
        table.add_section()
    return table


def path_table(path: PathSummary) -> Table:
    """Return one row for each decoder layer of a path, with the seconds since the token entered."""
    table = Table(
        title=f"a token of {path.ingress}, layer by layer", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("layer", justify="right")
    table.add_column("run on", no_wrap=True)
    for heading in ("compute", "wait", "hop onward", "so far"):
        table.add_column(heading, justify="right")
    passed = 0.0
    for layer in path.layers:
        passed += layer.compute_s + layer.wait_s + layer.hop_s
        times = (layer.compute_s, layer.wait_s, layer.hop_s, passed)
        table.add_row(str(layer.layer), layer.node, *("" if time == 0 else format_seconds(time) for time in times))
    return table
