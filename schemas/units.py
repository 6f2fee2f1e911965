"""Quantities as users write them ("500 Mbit/s", "1.2 MiB", "2 ms", "0.5 %") and as the code computes with them.

Decides which spellings are legal and what range is believable. Inside the program bytes are int, times are
seconds, bandwidths are bytes per second and shares are fractions, all plain numbers.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_QUANTITY: Final = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\s\d].*?)?\s*")

_BYTE_UNITS: Final = {
    "B": 1.0,
    **{p + "B": 1e3**i for i, p in enumerate(("k", "M", "G", "T"), start=1)},
    **{p + "iB": 1024.0**i for i, p in enumerate(("K", "M", "G", "T"), start=1)},
}
_TIME_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_BANDWIDTH_UNITS: Final = {
    **{p + "bit/s": 1e3**i / 8 for i, p in enumerate(("", "k", "M", "G", "T"))},
    **{unit + "/s": scale for unit, scale in _BYTE_UNITS.items()},
}
_SHARE_UNITS: Final = {"%": 0.01}

MAX_BYTES: Final = 1 << 50  # 1 PiB: more than any node has, so a slip of the pen
MAX_SECONDS: Final = 3600.0
MIN_BANDWIDTH: Final = 125.0  # 1 kbit/s
MAX_BANDWIDTH: Final = 12.5e12  # 100 Tbit/s


def _parse(value: Any, units: dict[str, float], *, example: str, bare: bool) -> float:
    """Turn `value` (text with a unit, or a bare number where `bare`) into a float in the base unit."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected a quantity such as {example!r}, got {value!r}")
    if isinstance(value, (int, float)):
        if not bare:
            raise ValueError(f"{value!r} has no unit; write it as in {example!r}")
        return float(value)
    match = _QUANTITY.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not a quantity; write it as in {example!r}")
    number, unit = float(match[1]), match[2]
    if unit is None:
        raise ValueError(f"{value!r} has no unit; write it as in {example!r}")
    if unit not in units:
        raise ValueError(f"{value!r}: unknown unit {unit!r}; use one of {', '.join(units)}")
    return number * units[unit]


def _check(number: float, text: Any, *, low: float, high: float, shown: Callable[[float], str]) -> float:
    if not low <= number <= high:
        raise ValueError(f"{text!r} is outside {shown(low)} … {shown(high)}")
    return number


def parse_bytes(value: Any) -> int:
    """Parse a size; a bare number means bytes.

    >>> parse_bytes("1.5 KiB")
    1536
    """
    number = _parse(value, _BYTE_UNITS, example="5 MiB", bare=True)
    _check(number, value, low=0, high=MAX_BYTES, shown=format_bytes)
    if number != int(number) and not isinstance(value, str):
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return round(number)


def parse_seconds(value: Any) -> float:
    """Parse a duration; a unit is required, since a bare 2 could mean ms.

    >>> parse_seconds("2 ms")
    0.002
    """
    number = _parse(value, _TIME_UNITS, example="2 ms", bare=False)
    return _check(number, value, low=0, high=MAX_SECONDS, shown=format_seconds)


def parse_duration(value: Any) -> float:
    """Parse a time span of up to a year; a unit is required.

    >>> parse_duration("2 h")
    7200.0
    """
    number = _parse(value, {**_TIME_UNITS, "d": 86400.0}, example="1 h", bare=False)
    return _check(number, value, low=0, high=366 * 86400.0, shown=format_seconds)


def parse_bandwidth(value: Any) -> float:
    """Parse a bandwidth into bytes per second; a unit is required.

    >>> parse_bandwidth("500 Mbit/s")
    62500000.0
    """
    number = _parse(value, _BANDWIDTH_UNITS, example="500 Mbit/s", bare=False)
    return _check(number, value, low=MIN_BANDWIDTH, high=MAX_BANDWIDTH, shown=format_bandwidth)


def parse_share(value: Any) -> float:
    """Parse a percentage into a fraction of 1.

    >>> parse_share("80 %")
    0.8
    """
    number = _parse(value, _SHARE_UNITS, example="80 %", bare=False)
    return _check(number, value, low=0, high=1, shown=format_share)


def format_bytes(value: float) -> str:
    """Write a size with a binary unit.

    >>> format_bytes(5 * 2**20)
    '5 MiB'
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{value / 1024**power:.4g} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """Write a duration with the unit that fits.

    >>> format_seconds(0.00215)
    '2.15 ms'
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value * 1e9:.4g} ns" if value else "0 s"


def format_bandwidth(value: float) -> str:
    """Write bytes per second as bits per second.

    >>> format_bandwidth(62.5e6)
    '500 Mbit/s'
    """
    bits = value * 8
    for power, unit in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if abs(bits) >= 1e3**power:
            return f"{bits / 1e3**power:.4g} {unit}bit/s"
    return f"{bits:.4g} bit/s"


def format_share(value: float) -> str:
    """Write a fraction as a percentage.

    >>> format_share(0.125)
    '12.5 %'
    """
    return f"{value * 100:.4g} %"


def _quantity_schema(example: str) -> dict[str, Any]:
    return {"type": "string", "examples": [example]}


Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, _quantity_schema("5 MiB")]}),
]
Seconds = Annotated[
    float,
    BeforeValidator(parse_seconds),
    PlainSerializer(lambda value: f"{value!r} s", return_type=str),
    WithJsonSchema(_quantity_schema("2 ms")),
]
Bandwidth = Annotated[
    float,
    BeforeValidator(parse_bandwidth),
    PlainSerializer(lambda value: f"{value!r} B/s", return_type=str),
    WithJsonSchema(_quantity_schema("500 Mbit/s")),
]
Share = Annotated[
    float,
    BeforeValidator(parse_share),
    PlainSerializer(lambda value: f"{value * 100!r} %", return_type=str),
    WithJsonSchema(_quantity_schema("80 %")),
]
