"""The `agent` command. Decides how it is spelled and how errors are told; everything else is elsewhere.

Imports torch and transformers only in the commands that need them, so that `--help` and `generate` start fast.
"""

import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

import click

from agent.calibrating import COMMANDS as CALIBRATE_COMMANDS
from agent.learning import COMMANDS as LEARN_COMMANDS
from agent.offline import COMMANDS as OFFLINE_COMMANDS
from agent.options import coordinator_option, require_directory
from agent.replaying import COMMANDS as REPLAY_COMMANDS
from agent.scoring import COMMANDS as SCORE_COMMANDS
from runtime.reads import READ_WAYS, ReadWay
from schemas.checkpoint import InvalidCheckpoint
from schemas.files import InvalidFile
from schemas.outcome import ExitCode
from schemas.precision import PRECISIONS, Precision
from schemas.tracing import MOST, TracePart
from schemas.units import format_bytes, parse_bytes


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expertmesh", prog_name="agent")
def cli() -> None:
    """One node of an ExpertMesh: prepares weights, runs a node, generates text."""


@cli.command()
@click.option("--config", required=True, type=click.Path(path_type=Path), help="The agent's YAML file.")
@click.option("--verbose", "-v", is_flag=True, help="Log every change.")
@click.option(
    "--device-budget", metavar="SIZE",
    help="Take no more of the device than this, 600MiB say, whatever the plan gives; see agent budget.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice([*PRECISIONS, "plan"]),
    help="Hold experts so, whatever the config says; plan: as the first plan that gives it some wants them.",
)  # fmt: skip
def run(config: Path, verbose: bool, device_budget: str | None, precision: str | None) -> None:
    """Run this node's agent until it is stopped."""
    from agent.settings import load_settings

    settings = load_settings(config)
    if device_budget is not None:
        settings = settings.model_copy(update={"device_budget": _size(device_budget)})
    if precision is not None:
        settings = settings.model_copy(update={"precision": precision})
    stop = threading.Event()
    _on_signal(lambda *_: os._exit(ExitCode.DONE))  # nothing runs yet; torch, as it is imported, drops exceptions
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))  # read once, when torch is imported
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format=f"%(asctime)s {settings.node} %(message)s",
        stream=sys.stderr,
    )
    from agent.node import Node

    node = Node(settings, stop.is_set)
    _on_signal(lambda *_: stop.set())
    try:
        node.run()
    finally:
        node.close()
    click.echo(f"agent of {settings.node} stopped", err=True)
    gc.freeze()  # all is closed; to collect what torch and transformers made takes a second or more at exit


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@cli.command()
@click.argument("node")
@click.argument("size")
@coordinator_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def budget(node: str, size: str, coordinator: str, as_json: bool) -> None:
    """Let the agent of NODE take SIZE (400MiB, say) of its device from now on, trunk and KV cache included.

    Experts that the plan gives it beyond that stay on its disk and are loaded when they are asked for. It holds until
    the agent ends, and cannot exceed memory.device of its config.
    """
    from agent.client import change_budget

    asked = _size(size)
    changed = change_budget(node, coordinator, asked)
    if changed.device < asked:
        click.echo(f"{node}: memory.device of its config allows no more than {format_bytes(changed.device)}", err=True)
    if as_json:
        click.echo(json.dumps(changed.model_dump(exclude={"type"})))
        return
    click.echo(
        f"{node}: {format_bytes(changed.device)} of the device, of which experts may take "
        f"{format_bytes(changed.experts)} and take {format_bytes(changed.used)}"
    )


def _on_signal(handle: Callable[..., object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


@cli.command()
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--node", help="Where the prompt enters: an ingress of the topology.")
@click.option("--local", type=click.Path(path_type=Path), metavar="MODEL", help="No cluster: a checkpoint or a store.")
@click.option(
    "--trace-file", type=click.Path(path_type=Path),
    help="Write steps, layers, loads and hops, node by node, for a trace viewer (ui.perfetto.dev).",
)  # fmt: skip
@click.option(
    "--torch-device", metavar="DEVICE", default="cpu", show_default=True,
    help="With --local: where to compute, cuda or cuda:1 say; on the processor where that cannot be.",
)  # fmt: skip
@click.option("--device-budget", metavar="SIZE", help="With --local: memory for trunk, KV cache and experts.")
@click.option(
    "--host-budget", metavar="SIZE", help="With --torch-device cuda: pinned host memory for experts beyond the budget.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(get_args(Precision)), default="checkpoint", show_default=True,
    help="With --local: execute every expert in this; a store made with it is read faster.",
)  # fmt: skip
@click.option(
    "--reads", type=click.Choice(READ_WAYS), default="cached", show_default=True,
    help="With --local: read a store's records through the page cache, or past it: it then takes no memory.",
)  # fmt: skip
@click.option(
    "--predictor", type=click.Path(path_type=Path),
    help="With --local: a file of agent learn, instead of the next layer's gate, says what to load ahead.",
)  # fmt: skip
@click.option(
    "--uses", type=click.Path(path_type=Path),
    help="With --local: a file of agent learn --kind uses says which experts make room.",
)  # fmt: skip
@coordinator_option
@click.option("--max-tokens", type=click.IntRange(min=1, max=1 << 20), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0, max=100), default=0.0, help="0, the default, is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0, max=(1 << 63) - 1), default=0, show_default=True)
@click.option(
    "--combine", type=click.Choice(["partial", "ordered"]), default="partial", show_default=True,
    help="ordered is bit-equal to one node, and sends more.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
def generate(
    *,
    node: str | None,
    local: Path | None,
    torch_device: str,
    device_budget: str | None,
    host_budget: str | None,
    trace_file: Path | None,
    precision: Precision,
    predictor: Path | None,
    uses: Path | None,
    reads: ReadWay,
    coordinator: str,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Generate text from the running cluster, or on this machine alone."""
    from agent.client import Answer, stream

    _require_place(
        node,
        local,
        {
            "--torch-device": torch_device != "cpu",
            "--device-budget": device_budget,
            "--host-budget": host_budget,
            "--precision": precision != "checkpoint",
            "--predictor": predictor,
            "--uses": uses,
            "--reads": reads != "cached",
        },
    )
    if trace_file is not None:
        require_directory(trace_file)
    answer = Answer()
    if local is not None:
        from agent.alone import stream_alone

        pieces = stream_alone(
            local,
            answer,
            device=torch_device,
            budget=_size(device_budget) if device_budget else None,
            host_budget=_size(host_budget) if host_budget else None,
            precision=precision,
            predictor=predictor,
            uses=uses,
            reads=reads,
            trace_file=trace_file,
            **wanted,
        )
    else:
        pieces = stream(str(node), coordinator, answer, trace=trace_file is not None, **wanted)
    try:
        for piece in pieces:
            if not as_json:
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        click.echo("", err=True)
        raise click.Abort from None
    finally:
        if not as_json and answer.tokens:
            click.echo()
    if node is not None and trace_file is not None:
        _write_trace(trace_file, answer.trace, node)
    if as_json:
        click.echo(json.dumps(answer.document()))
    elif answer.note:
        from agent.alone import told

        click.echo(told(answer.note), err=True)


def _require_place(node: str | None, local: Path | None, of_local: Mapping[str, object]) -> None:
    """Refuse to generate nowhere, at two places, or in a cluster with what is only asked of one machine."""
    if node is None and local is None:
        raise click.UsageError("give --node NODE of a running cluster, or --local MODEL")
    if node is not None and local is not None:
        raise click.UsageError("--node and --local exclude each other")
    if local is None and (given := [option for option, value in of_local.items() if value]):
        raise click.UsageError(f"{', '.join(given)} {'go' if len(given) > 1 else 'goes'} with --local")


def _write_trace(file: Path, parts: list[TracePart], ingress: str) -> None:
    from agent.clocks import processes
    from runtime.timeline import write_trace

    write_trace(file, processes(parts, ingress))
    silent = sorted({part.node for part in parts if part.is_silent})
    missed = sum(part.missed for part in parts)
    if silent:
        click.echo(f"{file} is without {', '.join(silent)}: no answer in time", err=True)
    if missed:
        click.echo(f"{file} is without the {missed} last spans: a node keeps {MOST} of a request", err=True)


for _command in (*OFFLINE_COMMANDS, *CALIBRATE_COMMANDS, *LEARN_COMMANDS, *REPLAY_COMMANDS, *SCORE_COMMANDS):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command; the one place where errors become a message and an exit code."""
    is_interrupted = threading.Event()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a script's background
        signal.signal(signal.SIGINT, lambda *_: _interrupt(is_interrupted))
    try:
        result = cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if is_interrupted.is_set():  # libraries make other errors of it while they are imported
            click.echo("interrupted", err=True)
            sys.exit(ExitCode.INTERRUPTED)
        code = _exit_code(error)
        if code is None:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(code)
    sys.exit(result if isinstance(result, int) else ExitCode.DONE)


def _interrupt(noted: threading.Event) -> NoReturn:
    noted.set()
    raise KeyboardInterrupt


def _exit_code(error: Exception) -> ExitCode | None:
    """Return the code of a domain error; None for anything unforeseen."""
    if isinstance(error, InvalidFile | InvalidCheckpoint):
        return ExitCode.INVALID
    code = getattr(error, "exit_code", ExitCode.FAILED if isinstance(error, OSError) else None)
    return code if isinstance(code, ExitCode) else None
