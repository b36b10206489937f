"""The flush thread: what reaches the disk, what does not, and what that costs."""

import threading

import pytest

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import (
    RESERVE_FILL,
    Invalidate,
)
from tests.store.chunks import BIG
from tests.store.engines import Engine, keys_of, tokens_of


def test_a_chunk_invalidated_while_it_is_written_does_not_come_back(open_store):
    store = open_store()
    engine = Engine(store)
    entered, gate = threading.Event(), threading.Event()
    append = store._books.disk.append
    store._books.disk.append = lambda chunks: (entered.set(), gate.wait(10), append(chunks))[2]
    keys = keys_of(engine.put(tokens_of(1)))
    assert entered.wait(10)
    store.invalidate(Invalidate(session=engine.sessions[0], keys=keys[0]))
    gate.set()
    store.flush(20)
    store.flush(20)
    assert engine.load(tokens_of(1)) == 0
    assert store.stats().chunks == 0


def test_what_the_disk_refuses_stays_in_host_memory(open_store):
    store = open_store()
    engine = Engine(store)

    def fail(chunks):
        raise OSError("gone")

    store._books.disk.append = fail
    engine.put(tokens_of(1, 2))
    assert store.flush(20)
    stats = store.stats()
    assert (stats.flushes_failed, stats.chunks, stats.chunks_durable) == (2, 2, 0)
    assert engine.load(tokens_of(1, 2)) == 2


def test_a_stalled_disk_pins_no_more_than_half_the_arena(open_store):
    store = open_store()
    engine = Engine(store, layout=BIG)
    gate = threading.Event()
    append = store._books.disk.append
    store._books.disk.append = lambda chunks: gate.wait(30) and append(chunks)
    for number in range(100):
        assert engine.put(tokens_of(number)).outcomes == bytes([RESERVE_FILL])
    stats = store.stats()
    assert stats.flush_backlog_bytes <= stats.bytes.host.limit // 2
    assert stats.flushes_dropped >= 90
    assert not store.flush(0.01)
    gate.set()
    assert store.flush(20)


def test_what_the_backlog_left_out_is_written_once_it_is_hit(open_store):
    store = open_store()
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(*range(10)))
    store.flush(20)
    assert store.stats().chunks_durable == 7
    engine.load(tokens_of(*range(10)))
    store.flush(20)
    assert store.stats().chunks_durable == 10


def test_a_namespace_is_remembered_across_restarts(open_store):
    Engine(open_store())
    store = open_store()
    assert store.stats().namespaces == 1
    with pytest.raises(ProtocolError) as caught:
        Engine(store, layout=BIG)
    assert caught.value.status == 409


def test_a_chunk_that_left_the_disk_alone_is_written_again_when_it_is_hit(open_store):
    store = open_store()
    engine = Engine(store)
    keys = keys_of(engine.put(tokens_of(1)))
    store.flush(20)
    store._books.disk_pins.is_pinned(keys[0])  # as reclaiming its segment does
    store._books.disk.drop(keys)
    engine.put(tokens_of(2))
    store.flush(20)
    assert (store.stats().chunks, store.stats().chunks_durable) == (2, 1)
    engine.load(tokens_of(1))
    store.flush(20)
    assert (store.stats().chunks, store.stats().chunks_durable) == (2, 2)
