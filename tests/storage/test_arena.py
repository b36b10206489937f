"""Properties of the arena and its slab allocator."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachetier.core.arena_format import STATE_FILLING, STATE_FREE, STATE_READY, unpack_header
from cachetier.core.errors import StorageError
from cachetier.core.layout import PAGE_BYTES
from cachetier.storage.arena import Arena

MIB = 1 << 20


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.create(str(tmp_path / "arena"), 4 * MIB, b"i" * 16)
    yield made
    made.check_integrity()
    made.close()


def fill(arena: Arena, size_bytes: int) -> list[int]:
    frames = []
    while (offset := arena.allocate(size_bytes)) is not None:
        frames.append(offset)
    return frames


def test_the_file_is_private_and_says_where_its_parts_are(arena: Arena, tmp_path: Path) -> None:
    status = os.stat(tmp_path / "arena")
    geometry = unpack_header((tmp_path / "arena").read_bytes()[:PAGE_BYTES])
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size <= 4 * MIB
    assert (geometry.data_bytes, geometry.instance) == (arena.data_bytes, b"i" * 16)


def test_a_new_arena_is_a_new_file_and_the_old_server_leaves_it_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    old = Arena.create(path, 4 * MIB, b"o" * 16)
    new = Arena.create(path, 4 * MIB, b"n" * 16)
    old.close()
    assert os.path.exists(path)
    new.close()
    assert not os.path.exists(path)


def test_frames_do_not_overlap_and_keep_their_bytes(arena: Arena) -> None:
    sizes = [4096 * (1 + number % 7) for number in range(60)]
    frames = [(arena.allocate(size), size) for size in sizes]
    for number, (offset, size) in enumerate(frames):
        assert offset is not None
        arena.frame(offset, size)[:] = bytes([number]) * size
    for number, (offset, size) in enumerate(frames):
        assert offset is not None
        assert offset % PAGE_BYTES == 0
        assert arena.frame(offset, size) == bytes([number]) * size


def test_state_follows_the_frame(arena: Arena) -> None:
    offset = arena.allocate(5000)
    assert offset is not None
    assert arena.state(offset) == STATE_FILLING
    arena.set_state(offset, STATE_READY)
    assert arena.state(offset) == STATE_READY
    arena.free(offset)
    assert arena.state(offset) == STATE_FREE
    assert arena.used_bytes == 0


def test_freeing_a_frame_of_the_class_makes_allocate_succeed(arena: Arena) -> None:
    frames = fill(arena, 20_000)
    assert arena.allocate(arena.size_class(20_000)) is None
    arena.free(frames[len(frames) // 2])
    assert arena.allocate(20_000) is not None


def test_a_frame_is_not_freed_twice(arena: Arena) -> None:
    offset = arena.allocate(5000)
    other = arena.allocate(5000)
    assert offset is not None
    arena.free(offset)
    with pytest.raises(AssertionError):
        arena.free(offset)
    assert other is not None


@pytest.mark.parametrize("size", [4096, 12_288, 77_824, 135_168, 300_000, 700_000, 1_500_000])
def test_waste_is_bounded(arena: Arena, size: int) -> None:
    """A frame wastes a 64th at most; what a small arena loses to slab ends besides that stays under a third."""
    assert arena.size_class(size) <= size * 65 / 64 + PAGE_BYTES
    held = len(fill(arena, size)) * size
    assert held > arena.data_bytes * (0.8 if size < 100_000 else 0.66)


def test_slab_victim_makes_room_for_another_class(arena: Arena) -> None:
    fill(arena, 10_000)
    assert arena.allocate(150_000) is None
    victims = arena.slab_victim(150_000)
    assert victims
    for offset in victims:
        arena.free(offset)
    assert arena.allocate(150_000) is not None


def test_slab_victim_never_names_the_own_class(arena: Arena) -> None:
    fill(arena, 10_000)
    assert arena.slab_victim(10_000) is None


def test_the_largest_frame_fits_and_one_more_byte_is_refused_with_the_size_needed(arena: Arena, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="host_bytes") as error:
        arena.allocate(arena.largest_frame_bytes + 1)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    offset = arena.allocate(arena.largest_frame_bytes)
    assert offset is not None
    larger = Arena.create(str(tmp_path / "larger"), needed, b"l" * 16)
    assert larger.allocate(arena.largest_frame_bytes + 1) is not None
    larger.close()


def test_no_room_for_the_file_is_said_with_numbers_and_leaves_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    with pytest.raises(StorageError, match="host_bytes"):
        Arena.create(path, 1 << 50, b"i" * 16)
    assert not os.path.exists(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 400_000), st.integers(0, 1 << 30)), max_size=120))
def test_books_balance_under_any_sequence(arena: Arena, steps: list[tuple[int, int]]) -> None:
    """Even steps allocate, odd ones free; in the end everything is free again and the whole arena can be one frame."""
    used: dict[int, int] = {}
    for size, choice in steps:
        if choice % 2 and used:
            offset = sorted(used)[choice % len(used)]
            arena.free(offset)
            del used[offset]
        else:
            made = arena.allocate(size)
            if made is not None:
                assert all(made + size <= start or made >= start + length for start, length in used.items())
                used[made] = size
        arena.check_integrity()
    for offset in used:
        arena.free(offset)
    whole = arena.allocate(arena.largest_frame_bytes)
    assert whole is not None
    arena.free(whole)
