"""Properties of record headers and bodies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.core.layout import PAGE_BYTES, Shard
from cachetier.storage.records import (
    DiskChunk,
    pack_body,
    pack_header,
    peek_header_bytes,
    unpack_body,
    unpack_header,
)
from tests.storage.chunks import make_chunk

u16, u64 = st.integers(0, 65535), st.integers(0, (1 << 64) - 1)
parts = st.lists(st.tuples(st.builds(Shard, u16, u16, u16, u16), u64, u64), min_size=1, max_size=9)
key = st.binary(min_size=16, max_size=16)


@st.composite
def chunks(draw: st.DrawFn) -> DiskChunk:
    tiling, sizes, checksums = zip(*draw(parts), strict=True)
    return DiskChunk(
        key=ChainKey(draw(key)),
        parent=ChainKey(draw(key)),
        namespace=NamespaceId(draw(key)),
        position=draw(st.integers(0, (1 << 32) - 1)),
        group=draw(u16),
        content=draw(st.binary(max_size=6000)),
        tiling=tiling,
        object_bytes=sizes,
        checksums=checksums,
    )


@given(chunks(), st.integers(0, 50), u64)
def test_body_and_header_come_back_as_they_were(chunk: DiskChunk, offset: int, sequence: int) -> None:
    body = pack_body(chunk)
    assert unpack_body(bytes(offset) + body + b"rest", offset) == chunk
    header = pack_header(body, 8192, sequence)
    assert len(header) % PAGE_BYTES == 0
    assert peek_header_bytes(header[:PAGE_BYTES]) == len(header)
    found = unpack_header(header)
    assert found is not None
    assert (found.chunk, found.sequence, found.record_bytes) == (chunk, sequence, len(header) + 8192)


@pytest.mark.parametrize("content_bytes", [64, 5000])
def test_no_header_with_a_flipped_bit_is_believed(content_bytes: int) -> None:
    header = bytearray(pack_header(pack_body(make_chunk(1, content_bytes=content_bytes).chunk), 8192, 3))
    for bit in range(0, len(header) * 8, 5):
        header[bit // 8] ^= 1 << bit % 8
        assert unpack_header(bytes(header)) is None
        header[bit // 8] ^= 1 << bit % 8


def test_a_blank_page_is_no_header() -> None:
    assert peek_header_bytes(bytes(PAGE_BYTES)) == 0
    assert unpack_header(bytes(PAGE_BYTES)) is None
