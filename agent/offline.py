"""Commands that need no cluster: `agent prepare` and `agent trace`.

Decides how their options are told and their progress shown. The work is done by `runtime.store` and
`runtime.recorder`; errors are left to the command line's one place that reports them.
"""

import json
from pathlib import Path
from typing import Any, Final

import click

from agent.options import DTYPES, progress_bar, require_directory
from schemas.precision import LOW_PRECISIONS, LowPrecision
from schemas.units import format_bytes


def _report(as_json: bool, document: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(document) if as_json else text)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", "store", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--dtype", type=click.Choice(DTYPES), default="checkpoint", show_default=True, help="Of the records.")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(LOW_PRECISIONS),
    help="Write every expert once more in fewer bits; may be given twice.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def prepare(*, model: Path, store: Path, dtype: Any, precisions: tuple[LowPrecision, ...], as_json: bool) -> None:
    """Write MODEL, a Hugging Face directory, as content-addressed records into a store: experts and trunk."""
    from runtime.store import prepare_store

    with progress_bar("Preparing", "records") as progress:
        manifest = prepare_store(model, store, dtype=dtype, precisions=precisions, progress=progress)
    spec, count = manifest.model, len(manifest.records)
    trunk_bytes = sum(part.bytes for part in manifest.trunk)
    document = {
        "store": str(store),
        "model": spec.id,
        "dtype": manifest.dtype,
        "layers": spec.layers,
        "experts": spec.experts,
        "records": count,
        "trunk_parts": len(manifest.trunk),
        "trunk_bytes": trunk_bytes,
        "bytes": count * spec.expert_bytes,
        "packed_bytes": {each.layout.precision: count * each.layout.bytes for each in manifest.packed},
    }
    size = format_bytes(count * spec.expert_bytes)
    low = "".join(
        f"once more as {each.layout.precision}, {format_bytes(count * each.layout.bytes)}, " for each in manifest.packed
    )
    _report(
        as_json,
        document,
        f"{store}: {count} experts ({spec.layers} layers × {spec.experts}) of {spec.id} as {manifest.dtype}, {size}, "
        f"{low}and the trunk in {len(manifest.trunk)} parts, {format_bytes(trunk_bytes)}",
    )


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="A .jsonl or text file.")
@click.option("--import", "csv_file", type=click.Path(path_type=Path), help="Convert a *.route.csv instead.")
@click.option("--workload", help="Name of the workload; of an import, the file's name by default.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Trace file to write.")
@click.option("--tokens", type=click.IntRange(min=1), help="Stop after this many tokens.")
@click.option("--candidates", type=click.IntRange(min=1), help="Ranked experts to record per layer.  [default: 2 K]")
@click.option(
    "--window", type=click.IntRange(min=1), default=1024, show_default=True, help="Longest context in tokens."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="checkpoint", show_default=True, help="To compute in.")
@click.option("--guesses", is_flag=True, help="Record too what each layer's gate would have guessed one layer before.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def trace(
    *,
    model: Path | None,
    texts: tuple[Path, ...],
    csv_file: Path | None,
    workload: str | None,
    output: Path,
    tokens: int | None,
    candidates: int | None,
    window: int,
    dtype: Any,
    guesses: bool,
    as_json: bool,
) -> None:
    """Record which experts MODEL, a Hugging Face directory, chooses for texts, or import a recorded route."""
    from runtime.recorder import import_route_csv, read_texts, record_trace

    require_directory(output)
    dropped = 0
    if csv_file is not None:
        if model is not None or texts or guesses:
            raise click.UsageError("--import takes neither MODEL nor --text, and no --guesses")
        recorded, dropped = import_route_csv(csv_file, workload=workload)
    else:
        if model is None or not texts or not workload:
            raise click.UsageError("give MODEL, --text and --workload, or --import FILE")
        with progress_bar("Recording", "tokens") as progress:
            recorded = record_trace(
                model,
                read_texts(texts),
                workload=workload,
                candidates=candidates,
                max_tokens=tokens,
                window=window,
                dtype=dtype,
                has_guesses=guesses,
                progress=progress,
            )
    recorded.write(output)
    count, layers, width = recorded.expert_ids.shape
    document = {
        "trace": str(output),
        "model": recorded.model,
        "workload": recorded.workload,
        "tokens": count,
        "dropped_tokens": dropped,
        "layers": layers,
        "experts": recorded.experts,
        "top_k": recorded.top_k,
        "candidates": width,
        "sequences": len(set(recorded.sequence.tolist())),
    }
    left_out = f" ({dropped} tokens without all layers left out)" if dropped else ""
    _report(
        as_json,
        document,
        f"{output}: {count} tokens{left_out} of {recorded.model}, workload {recorded.workload}: "
        f"{layers} layers × {recorded.experts} experts, top-{recorded.top_k}, {width} candidates",
    )


COMMANDS: Final = (prepare, trace)
