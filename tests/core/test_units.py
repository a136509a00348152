"""Bytes as text and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import GIB, KIB, MIB, TIB, format_bytes, format_count, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (350 * MIB, "350.0 MiB"),
        (GIB - MIB, "1023.0 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (2 * TIB, "2.00 TiB"),
        (-3 * MIB, "-3.0 MiB"),
        (1.5 * KIB, "1.5 KiB"),
    ],
)
def test_bytes_are_shown_with_a_binary_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("4096", 4096),
        ("12 B", 12),
        ("20GiB", 20 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("1.5g", 3 * GIB // 2),
        (".5k", 512),
        ("2TiB", 2 * TIB),
        ("1.0001kib", 1024),
    ],
)
def test_amounts_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an amount of memory. Write bytes or a binary unit, for example 20GiB or 512MiB."),
        ("-1GiB", "'-1GiB' is not an amount of memory. Write bytes or a binary unit, for example 20GiB or 512MiB."),
        ("nan", "'nan' is not an amount of memory. Write bytes or a binary unit, for example 20GiB or 512MiB."),
        ("20 parsecs", "'20 parsecs' has an unknown unit 'parsecs'. Known: KiB, MiB, GiB, TiB."),
        ("0.1", "'0.1' is no memory at all. Give an amount above zero, for example 20GiB."),
        ("0GiB", "'0GiB' is no memory at all. Give an amount above zero, for example 20GiB."),
    ],
)
def test_what_is_no_amount_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_bytes(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "remedy"), [("20GB", "Write 20GiB"), ("512mb", "Write 512MiB"), ("1.5Kb", "Write 1.5KiB")])
def test_decimal_units_are_ambiguous(text: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is ambiguous: .* is read as 1000 by some and as 1024 by others") as caught:
        parse_bytes(text)
    assert remedy in str(caught.value)


@given(st.integers(1, 2**53))
def test_a_plain_count_survives(count: int) -> None:
    assert parse_bytes(str(count)) == count


@given(st.integers(1, 2**53))
def test_what_is_shown_can_be_read_back_to_the_digits_shown(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.05)


def test_counts_have_their_thousands_separated() -> None:
    assert [format_count(n) for n in (7, 1797, 12288000)] == ["7", "1,797", "12,288,000"]
