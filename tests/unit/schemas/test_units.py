import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import units


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("5 MiB", 5 << 20),
        ("1.2 MiB", 1258291),
        ("64KiB", 65536),
        ("3 kB", 3000),
        ("0 B", 0),
        (17, 17),
        ("2 GB", 2 * 10**9),
    ],
)
def test_bytes(text, want):
    assert units.parse_bytes(text) == want


@pytest.mark.parametrize(("text", "want"), [("2 ms", 0.002), ("150 us", 150e-6), ("1.5 s", 1.5), ("0 s", 0.0)])
def test_seconds(text, want):
    assert units.parse_seconds(text) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("text", "want"), [("500 Mbit/s", 62.5e6), ("1 Gbit/s", 125e6), ("500 MB/s", 500e6)])
def test_bandwidth(text, want):
    assert units.parse_bandwidth(text) == want


@pytest.mark.parametrize(
    ("parse", "value", "words"),
    [
        (units.parse_bytes, "5 Mib", "unknown unit 'Mib'"),
        (units.parse_bytes, "5", "no unit"),
        (units.parse_bytes, "-1 MiB", "outside 0 B"),
        (units.parse_bytes, "9e9 TiB", "outside"),
        (units.parse_bytes, True, "expected a quantity"),
        (units.parse_bytes, 1.5, "whole number"),
        (units.parse_bytes, "nan MiB", "not a quantity"),
        (units.parse_seconds, 2, "no unit"),
        (units.parse_seconds, "2 MiB", "unknown unit"),
        (units.parse_seconds, "2 h 3 min", "unknown unit"),
        (units.parse_seconds, "1e9 s", "outside"),
        (units.parse_bandwidth, "500 Mbps", "unknown unit"),
        (units.parse_bandwidth, "0 Mbit/s", "outside"),
        (units.parse_share, "101 %", "outside"),
        (units.parse_share, 0.5, "no unit"),
    ],
)
def test_refused_quantities_say_why(parse, value, words):
    with pytest.raises(ValueError, match=words):
        parse(value)


@given(st.integers(0, units.MAX_BYTES // 1024**2))
def test_whole_mebibytes_survive(count):
    assert units.parse_bytes(f"{count} MiB") == count << 20


@given(st.floats(0, units.MAX_SECONDS))
def test_seconds_survive_serialisation(value):
    assert units.parse_seconds(f"{value!r} s") == value
