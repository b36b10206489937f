"""Properties of the page file."""

import errno

import pytest

from cachetier.storage.pages import PAYLOAD_OFFSET, PageFile
from tests.storage.fault_files import FaultFiles, SimulatedCrashError

PATH = "/index/pages"


def open_pages(files: FaultFiles) -> PageFile:
    return PageFile(PATH, 4, 4096, files)


def payload(pages: PageFile, page: int) -> bytes:
    return pages.read(page)[PAYLOAD_OFFSET:].rstrip(b"\0")


@pytest.fixture
def files() -> FaultFiles:
    files = FaultFiles(1)
    open_pages(files).close()
    files.fsync_dir("/index")
    return files


def test_a_new_page_is_blank(files: FaultFiles) -> None:
    assert not any(open_pages(files).read(3))


def test_nothing_is_visible_before_the_commit_and_everything_after_it(files: FaultFiles) -> None:
    pages = open_pages(files)
    pages.stage(1, b"one")
    assert payload(pages, 1) == b""
    assert pages.staged(1)[PAYLOAD_OFFSET:].rstrip(b"\0") == b"one"
    pages.commit()
    assert payload(pages, 1) == payload(open_pages(files), 1) == b"one"


@pytest.mark.parametrize("seed", range(40))
def test_a_crash_in_a_commit_leaves_the_old_or_the_new_image(seed: int) -> None:
    files = FaultFiles(seed)
    pages = open_pages(files)
    files.fsync_dir("/index")
    for version in (b"a", b"b", b"c"):
        pages.stage(2, version * 4000)
        pages.commit()
    pages.stage(2, b"d" * 4000)
    files.crash_in = seed % 2
    with pytest.raises(SimulatedCrashError):
        pages.commit()
    files.crash()
    assert payload(open_pages(files), 2) in {b"c" * 4000, b"d" * 4000}


@pytest.mark.parametrize("fail_in", [0, 1])
def test_a_failed_commit_shows_nothing_endangers_nothing_and_is_made_good_by_the_next(fail_in: int) -> None:
    files = FaultFiles(fail_in)
    pages = open_pages(files)
    files.fsync_dir("/index")
    pages.stage(2, b"old")
    pages.commit()
    for _ in range(3):
        pages.stage(2, b"new")
        files.fail_in, files.error = fail_in, errno.EIO
        with pytest.raises(OSError, match="injected"):
            pages.commit()
        assert payload(pages, 2) == b"old"
    files.fail_in = -1
    pages.commit()
    files.crash()
    assert payload(open_pages(files), 2) == b"new"


def damage(files: FaultFiles, slot: int) -> None:
    files.contents()[PATH][slot * 4096 + 100] ^= 1


@pytest.mark.parametrize(
    ("slots", "expected"), [([4], b"third"), ([5], b"second"), ([4, 5], b"")], ids=["older", "newer", "both"]
)
def test_a_flipped_bit_leaves_the_other_slot(files: FaultFiles, slots: list[int], expected: bytes) -> None:
    pages = open_pages(files)
    for version in (b"first", b"second", b"third"):
        pages.stage(2, version)
        pages.commit()
    for slot in slots:
        damage(files, slot)
    again = open_pages(files)
    assert payload(again, 2) == expected
    assert again.damaged_slots(2) == len(slots)
    assert again.num_bad == len(slots) - (slots == [4]), "a damaged slot that nobody needs is for `verify` to find"


def test_a_bit_that_flips_while_the_file_is_open_is_noticed_too(files: FaultFiles) -> None:
    pages = open_pages(files)
    for version in (b"first", b"second"):
        pages.stage(0, version)
        pages.commit()
    assert payload(pages, 0) == b"second"
    damage(files, 0)
    assert payload(pages, 0) == b"first"
    assert pages.num_bad == 1


def test_a_page_in_the_wrong_place_is_not_believed(files: FaultFiles) -> None:
    pages = open_pages(files)
    pages.stage(1, b"mine")
    pages.commit()
    data = files.contents()[PATH]
    data[3 * 8192 : 4 * 8192] = data[8192 : 2 * 8192]
    assert payload(open_pages(files), 3) == b""
