"""Checksums notice every changed bit, vouch for parts, and never drift between versions."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.checksum import checksum_of, digests_match, object_checksum, page_digests, pages_match
from cachetier.core.layout import PAGE_BYTES

PAYLOAD = bytes(number % 251 for number in range(10_000))  # two pages and a part
DIGESTS = page_digests(memoryview(PAYLOAD))
NUM_PAGES = 3


def test_digests_and_checksum_are_what_they_always_were() -> None:
    assert DIGESTS.hex() == "ecd34a998d8c2a12f7ef947d2bf8597fada64eebe8d72eee"
    assert object_checksum(memoryview(PAYLOAD)) == checksum_of(DIGESTS) == 0x71DB5DCA0584F818
    assert object_checksum(memoryview(b"")) == 0xEF46DB3751D8E999  # XXH64 of nothing, seed 0, as published


@given(st.binary(max_size=3 * PAGE_BYTES))
def test_each_page_is_digested_on_its_own(payload: bytes) -> None:
    digests = page_digests(memoryview(payload))
    pages = [payload[start : start + PAGE_BYTES] for start in range(0, len(payload), PAGE_BYTES)]
    expected = [xxhash.xxh64_intdigest(page).to_bytes(8, "little") for page in pages]
    assert digests == b"".join(expected)
    assert digests_match(memoryview(digests), len(payload), object_checksum(memoryview(payload)))


@given(st.integers(0, len(PAYLOAD) * 8 - 1), st.integers(0, NUM_PAGES), st.integers(0, NUM_PAGES))
def test_a_flipped_bit_is_noticed_by_whoever_verifies_its_page_and_by_nobody_else(
    bit: int, first_page: int, end_page: int
) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[bit // 8] ^= 1 << bit % 8
    concerns = first_page <= bit // 8 // PAGE_BYTES < end_page
    part = memoryview(damaged)[first_page * PAGE_BYTES : end_page * PAGE_BYTES]
    assert pages_match(part, memoryview(DIGESTS), first_page) is not concerns
    assert object_checksum(memoryview(damaged)) != checksum_of(DIGESTS)


@given(st.integers(0, len(DIGESTS) * 8 - 1))
def test_a_flipped_bit_among_the_digests_is_noticed(bit: int) -> None:
    damaged = bytearray(DIGESTS)
    damaged[bit // 8] ^= 1 << bit % 8
    assert not digests_match(memoryview(damaged), len(PAYLOAD), checksum_of(DIGESTS))
    page = bit // 64
    part = memoryview(PAYLOAD)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
    assert not pages_match(part, memoryview(damaged), page)


@pytest.mark.parametrize("cut", [1, 8, 16, 24])
def test_missing_digests_are_noticed(cut: int) -> None:
    short = DIGESTS[:-cut]
    assert not digests_match(memoryview(short), len(PAYLOAD), checksum_of(short))
