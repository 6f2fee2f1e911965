"""Reading YAML and JSON files into schemas, with every fault named at once: file, line, key, value, limit.

Decides how faults are told, and that a file is written whole or not at all. PyYAML is the one library besides pydantic
that schemas may use, since the line of a key is known only to the parser. Must not know what any schema means.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from schemas.outcome import ExitCode

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a file: the key path (as in ``nodes[1].memory.device``) and what is wrong there."""

    key: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}, " if self.line is not None else ""
        return f"{where}{self.key}: {self.message}" if self.key else f"{where}{self.message}"


class InvalidFile(ValueError):
    """A file that says something wrong; carries all faults found in it."""

    def __init__(self, path: Path, faults: Iterable[Fault]) -> None:
        self.path = path
        self.faults = tuple(faults)
        super().__init__("\n".join(f"{path}: {fault}" for fault in self.faults))


class CannotWrite(OSError):
    """A file that could not be written; nothing of it is left."""

    exit_code = ExitCode.FAILED

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path}: cannot be written: {reason}; what was there before is as it was")


def load_yaml(path: Path, model: type[Model], check: Callable[[Model], Iterable[Fault]] | None = None) -> Model:
    """Read a YAML file as `model`; `check` adds faults that only the whole document shows.

    Raises
    ------
    InvalidFile
        With every fault, each with its line where the file has one.
    """
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not YAML"
        raise InvalidFile(path, [Fault("", str(problem), mark.line + 1 if mark else None)]) from error
    lines = _lines(node)
    return _validate(path, json_text(path, document), model, check, lines)


def load_json(path: Path, model: type[Model], check: Callable[[Model], Iterable[Fault]] | None = None) -> Model:
    """Read a JSON file as `model`, like `load_yaml` but without lines."""
    return _validate(path, read_text(path), model, check, {})


def read_text(path: Path) -> str:
    """Read a text file, or say in one line why not."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidFile(path, [Fault("", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise InvalidFile(path, [Fault("", "is not UTF-8 text")]) from error


def write_atomic(path: Path, text: str) -> None:
    """Write `path` whole or not at all: a temporary file beside it, flushed to disk, then renamed.

    What a link names is written, and the link stays. A device or a pipe (/dev/null, /dev/stdout) takes the text as is.

    Raises
    ------
    CannotWrite
        The disk is full, the directory is not there, or the like.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            _write_renamed(path.resolve() if path.is_symlink() else path, text)
    except OSError as error:
        raise CannotWrite(path, error.strerror or str(error)) from error


def _write_renamed(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise


def json_text(path: Path, document: Any) -> str:
    """Turn a parsed YAML document into JSON text, which strict schemas validate."""
    if not isinstance(document, dict):
        raise InvalidFile(path, [Fault("", f"expected keys and values, got {type(document).__name__}")])
    if faults := [Fault(where, f"is {value}, not a number to plan by") for where, value in _not_finite(document)]:
        raise InvalidFile(path, faults)
    try:
        return json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidFile(path, [Fault("", f"has a value that JSON cannot hold ({error}); quote it")]) from error


def _not_finite(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Yield where a document has a number that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _not_finite(part, f"{where}[{index}]")


def _validate(
    path: Path,
    text: str,
    model: type[Model],
    check: Callable[[Model], Iterable[Fault]] | None,
    lines: dict[tuple[str | int, ...], int],
) -> Model:
    try:
        value = model.model_validate_json(text)
    except ValidationError as error:
        raise InvalidFile(path, [_fault(item, lines) for item in _root_causes(error.errors())]) from error
    faults = [Fault(f.key, f.message, f.line or lines.get(parse_key(f.key))) for f in check(value)] if check else []
    if faults:
        raise InvalidFile(path, faults)
    return value


def _root_causes(items: list[Any]) -> Iterator[Any]:
    """Leave out "too short" faults of lists whose items are what is really wrong."""
    for item in items:
        inside = [other for other in items if other is not item and other["loc"][: len(item["loc"])] == item["loc"]]
        if item["type"] != "too_short" or not inside:
            yield item


def _fault(item: Any, lines: dict[tuple[str | int, ...], int]) -> Fault:
    location = tuple(item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "unknown key; remove it or check its spelling"
    elif item["type"] != "missing" and "got" not in message and repr(item["input"]) not in message:
        shown = repr(item["input"])
        message += f", got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    line = next((lines[location[:n]] for n in range(len(location), -1, -1) if location[:n] in lines), None)
    return Fault(format_key(location), message, line)


def format_key(location: Iterable[str | int]) -> str:
    """Write a key path.

    >>> format_key(("nodes", 1, "memory"))
    'nodes[1].memory'
    """
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse_key(text: str) -> tuple[str | int, ...]:
    """Read a key path back.

    >>> parse_key("nodes[1].memory")
    ('nodes', 1, 'memory')
    """
    parts = text.replace("[", ".[").split(".")
    return tuple(int(part[1:-1]) if part.startswith("[") else part for part in parts if part)


def _lines(node: yaml.Node | None, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    """Line (from 1) of every key path of a YAML document."""
    if node is None:
        return {}
    found = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found.update(_lines(value, (*path, str(key.value))))
            found[(*path, str(key.value))] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found.update(_lines(value, (*path, index)))
    return found
