"""What all tests share: arenas of servers that tests killed are removed at the end, for nobody else will."""

import contextlib
import os
from pathlib import Path

import pytest

ARENAS = f"cachetier-{os.getuid()}-*.arena"
before = pytest.StashKey[set[Path]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Note which arenas are there already."""
    session.config.stash[before] = set(Path("/dev/shm").glob(ARENAS))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the arenas that this run left behind and that no process maps."""
    left = set(Path("/dev/shm").glob(ARENAS)) - session.config.stash[before]
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    for arena in left:
        if str(arena) not in mapped:
            arena.unlink(missing_ok=True)
