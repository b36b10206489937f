"""Properties of the index."""

import random

import pytest

from cachetier.core.errors import FormatError
from cachetier.storage.index import Index, IndexSettings, SegmentEntry, read_settings
from cachetier.storage.pages import PAYLOAD_OFFSET, PageFile
from cachetier.storage.records import pack_body
from tests.storage.chunks import make_chunk
from tests.storage.fault_files import FaultFiles

PATH = "/index/chunks.idx"
SETTINGS = IndexSettings(limit_bytes=256 << 10, segment_bytes=1 << 20, num_segments=200, chunk_tokens=64)
CHUNK = make_chunk(1, content_bytes=256).chunk
BODY = pack_body(CHUNK)


@pytest.fixture
def files() -> FaultFiles:
    return FaultFiles(1)


@pytest.fixture
def index(files: FaultFiles) -> Index:
    return Index(PATH, SETTINGS, files)


def keys(number: int) -> list[bytes]:
    rng = random.Random(7)
    return [rng.randbytes(16) for _ in range(number)]


def test_a_row_is_found_with_all_that_was_put_in(index: Index) -> None:
    assert index.put(CHUNK.key, 5, 8192, BODY, {5}) == []
    assert index.find(CHUNK.key) is None, "visible before the commit"
    index.commit()
    found = index.find(CHUNK.key)
    assert found is not None
    assert (found.sequence, found.offset, found.chunk) == (5, 8192, CHUNK)


def test_a_key_inside_another_keys_bytes_is_not_found(index: Index) -> None:
    first, second = bytes(8) + b"12345678", b"abcdefgh" + bytes(8)
    for key in (first, second):
        index.put(key, 5, 0, BODY, {5})
    index.commit()
    assert index.find(b"12345678abcdefgh") is None


def test_a_table_is_filled_to_four_fifths_without_losing_a_row(index: Index) -> None:
    """Ten rows of this size fit into a page; the second possible page takes what the first cannot."""
    names = keys(28 * 10 * 8 // 10)
    for key in names:
        assert index.put(key, 5, 0, BODY, {5}) == []
    index.commit()
    assert all(index.find(key) for key in names)
    assert sum(1 for _ in index.rows()) == len(names)


def test_an_overfull_table_gives_up_rows_of_the_oldest_segments(index: Index) -> None:
    names = keys(600)
    gone = []
    for number, key in enumerate(names):
        gone += index.put(key, 1 + number // 300, 0, BODY, {1, 2}) or []
    index.commit()
    assert gone.count(1) > 150
    found = [index.find(key) for key in names]
    assert found.count(None) == len(gone)
    assert sorted(index.take_displaced()) == sorted(key for key in names if index.find(key) is None)
    assert index.take_displaced() == []
    assert sum(row is not None for row in found[300:]) > sum(row is not None for row in found[:300])


def test_dead_rows_make_room(index: Index) -> None:
    names = keys(500)
    for key in names[:250]:
        index.put(key, 1, 0, BODY, {1})
    lost = [loser for key in names[250:450] for loser in index.put(key, 2, 0, BODY, {2}) or []]
    index.commit()
    assert lost == []
    assert all(index.find(key) for key in names[250:450])


def test_replacing_and_removing_leave_one_row_and_none(index: Index) -> None:
    index.put(CHUNK.key, 1, 0, BODY, {1, 2})
    assert index.put(CHUNK.key, 2, 4096, BODY, {1, 2}) == [1]
    index.commit()
    assert [(row.sequence, row.offset) for row in index.rows()] == [(2, 4096)]
    assert index.remove(CHUNK.key) == 2
    assert index.remove(CHUNK.key) is None
    index.commit()
    assert index.find(CHUNK.key) is None


def test_a_row_too_large_for_a_page_is_refused(index: Index) -> None:
    assert index.put(CHUNK.key, 1, 0, bytes(4096), {1}) is None


def test_the_segment_table_comes_back_after_a_restart(index: Index, files: FaultFiles) -> None:
    table = [SegmentEntry(number + 1, number * 4096, number) for number in range(200)]
    index.stage_table(table, {3, 199})
    index.commit()
    assert Index(PATH, SETTINGS, files).read_table() == table


def test_the_shape_is_read_from_either_copy(index: Index, files: FaultFiles) -> None:
    for slot in (0, 1):
        files.contents()[PATH][slot * 4096 + 50] ^= 4
        assert read_settings(PATH, 64, files) == SETTINGS
        files.contents()[PATH][slot * 4096 + 50] ^= 4


def test_another_version_is_refused_with_both_versions_in_the_text(index: Index, files: FaultFiles) -> None:
    index.close()
    pages = PageFile(PATH, 1, 4096, files)
    image = pages.read(0)[PAYLOAD_OFFSET:]
    pages.stage(0, (7).to_bytes(4, "little") + image[4:])
    pages.commit()
    with pytest.raises(FormatError, match=r"version 7.*1"):
        read_settings(PATH, 64, files)
