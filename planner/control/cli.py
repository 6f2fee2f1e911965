"""Commands that talk to a running cluster: serve, apply, status, counters.

Decides how they are spelled and shown. Must not know how the coordinator decides.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

from planner.control.coordinator import Coordinator
from planner.control.errors import ControlError, CoordinatorAbsent, Refused
from planner.control.journal import Journal
from planner.control.report import status_view
from planner.control.transport import SILENCE_S, ControlClient, CoordinatorSocket
from planner.report import console, movement_text
from schemas import messages as msg
from schemas.activation import ActivationCounts
from schemas.address import Address
from schemas.checkpoint import read_checkpoint
from schemas.files import load_yaml, write_atomic
from schemas.model import ModelSpec
from schemas.outcome import ExitCode
from schemas.plan import load_plan
from schemas.topology import DEFAULT_COORDINATOR_PORT, Topology, load_topology
from schemas.units import format_bytes

DEFAULT_COORDINATOR: Final = f"127.0.0.1:{DEFAULT_COORDINATOR_PORT}"
WATCH_S: Final = 1.0
_REPEAT_S: Final = 3.0
_ALL: Final = "*"

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_coordinator_option = click.option(
    "--coordinator", envvar="EXPERTMESH_COORDINATOR", metavar="HOST:PORT", help="Where planner serve listens."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.command()
@click.argument("topology", type=_FILE)
@click.option(
    "--journal", type=click.Path(dir_okay=False, path_type=Path), help="Where to remember epochs (TOPOLOGY.journal)."
)
@click.option("--verbose", "-v", is_flag=True, help="Log every change.")
def serve(topology: Path, journal: Path | None, verbose: bool) -> None:
    """Run the coordinator of TOPOLOGY's cluster until it is stopped."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    wanted = load_topology(topology)
    model = _model_spec(topology, wanted)
    address = Address(wanted.coordinator.address, wanted.coordinator.port)
    socket = CoordinatorSocket(address)
    try:
        with Journal(journal or topology.with_suffix(".journal"), wanted.cluster) as memory:
            click.echo(f"coordinator of {wanted.cluster} on {address}, epoch {memory.state.epoch}", err=True)
            Coordinator(wanted, model, memory, socket).run(stop.is_set)
    finally:
        socket.close()
    click.echo(f"coordinator of {wanted.cluster} stopped", err=True)


def _model_spec(path: Path, topology: Topology) -> ModelSpec:
    model = path.parent / topology.model
    spec = load_yaml(model, ModelSpec) if model.is_file() else read_checkpoint(model).model_spec
    return spec.held_as(topology.dtype)


@click.command()
@click.argument("plan", type=_FILE)
@click.option("--dry-run", is_flag=True, help="Only ask whether the plan could be applied.")
@_coordinator_option
@_json_option
def apply(plan: Path, dry_run: bool, coordinator: str | None, as_json: bool) -> None:
    """Bring the running cluster to PLAN: pull weights, switch, drop what is left over."""
    wanted = load_plan(plan)
    request = msg.ApplyRequest(plan=wanted, dry_run=dry_run)
    with ControlClient(coordinator or wanted.coordinator) as client:
        try:
            progress = _follow(client, request, quiet=as_json)
        except KeyboardInterrupt:
            told = "interrupted; what the cluster has begun goes on, see planner status"
            raise ControlError(told, ExitCode.INTERRUPTED) from None
    if as_json:
        click.echo(progress.model_dump_json(indent=1))
    if progress.phase == "aborted" and not dry_run:
        raise Refused(_failure(wanted.base_epoch, progress), progress.code)
    if not as_json:
        click.echo(_outcome(progress, dry_run))
        if dry_run and wanted.summary.movement is not None:
            click.echo(movement_text(wanted.summary.movement))


def _failure(base_epoch: int, progress: msg.ApplyProgress) -> str:
    if progress.epoch > base_epoch:
        done = f"epoch {progress.epoch} of {progress.target}"
        return f"plan stopped half-way, at {done}: {progress.message}; apply it again to go on from there"
    return f"plan not applied: {progress.message}"


def _outcome(progress: msg.ApplyProgress, dry_run: bool) -> str:
    if progress.message == "nothing to do":
        return f"nothing to do: epoch {progress.epoch} is active"
    if dry_run:
        absent = f"; no agent is heard for {', '.join(progress.waiting_for)}" if progress.waiting_for else ""
        return (
            f"{progress.message}: epoch {progress.epoch} → {progress.target}, {format_bytes(progress.to_move)} to "
            f"move{absent}"
        )
    return f"epoch {progress.epoch} is active, {format_bytes(progress.to_move)} moved"


def _follow(client: ControlClient, request: msg.ApplyRequest, *, quiet: bool) -> msg.ApplyProgress:
    """Show progress until the plan is reached or given up."""
    screen = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("waiting", total=None, shown="")
        shown = ""
        for progress in _progresses(client, request):
            if progress.final:
                return progress
            waiting = f", waiting for {', '.join(progress.waiting_for)}" if progress.waiting_for else ""
            text = f"epoch {progress.epoch} → {progress.target} {progress.phase}{waiting}"
            moved = f"{format_bytes(progress.moved)} / {format_bytes(progress.to_move)}"
            bar.update(task, description=text, total=progress.to_move or None, completed=progress.moved, shown=moved)
            if not screen.is_terminal and progress.phase != shown:
                shown = progress.phase
                screen.print(f"{text}: {moved}", highlight=False)
    raise AssertionError("progress ends with a final one")


def _progresses(client: ControlClient, request: msg.ApplyRequest) -> Iterator[msg.ApplyProgress]:
    """Yield progress until it is final; asks again where the coordinator was restarted."""
    answer: msg.Message | None = client.ask(request)
    quiet_since = time.monotonic()
    while True:
        if isinstance(answer, msg.Refusal):
            raise Refused(answer.message, answer.code)
        if isinstance(answer, msg.ApplyProgress):
            quiet_since = time.monotonic()
            yield answer
            if answer.final:
                return
        answer = client.receive(_REPEAT_S)
        if answer is None:  # nothing new, or a coordinator that was restarted and does not know us: ask again
            if time.monotonic() - quiet_since > SILENCE_S:
                raise ControlError(
                    "the coordinator stopped answering; what was begun goes on once planner serve runs again, and "
                    "planner apply shows how far it is"
                )
            with suppress(CoordinatorAbsent):
                client.send(request)


@click.command()
@click.option("--watch", is_flag=True, help="Show it again every second until interrupted.")
@click.option(
    "--layers", is_flag=False, flag_value=_ALL, metavar="[NODE]",
    help="Show what each layer met, at one node or all: hits, loads, calls, substitutions, times.",
)  # fmt: skip
@_coordinator_option
@_json_option
def status(watch: bool, layers: str | None, coordinator: str | None, as_json: bool) -> None:
    """Show the nodes of the running cluster and how far its plan is."""
    with ControlClient(coordinator or DEFAULT_COORDINATOR) as client:
        report = _status(client)
        if layers is not None:
            report = report.model_copy(update={"layers": _layers(client, report, layers)})
        if as_json:
            click.echo(report.model_dump_json(indent=1))
        elif watch:
            _watch(client, report)
        else:
            console(sys.stdout).print(status_view(report))


def _watch(client: ControlClient, report: msg.StatusReport) -> None:
    try:
        with Live(status_view(report), console=console(sys.stdout), auto_refresh=False) as live:
            while True:
                live.update(status_view(_status(client)), refresh=True)
                time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return


def _layers(client: ControlClient, report: msg.StatusReport, wanted: str) -> tuple[msg.NodeLayers, ...]:
    """Ask the agents for what they counted layer by layer."""
    names = [node.id for node in report.nodes]
    if wanted not in {_ALL, *names}:
        raise Refused(f"there is no node {wanted!r}; nodes are {', '.join(names)}", ExitCode.INVALID)
    counted = client.ask(msg.CountersRequest(), timeout_s=6.0)
    if not isinstance(counted, msg.CountersReport):
        raise CoordinatorAbsent("whoever answers there is no coordinator of this version")
    return tuple(each for each in counted.layers if wanted in {_ALL, each.node})


def _status(client: ControlClient) -> msg.StatusReport:
    answer = client.ask(msg.StatusRequest())
    if not isinstance(answer, msg.StatusReport):
        raise CoordinatorAbsent("whoever answers there is no coordinator of this version")
    return answer


@click.command()
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@_coordinator_option
def counters(output: Path, coordinator: str | None) -> None:
    """Write the routing that agents counted while serving, for `planner solve --counters`."""
    with ControlClient(coordinator or DEFAULT_COORDINATOR) as client:
        report = client.ask(msg.CountersRequest(), timeout_s=6.0)
    if not isinstance(report, msg.CountersReport):
        raise CoordinatorAbsent("whoever answers there is no coordinator of this version")
    counted = tuple(node for node in report.nodes if node.tokens)
    if not counted:
        raise Refused("no agent has counted a token yet; generate something first", ExitCode.FAILED)
    model = report.model
    document = ActivationCounts(
        cluster=report.cluster,
        model=model.id,
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        nodes=counted,
    )
    write_atomic(output, document.model_dump_json() + "\n")
    if report.missing:
        click.echo(f"without {', '.join(report.missing)}, which did not answer", err=True)
    nodes = "1 node" if len(counted) == 1 else f"{len(counted)} nodes"
    click.echo(f"{output}: {sum(node.tokens for node in counted)} tokens of {nodes}", err=True)


COMMANDS = (serve, apply, status, counters)
