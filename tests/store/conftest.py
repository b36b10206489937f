"""Stores for tests, with a clock that tests turn."""

import pytest

from cachetier.store.store import Store
from tests.store.engines import make_config


class Clock:
    """A clock that tests turn."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_store(tmp_path, clock):
    """Open stores in one data directory; check the last one when the test ends."""
    opened: list[Store] = []

    def reopen(**settings: object) -> Store:
        if opened:
            opened.pop().close()
        opened.append(Store(make_config(tmp_path, **settings), clock=clock))
        return opened[-1]

    yield reopen
    for store in opened:
        store.flush(20)
        store.check_integrity()
        assert store._books.disk_pins.num_pinned == 0
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()
