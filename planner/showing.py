"""The commands that look at plans and file formats: `show`, `diff`, `report` and `schema`.

Decides how much of a plan is printed. Must not know how one is made.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import click

from planner.options import EXISTING, json_option, print_json, require_directory
from schemas.activation import ActivationCounts, TraceHeader
from schemas.base import FrozenModel
from schemas.files import write_atomic
from schemas.model import ModelSpec
from schemas.plan import Plan, load_plan
from schemas.topology import Topology

SCHEMAS: Mapping[str, type[FrozenModel]] = {
    "topology": Topology,
    "plan": Plan,
    "model": ModelSpec,
    "trace": TraceHeader,
    "counters": ActivationCounts,
}


@click.command()
@click.argument("plan", type=EXISTING)
@click.option("-v", "--verbose", count=True, help="Also why, every expert and every layer; twice for every step.")
@json_option
def show(plan: Path, verbose: int, *, as_json: bool) -> None:
    """Summarise a plan: what changes, and what it promises."""
    loaded = load_plan(plan)
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        show_plan(loaded, verbose)


def show_plan(plan: Plan, verbose: int) -> None:
    """Print what a plan changes and promises; with `verbose` also why, and every expert, layer and step."""
    from planner.journey_report import path_lines, path_table
    from planner.report import console, layer_table, node_table, plan_lines, reason_lines, step_lines

    out, paths = console(sys.stdout), plan.summary.paths or ()
    _print_lines(plan_lines(plan))
    _print_lines(path_lines(paths, why=verbose > 0))
    out.print(node_table(plan))
    if verbose:
        _print_lines(reason_lines(plan))
        out.print(layer_table(plan), *map(path_table, paths), sep="")
    if verbose > 1:
        _print_lines(step_lines(plan))


@click.command()
@click.argument("plan", type=EXISTING)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.html")
def report(plan: Path, output: Path) -> None:
    """Write a plan as a page to look at: the way of a token as a picture, nodes, layers, and why."""
    from planner.page import plan_page

    require_directory(output)
    write_atomic(output, plan_page(load_plan(plan)))
    click.echo(f"wrote {output}")


@click.command()
@click.argument("first", type=EXISTING)
@click.argument("second", type=EXISTING)
@click.option("-v", "--verbose", is_flag=True, help="List every replica.")
@json_option
def diff(first: Path, second: Path, *, verbose: bool, as_json: bool) -> None:
    """Say in what the placements of two plans differ."""
    from planner.report import console, difference, difference_table

    before, after = load_plan(first), load_plan(second)
    change = difference(before, after)
    if as_json:
        print_json(change)
        return
    added, dropped = change["added"], change["dropped"]
    if change["same_placement"]:
        others = (f", other {what}" for what in ("routes", "paths", "precisions") if not change[f"same_{what}"])
        click.echo("same placement" + "".join(others))
        return
    paths = "" if change["same_paths"] else ", tokens take other paths"
    paths += "" if change["same_precisions"] else ", nodes hold experts in other precisions"
    click.echo(f"{len(added)} replicas added, {len(dropped)} dropped, {change['kept']} kept{paths}")
    console(sys.stdout).print(difference_table(before, after))
    for sign, records in (("+", added), ("-", dropped)):
        for record in records if verbose else ():
            click.echo(
                f"{sign} layer {record['layer']} expert {record['expert']} on {record['node']} ({record['tier']})"
            )


@click.command()
@click.argument("name", type=click.Choice(sorted(SCHEMAS)))
def schema(name: str) -> None:
    """Print the JSON Schema of a file format."""
    print_json(SCHEMAS[name].model_json_schema())


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


COMMANDS: Final = (show, report, diff, schema)
