"""Byte amounts as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_razor.errors import UsageError
from edge_razor.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128MB", 128_000_000),
        ("512MiB", 512 * 2**20),
        ("2GB", 2_000_000_000),
        ("1.5 kb", 1500),
        (" 7 B ", 7),
        ("42", 42),
        (".5kB", 500),
        ("1.0000005MB", 1_000_000),
        (4096, 4096),
    ],
)
def test_amounts(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "12 parsecs", "-1MB", "1e9", "0", "0.5", 0, -5, True, 1.5, None, "1,5GB"])
def test_what_is_no_amount_is_a_usage_error(text: object) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.integers(1, 10**13))
def test_what_is_printed_reads_back_to_three_digits(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= 0.005 * count + 0.5
