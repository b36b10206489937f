"""The view shows the server's frames, and refuses whatever is no arena."""

import os
from pathlib import Path

import pytest

from cachetier.client import ArenaView
from cachetier.core.arena_format import STATE_READY, geometry_for, pack_header
from cachetier.core.errors import FormatError, StorageError
from cachetier.core.layout import PAGE_BYTES

GEOMETRY = geometry_for(1 << 20, bytes(range(16)))


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Make an arena file as the format describes it."""
    name = tmp_path / "arena"
    content = bytearray(GEOMETRY.file_bytes)
    header = pack_header(GEOMETRY)
    content[: len(header)] = header
    content[GEOMETRY.state_offset + 3] = STATE_READY
    content[GEOMETRY.data_offset + 3 * PAGE_BYTES : GEOMETRY.data_offset + 3 * PAGE_BYTES + 5] = b"bytes"
    name.write_bytes(content)
    return str(name)


def test_frames_and_states_stand_where_the_format_says(path: str) -> None:
    view = ArenaView.attach(path)
    assert view.geometry == GEOMETRY
    assert bytes(view.frame(3 * PAGE_BYTES, 5)) == b"bytes"
    assert [view.state(page * PAGE_BYTES) for page in (2, 3, 4)] == [0, STATE_READY, 0]
    view.close()


def test_writes_reach_every_other_view(path: str) -> None:
    one, other = ArenaView.attach(path), ArenaView.attach(path)
    one.frame(0, 4)[:] = b"seen"
    assert bytes(other.frame(0, 4)) == b"seen"
    one.close()
    other.close()


@pytest.mark.parametrize("frame", [(-1, 1), (0, -1), (0, GEOMETRY.data_bytes + 1), (GEOMETRY.data_bytes, 1)])
def test_frame_outside_is_refused(path: str, frame: tuple[int, int]) -> None:
    view = ArenaView.attach(path)
    with pytest.raises(ValueError, match="outside"):
        view.frame(*frame)
    view.close()


def test_frame_outlives_close(path: str) -> None:
    view = ArenaView.attach(path)
    frame = view.frame(3 * PAGE_BYTES, 5)
    view.close()
    assert bytes(frame) == b"bytes"


def test_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing"):
        ArenaView.attach(str(tmp_path / "nothing"))


def test_truncated_file_is_refused_before_it_can_fault(path: str) -> None:
    os.truncate(path, GEOMETRY.data_offset + PAGE_BYTES)
    with pytest.raises(StorageError, match="shorter"):
        ArenaView.attach(path)


@pytest.mark.parametrize("content", [b"", b"CTARENA9" + bytes(8192), os.urandom(8192)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(FormatError):
        ArenaView.attach(str(tmp_path / "other"))
