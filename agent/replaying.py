"""`agent replay`: any cache policy on any recorded trace, without a model.

Decides how capacities, policies and costs are spelled. The work is done by `runtime.replay`; `agent.replay_table` shows
what came of it.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, get_args

import click

from agent.settings import EvictionName
from schemas.units import format_bytes, format_share, parse_bytes, parse_seconds, parse_share

if TYPE_CHECKING:
    from runtime.policy.guessing import Predictor
    from runtime.policy.learned import Weights
    from runtime.replay import Guess, LookAhead, Recording, Replayed, Situation

EVICTION_NAMES: Final[tuple[str, ...]] = get_args(EvictionName)
ROUTING_NAMES: Final = (
    "exact",
    "mass",
    "mass-weighted",
    "mass-whole",
    "smoe",
    "cache-prior",
    "drop-cold",
    "adaptive",
    "hobbit",
    "buddy",
)
PREFETCH_NAMES: Final = ("none", "gate", "previous", "coactivation", "learned", "file")
LEARNT_SHARE: Final = 0.7
"""Of a trace's tokens; what is learnt from them is judged on the rest."""

Rule = tuple[str, float]
Named = TypeVar("Named")


class Capacity(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """Experts that fit: a count, a share of all, or bytes."""

    name = "capacity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return what kind of number it is, and the number."""
        text = str(value).strip()
        try:
            if text.isdigit():
                return "experts", float(text)
            return ("share", parse_share(text)) if text.endswith("%") else ("bytes", float(parse_bytes(text)))
        except ValueError as error:
            self.fail(f"{error}; write a count (256), a share (12.5 %) or bytes (600 MiB)", param, ctx)


class RoutingRule(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A routing policy and its number: ``mass=0.08``."""

    name = "rule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rule:
        """Return name and number."""
        name, _, number = str(value).partition("=")
        if name not in ROUTING_NAMES:
            self.fail(f"no routing policy {name!r}; there are {', '.join(ROUTING_NAMES)}", param, ctx)
        if name == "exact":
            return name, 0.0
        try:
            found = float(number)
        except ValueError:
            found = -1.0
        if not 0 <= found <= 10:
            self.fail(f"{value}: {name} needs a number in 0 … 10, as in {name}=0.08; 0 is exact", param, ctx)
        return name, found


class PrefetchRule(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """What guesses the next layer's experts, and how many loads a layer has time for: ``learned=2``."""

    name = "rule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return name and number; 0 stands for as many as a token has experts."""
        name, equals, number = str(value).partition("=")
        if name not in PREFETCH_NAMES:
            self.fail(f"no prefetch policy {name!r}; there are {', '.join(PREFETCH_NAMES)}", param, ctx)
        if not equals:
            return name, 0
        if name == "none" or not number.isdigit() or not 1 <= int(number) <= 4096:
            self.fail(f"{value}: a count of loads in 1 … 4096 goes behind a name, as in learned=2", param, ctx)
        return name, int(number)


class ReloadTime(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A share of the experts, and what bringing one of them back takes: ``30%=20ms``."""

    name = "share=time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Return the share and seconds."""
        share, _, time = str(value).partition("=")
        try:
            return parse_share(share), parse_seconds(time)
        except ValueError as error:
            self.fail(f"{value}: {error}; write a share of the experts and a time, as in 30%=20ms", param, ctx)


class Policies(NamedTuple):
    """What is to be combined."""

    evictions: tuple[str, ...]
    routings: tuple[Rule, ...]
    prefetches: tuple[tuple[str, int], ...]


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--capacity", "capacities", type=Capacity(), multiple=True, default=("8 %",), show_default=True,
    help="Experts that fit: a count, a share of all, or bytes. May be given several times.",
)  # fmt: skip
@click.option(
    "--eviction", "evictions", type=click.Choice(EVICTION_NAMES), multiple=True, default=EVICTION_NAMES,
    help="May be given several times; all by default.",
)  # fmt: skip
@click.option(
    "--routing", "routings", type=RoutingRule(), multiple=True, default=("exact",),
    help=f"NAME=NUMBER, may be given several times: {', '.join(ROUTING_NAMES)}.",
)  # fmt: skip
@click.option(
    "--prefetch", "prefetches", type=PrefetchRule(), multiple=True, default=("none",),
    help="NAME, or NAME=LOADS where so many fit into a layer's time; may be given several times: "
    f"{', '.join(PREFETCH_NAMES)}. coactivation and learned learn from the first 70 % of the tokens, and the rest "
    "counts.",
)  # fmt: skip
@click.option("--guesses", type=click.IntRange(1, 4096), help="Experts guessed for each token.  [default: top-k]")
@click.option(
    "--predictor", type=click.Path(dir_okay=False, path_type=Path), help="Of agent learn, for --prefetch file.",
)  # fmt: skip
@click.option("--per-layer", is_flag=True, help="The capacity is of each layer's own cache, not of one for all.")
@click.option("--expert-bytes", help="Bytes of an expert, where the trace does not say.")
@click.option(
    "--reload", "reloads", type=ReloadTime(), multiple=True,
    help="SHARE=TIME: what bringing back an expert of this share of them takes, as in 70%=1ms and 30%=20ms; which ones "
    "these are is drawn. For cost-aware, and for the time that loads take.",
)  # fmt: skip
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw hit rates (FILE.svg).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def replay(
    *,
    trace: Path,
    capacities: tuple[tuple[str, float], ...],
    evictions: tuple[str, ...],
    routings: tuple[Rule, ...],
    prefetches: tuple[tuple[str, int], ...],
    guesses: int | None,
    predictor: Path | None,
    per_layer: bool,
    expert_bytes: str | None,
    reloads: tuple[tuple[float, float], ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay TRACE (a trace file or a *.route.csv) against a cache of experts, under several policies."""
    from agent.replay_table import draw, print_table
    from runtime.recording import read_recording

    if plot and (plot.suffix != ".svg" or not plot.absolute().parent.is_dir()):
        raise click.UsageError(f"--plot {plot}: write a file that ends in .svg, in a directory that exists")
    recording = _sized(read_recording(trace), expert_bytes)
    policies = Policies(_once(evictions), _once(routings), _once(prefetches))
    _require_candidates(recording, policies.routings)
    look = _Foresight(recording, [name for name, _ in policies.prefetches], guesses or recording.top_k, predictor)
    base = _situation(recording, reloads, first=look.first, per_layer=per_layer)
    rooms = [_room(recording, base, kind, number) for kind, number in dict.fromkeys(capacities)]
    results = list(_results(recording, rooms, policies, look))
    if plot:
        draw(plot, recording, results, per_layer=per_layer)
    if as_json:
        rows = [
            {**dataclasses.asdict(r), "hit_rate": r.hit_rate, "loads_per_token": r.loads_per_token} for r in results
        ]
        document = {"trace": recording.name, "experts": recording.num_experts, "first": look.first, "policies": rows}
        click.echo(json.dumps(document))
        return
    print_table(recording, results, first=look.first)


def _once(named: tuple[Named, ...]) -> tuple[Named, ...]:
    """Return each of them once, in order."""
    return tuple(dict.fromkeys(named))


class _Foresight:
    """Makes what looks ahead, and knows which tokens may be judged.

    Attributes
    ----------
    first
        The first decoded token that counts: those before were learnt from.
    """

    def __init__(self, recording: "Recording", names: list[str], count: int, file: Path | None) -> None:
        if "gate" in names and not recording.has_guesses:
            raise click.UsageError(
                f"--prefetch gate: {recording.name} does not hold what the next layer's gate would have guessed; "
                "record a trace with agent trace --guesses"
            )
        if ("file" in names) != (file is not None):
            raise click.UsageError("--prefetch file and --predictor FILE go together")
        self._recording, self._count, self._file = recording, count, file
        self.first = 0
        if {"coactivation", "learned"} & set(names):
            self.first = int(LEARNT_SHARE * recording.decode_tokens)

    def look_ahead(self, name: str, loads: int) -> "LookAhead | None":
        """Return what loads ahead under one policy, fresh."""
        from runtime.replay import LookAhead, predicted, recorded

        recording = self._recording
        if name == "none":
            return None
        guess: Guess = recorded
        if name != "gate":
            guess = predicted(self._predictor(name), recording.layers, recording.top_k, self._count)
        return LookAhead(guess, loads or recording.top_k)

    def _predictor(self, name: str) -> "Predictor":
        from runtime.policy.guessing import Previous
        from runtime.policy.learned import Learned
        from runtime.predictors import learn, predictor_for

        recording = self._recording
        match name:
            case "file":
                return predictor_for(
                    self._file or Path(), layers=recording.layers, experts=recording.experts, top_k=recording.top_k
                )
            case "learned":
                return Learned(self._weights)
            case "coactivation":
                return learn("coactivation", recording.lesson(self.first))
        return Previous(recording.layers, recording.experts)

    @cached_property
    def _weights(self) -> "Weights":
        """The network, trained once; it takes a while."""
        from runtime.policy.learned import train

        return train(*self._recording.lesson(self.first)[:3])


def _sized(recording: "Recording", expert_bytes: str | None) -> "Recording":
    """Give experts the size that was asked for."""
    import numpy as np

    if expert_bytes is None:
        return recording
    try:
        size = float(parse_bytes(expert_bytes))
    except ValueError as error:
        raise click.UsageError(f"--expert-bytes: {error}") from error
    if not size:
        raise click.UsageError("--expert-bytes: an expert of 0 bytes needs no cache; write its size, as in 9 MiB")
    return dataclasses.replace(recording, expert_bytes=np.full(recording.layers, size))


def _require_candidates(recording: "Recording", routings: tuple[Rule, ...]) -> None:
    """Refuse to substitute where a trace has nothing to substitute by."""
    stand_ins = {"mass", "mass-whole", "smoe", "cache-prior", "buddy"}
    asked = [name for name, _ in routings if name in stand_ins]
    if asked and not recording.has_candidates:
        raise click.UsageError(
            f"--routing {asked[0]} replaces experts by lower-ranked ones, but {recording.name} has only the "
            f"{recording.top_k} that were chosen; record a trace with --candidates {2 * recording.top_k} or more"
        )


def _situation(
    recording: "Recording", reloads: tuple[tuple[float, float], ...], *, first: int, per_layer: bool
) -> "Situation":
    """Return the situation but for the room: which tokens count, and what loads take."""
    from runtime.replay import Situation, drawn_reload_s

    if reloads and not math.isclose(sum(share for share, _ in reloads), 1.0, abs_tol=1e-6):
        given = format_share(sum(share for share, _ in reloads))
        raise click.UsageError(f"--reload: the shares add up to {given}, not to 100 %")
    seconds = drawn_reload_s(recording.num_experts, reloads) if reloads else None
    return Situation(0, per_layer=per_layer, first=first, reload_s=seconds)


def _room(recording: "Recording", base: "Situation", kind: str, number: float) -> "Situation":
    """Return the situation with its room; in bytes where these were given."""
    total = recording.experts if base.per_layer else recording.num_experts
    if kind == "bytes":
        if recording.expert_bytes is None:
            raise click.UsageError(
                "--capacity in bytes needs --expert-bytes: the trace does not say how large they are"
            )
        needed = recording.top_k * float(recording.expert_bytes.max())
        if number < needed:
            raise click.UsageError(
                f"--capacity: {format_bytes(number)} is too little: a token needs {recording.top_k} experts of a layer "
                f"at once, {format_bytes(needed)}"
            )
        return dataclasses.replace(base, slots=int(number), in_bytes=True)
    slots = min(round(number * total) if kind == "share" else int(number), total)
    if slots < recording.top_k:
        raise click.UsageError(
            f"--capacity: {slots} experts fit, but a token needs {recording.top_k} of a layer at once; give it room "
            f"for {recording.top_k} at least ({format_share(recording.top_k / total)} of all)"
        )
    return dataclasses.replace(base, slots=slots)


def _results(
    recording: "Recording", rooms: list["Situation"], policies: Policies, look: _Foresight
) -> Iterator["Replayed"]:
    from runtime.replay import belady, eviction_of, replay, routing_of

    combined = list(product(policies.routings, policies.evictions, policies.prefetches))
    with click.progressbar(length=len(rooms) * (1 + len(combined)), file=sys.stderr) as bar:
        for room in rooms:
            best = belady(recording, room)
            bar.update(1)
            for routing, name, (prefetch, loads) in combined:
                shown = routing[0] if routing[0] == "exact" else f"{routing[0]}={routing[1]:g}"
                guessed_by = f"{prefetch}={loads}" if loads else prefetch
                found = replay(
                    recording,
                    room,
                    eviction_of(recording, name, room),
                    routing_of(recording, *routing),
                    names=(name, shown, guessed_by),
                    ahead=look.look_ahead(prefetch, loads),
                )
                bar.update(1)
                yield dataclasses.replace(found, belady_hit_rate=best.hit_rate)
            yield dataclasses.replace(best, belady_hit_rate=best.hit_rate)


COMMANDS: Final = (replay,)
