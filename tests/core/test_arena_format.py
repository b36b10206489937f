"""An arena uses all of its file, never more, and its header says where things lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.arena_format import geometry_for, pack_header, unpack_header
from cachetier.core.errors import FormatError
from cachetier.core.layout import PAGE_BYTES, round_up

INSTANCE = bytes(range(16))


@given(st.integers(3 * PAGE_BYTES, 1 << 45))
def test_an_arena_fits_its_file_and_one_page_more_would_not(file_bytes: int) -> None:
    geometry = geometry_for(file_bytes, INSTANCE)
    pages = geometry.data_bytes // PAGE_BYTES
    assert geometry.data_bytes == pages * PAGE_BYTES > 0
    assert geometry.file_bytes <= file_bytes
    assert PAGE_BYTES + round_up(pages + 1, PAGE_BYTES) + (pages + 1) * PAGE_BYTES > file_bytes


@given(st.integers(3 * PAGE_BYTES, 1 << 45))
def test_every_page_has_a_state_and_the_parts_do_not_overlap(file_bytes: int) -> None:
    geometry = geometry_for(file_bytes, INSTANCE)
    assert geometry.state_offset >= len(pack_header(geometry))
    assert geometry.state_offset + geometry.data_bytes // PAGE_BYTES <= geometry.data_offset
    assert geometry.data_offset % PAGE_BYTES == 0


@given(st.integers(3 * PAGE_BYTES, 1 << 45), st.binary(min_size=16, max_size=16))
def test_a_header_can_be_read_back_with_what_follows_it(file_bytes: int, instance: bytes) -> None:
    geometry = geometry_for(file_bytes, instance)
    assert unpack_header(pack_header(geometry) + b"more") == geometry


def test_a_header_is_what_it_always_was() -> None:
    header = pack_header(geometry_for(1 << 20, INSTANCE))
    assert header.hex() == (
        "43544152454e4131"  # CTARENA1
        "0010000000000000"  # states at 4 KiB
        "0020000000000000"  # data at 8 KiB
        "00e00f0000000000"  # 254 pages of data
        "000102030405060708090a0b0c0d0e0f"
    )


@pytest.mark.parametrize("data", [b"", b"CTARENA1", b"CTARENA2" + bytes(40), bytes(4096)])
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="not an arena"):
        unpack_header(data)
