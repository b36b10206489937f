"""Mooncake Store, with a real master and, where it matters, with two nodes."""

import os
import signal
import time
from urllib.parse import urlsplit

import pytest

from cachetier.core.errors import ConfigError
from cachetier.remote import mooncake
from cachetier.remote.base import Extent, FrameMemory, Outcome, Place, Value
from cachetier.remote.mooncake import open_store
from tests.remote.masters import running_master
from tests.remote.memory import frame_memory
from tests.remote.suite import ELSEWHERE, FRAMES, HEADER, PAGE, RemoteStoreSuite, all_failed, fill, read


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    with running_master(tmp_path_factory.mktemp("master")) as master:
        yield master


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    with frame_memory(tmp_path_factory.mktemp("node")) as memory:
        yield memory


@pytest.fixture(scope="module")
def node(master, memory):
    store = open_store(urlsplit(master.url), memory)
    yield store
    store.close()


@pytest.fixture
def store(node):
    keys = [f"a/{number}" for number in range(5)] + [f"many/{number}" for number in range(64)]
    node.delete([*keys, *(f"t/{number}/{turn}" for number in range(8) for turn in range(5))])
    return node


@pytest.fixture
def other(master, tmp_path):
    """Another node, with its own arena."""
    with frame_memory(tmp_path) as memory:
        store = open_store(urlsplit(master.url), memory)
        yield store, memory
        store.close()


def eventually(is_true, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class TestMooncakeStore(RemoteStoreSuite):
    def test_what_one_node_puts_another_one_gets(self, store, memory, other):
        contents = fill(memory, 1)
        store.put([Value("a/1", HEADER, FRAMES)])
        there, its_memory = other
        assert there.get([Place("a/1", PAGE, ELSEWHERE)]) == [Outcome.DONE]
        assert read(its_memory, ELSEWHERE) == contents

    def test_a_value_larger_than_asked_for_gives_its_beginning_and_a_smaller_one_is_missing(self, store, memory):
        contents = fill(memory, 1)
        store.put([Value("a/1", HEADER, FRAMES)])
        assert store.get([Place("a/1", PAGE, ELSEWHERE[:1])]) == [Outcome.DONE]
        assert read(memory, ELSEWHERE[:1]) == contents[:1]
        assert store.get([Place("a/1", 4 * PAGE, ELSEWHERE)]) == [Outcome.MISSING]

    def test_a_burst_larger_than_the_segments_is_full_and_no_failure(self, store):
        """Mooncake answers -200."""
        values = [Value(f"burst/{number}", HEADER, [Extent(0, 8 << 20)]) for number in range(10)]
        outcomes = store.put(values)
        store.delete([value.key for value in values])
        assert set(outcomes) == {Outcome.DONE, Outcome.FULL}

    def test_a_node_that_died_makes_its_values_fail_and_then_vanish(self, store, memory, other):
        """Mooncake answers -800 or -704 while the master lists it, and puts go to the living node's own memory."""
        there, its_memory = other
        fill(its_memory, 1)
        assert there.put([Value("a/1", HEADER, FRAMES)]) == [Outcome.DONE]
        assert store.exists(["a/1"]) == [Outcome.DONE]
        os.kill(there._client._process.pid, signal.SIGKILL)
        assert store.get([Place("a/1", PAGE, FRAMES)]) != [Outcome.DONE]
        assert store.put([Value(f"a/{n}", HEADER, FRAMES) for n in (0, 2, 3, 4)]) == [Outcome.DONE] * 4
        eventually(lambda: store.exists(["a/1"]) == [Outcome.MISSING])

    def test_a_node_that_leaves_in_order_is_off_the_list_at_once(self, store, other):
        there, its_memory = other
        fill(its_memory, 1)
        assert there.put([Value("a/1", HEADER, FRAMES)]) == [Outcome.DONE]
        there.close()
        assert store.exists(["a/1"]) == [Outcome.MISSING]

    def test_the_process_is_replaced_when_it_dies(self, store, memory):
        fill(memory, 1)
        assert store.put([Value("a/1", HEADER, FRAMES)]) == [Outcome.DONE]
        os.kill(store._client._process.pid, signal.SIGKILL)
        eventually(lambda: store.put([Value("a/2", HEADER, FRAMES)]) == [Outcome.DONE])


@pytest.mark.slow
def test_a_master_that_is_gone_makes_calls_fail_and_one_that_is_back_is_found(tmp_path):
    """Mooncake answers -900, which is true, to `is_exist`."""
    with running_master(tmp_path) as master, frame_memory(tmp_path) as memory:
        store = open_store(urlsplit(master.url), memory)
        value = Value("a/1", HEADER, FRAMES)
        assert store.put([value]) == [Outcome.DONE]
        master.kill()
        assert store.exists(["a/1", "a/2"]) == store.put([value, value]) == [Outcome.FAILED] * 2
        master.start()
        eventually(lambda: store.put([value]) == [Outcome.DONE])
        assert store.get([Place("a/1", PAGE, ELSEWHERE)]) == [Outcome.DONE]
        master.send(signal.SIGSTOP)
        start = time.monotonic()
        assert store.exists(["a/1"]) == [Outcome.FAILED]
        assert time.monotonic() - start < 10
        master.send(signal.SIGCONT)
        eventually(lambda: store.exists(["a/1"])[0] is not Outcome.FAILED)
        store.close()


def test_without_a_master_calls_fail_at_once_and_no_process_is_started(tmp_path):
    with frame_memory(tmp_path) as memory:
        store = open_store(urlsplit("mooncake://127.0.0.1:1"), memory)
        start = time.monotonic()
        assert all_failed(store)
        assert time.monotonic() - start < 1
        assert store._client is None


def test_without_the_library_that_mooncake_needs_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(mooncake, "LIBRARY", "libnothing.so.1")
    with pytest.raises(ConfigError, match="apt-get install libibverbs1"):
        open_store(urlsplit("mooncake://h:1"), FrameMemory("/none", 0, 0, lambda offset, length: memoryview(b"")))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mooncake://h:1?segment=1", "unknown parameter 'segment'; allowed are protocol, segment_bytes"),
        ("mooncake://h:1?segment_bytes=many", "many"),
        ("mooncake://h:1?protocol=carrier", "choose from tcp, rdma"),
        ("mooncake://h:1?host=0.0.0.0", "an address that other nodes reach"),
        ("mooncake://h", "the port of mooncake_master"),
        ("mooncake://h:x", "x"),
    ],
)
def test_an_impossible_url_is_refused_with_what_is_allowed(url, text):
    memory = FrameMemory("/none", 0, 0, lambda offset, length: memoryview(b""))
    with pytest.raises(ConfigError, match=text):
        open_store(urlsplit(url), memory)
