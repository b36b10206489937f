"""An arena for tests of stores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachetier.remote.base import FrameMemory
from cachetier.storage.arena import Arena

ARENA_BYTES = 16 << 20


@contextmanager
def frame_memory(folder: Path) -> Iterator[FrameMemory]:
    """Make an arena in `folder` and show it as stores see it."""
    arena = Arena.create(os.path.join(folder, "arena"), ARENA_BYTES, bytes(16))
    try:
        yield FrameMemory(arena.path, arena.file_bytes, arena.data_offset, arena.frame)
    finally:
        arena.close()
