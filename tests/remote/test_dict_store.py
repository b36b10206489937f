"""The reference store keeps the contract, so tests that stand on it mean something."""

import pytest

from tests.remote.dict_store import DictStore, Shared
from tests.remote.memory import frame_memory
from tests.remote.suite import RemoteStoreSuite, all_failed


@pytest.fixture
def memory(tmp_path):
    with frame_memory(tmp_path) as memory:
        yield memory


@pytest.fixture
def shared():
    return Shared()


@pytest.fixture
def store(memory, shared):
    return DictStore(shared, memory)


class TestDictStore(RemoteStoreSuite):
    def test_a_dead_one_fails(self, store, shared):
        shared.is_dead = True
        assert all_failed(store)
