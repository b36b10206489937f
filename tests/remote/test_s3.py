"""S3, with a real server."""

import time
from urllib.parse import urlsplit

import pytest

from cachetier.core.errors import ConfigError
from cachetier.remote.base import FrameMemory, Outcome, Value
from cachetier.remote.s3 import open_store
from tests.remote.memory import frame_memory
from tests.remote.s3_server import running_s3
from tests.remote.suite import FRAMES, HEADER, RemoteStoreSuite, all_failed, fill


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def memory(tmp_path):
    with frame_memory(tmp_path) as memory:
        yield memory


@pytest.fixture
def store(server, memory, request):
    store = open_store(urlsplit(f"{server.url}/{abs(hash(request.node.name))}"), memory)
    yield store
    store.close()


class TestS3Store(RemoteStoreSuite):
    def test_a_value_is_one_object(self, store, memory, server):
        fill(memory, 1)
        before = server.num_objects()
        store.put([Value("a/1", HEADER, FRAMES)])
        assert server.num_objects() == before + 1

    def test_a_closed_one_fails(self, store):
        store.close()
        assert all_failed(store)


def test_a_server_that_is_gone_makes_calls_fail_at_once_and_one_that_is_back_is_found(tmp_path, memory):
    with running_s3(tmp_path) as server:
        store = open_store(urlsplit(server.url), memory)
        value = Value("a/1", HEADER, FRAMES)
        assert store.put([value]) == [Outcome.DONE]
        server.kill()
        start = time.monotonic()
        assert all_failed(store)
        assert time.monotonic() - start < 5
        server.start()
        assert store.exists(["a/1"]) == [Outcome.MISSING]
        assert store.put([value]) == [Outcome.DONE]
        store.close()


def test_parameters_are_refused():
    memory = FrameMemory("/none", 0, 0, lambda offset, length: memoryview(b""))
    with pytest.raises(ConfigError, match="takes no parameters"):
        open_store(urlsplit("s3://bucket/prefix?region=x"), memory)
