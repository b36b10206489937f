"""Promotion: what is read from disk, skipped, failed, and carried over for it."""

import threading
import time

from cachetier.core.messages import (
    TIER_DISK,
)
from tests.store.chunks import BIG
from tests.store.engines import MIB, Engine, tokens_of


def test_a_promotion_that_nobody_waits_for_is_skipped(open_store):
    Engine(open_store(), layout=BIG).put(tokens_of(*range(7)))
    store = open_store(io_threads=1)
    engine = Engine(store, layout=BIG)
    gate = threading.Event()
    read = store._books.disk.read
    store._books.disk.read = lambda key, frames: gate.wait(10) and read(key, frames)
    engine.release(engine.match(tokens_of(*range(7))))
    gate.set()
    deadline = time.monotonic() + 10
    while store._books.disk_pins.num_pinned and time.monotonic() < deadline:
        time.sleep(0.001)
    stats = store.stats()
    assert stats.promotions_skipped > 0
    assert stats.promoted + stats.promotions_skipped == stats.chunks_durable == 7


def test_a_promotion_that_fails_marks_its_frames_and_the_chunk_is_forgotten(open_store):
    Engine(open_store()).put(tokens_of(1, 2))
    store = open_store()
    engine = Engine(store)
    store._books.disk.read = lambda key, frames: False
    reply = engine.match(tokens_of(1, 2))
    assert engine.check(reply) == [False, False]
    store.flush(20)
    stats = store.stats()
    assert (stats.promotions_failed, stats.chunks) == (2, 0)
    engine.release(reply)
    assert store.stats().bytes.host.used == 0
    assert engine.load(tokens_of(1, 2)) == 0


def test_chunks_that_were_read_from_disk_are_carried_over_when_their_segment_goes(open_store):
    store = open_store(disk_bytes=16 * MIB)
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(1))
    store.flush(20)
    for number in range(1000, 1150):
        engine.put(tokens_of(number))
        store.flush(20)
        if number % 5 == 0:
            assert engine.load(tokens_of(1)) == 1
    assert store.stats().disk["carried"] > 0


def test_chunks_that_were_promoted_are_carried_over_after_they_left_the_arena(open_store):
    store = open_store()
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(1))
    for number in range(1000, 1034):
        engine.put(tokens_of(number))
        store.flush(20)
    reply = engine.match(tokens_of(1))
    assert reply.tiers == bytes([TIER_DISK])
    engine.check(reply)
    engine.release(reply)
    for number in range(2000, 2080):
        engine.put(tokens_of(number))
        store.flush(20)
    assert store.stats().disk["carried"] > 0
    assert engine.match(tokens_of(1), lease=False).tiers == bytes([TIER_DISK])
