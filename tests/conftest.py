"""What all tests share: arenas of servers that tests killed are removed at the end, for nobody else will."""

import contextlib
import os
import time
from pathlib import Path

import pytest

# Failed assertions of what the tests share say what was compared; whoever imports it first, this comes before.
pytest.register_assert_rewrite(
    "tests.connector.servers", "tests.e2e.harness", "tests.e2e.layouts", "tests.e2e.same_answers", "tests.e2e.stand"
)

ARENAS = f"cachetier-{os.getuid()}-*.arena"
before = pytest.StashKey[set[Path]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Note which arenas are there already."""
    session.config.stash[before] = set(Path("/dev/shm").glob(ARENAS))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the arenas that this run left behind and that no process maps.

    Looks twice: a server that starts just now, in another run, has made its arena and is about to map it.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the session that started the workers does it when all have ended
    left = unmapped(session.config.stash[before])
    if left:
        time.sleep(2)
    for arena in left & unmapped(session.config.stash[before]):
        arena.unlink(missing_ok=True)


def unmapped(known: set[Path]) -> set[Path]:
    """Return the arenas besides those `known` that no process maps."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    return {arena for arena in set(Path("/dev/shm").glob(ARENAS)) - known if str(arena) not in mapped}
