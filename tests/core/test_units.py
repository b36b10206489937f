"""Sizes are read as people mean them, exactly, or refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.errors import ConfigError
from cachetier.core.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1GiB", 1 << 30),
        ("1G", 1 << 30),
        ("1GB", 10**9),
        ("1.5KiB", 1536),
        ("0.1GB", 10**8),
        (" 2 MiB ", 2 << 20),
        ("3T", 3 << 40),
        ("17", 17),
        ("17B", 17),
        (17, 17),
    ],
)
def test_a_size_is_what_people_mean(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@given(st.integers(0, 1 << 70))
def test_a_plain_number_is_itself(count: int) -> None:
    assert parse_bytes(str(count)) == parse_bytes(count) == count


@pytest.mark.parametrize("text", ["", "GiB", "1 gib", "-1", "1PiB", "1,5G", "1e9", "0x10", "one", True, None, "1G 2"])
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.text(max_size=20))
def test_no_text_makes_it_fail_otherwise(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_bytes(text) >= 0


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000 + ".5T"])
def test_absurd_numbers_are_still_numbers(text: str) -> None:
    assert parse_bytes(text) > 1 << 1000


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_sizes_are_shown_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 1 << 50))
def test_what_is_shown_can_be_read_back_to_about_the_same(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= count * 0.06
