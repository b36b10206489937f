"""Promotion: what is read from disk, skipped, failed, and carried over for it."""

import threading
import time

import pytest

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import TIER_DISK, TIER_HOST, Trim
from cachetier.store import filler, matching, read_speed
from tests.store.chunks import BIG, CHUNK_TOKENS
from tests.store.engines import MIB, Engine, keys_of, tokens_of


def hold_reads(store):
    """Let the store's disk wait before every read until the gate that is returned opens; note what is read."""
    gate, order = threading.Event(), []
    read = store._books.disk.read_many

    def wait_and_read(wanted):
        order.extend(key for key, _ in wanted)
        gate.wait(10)
        return read(wanted)

    store._books.disk.read_many = wait_and_read
    return gate, order


def put_apart(store, *firsts):
    """Store prompts of three chunks, in this order, which is then their order on disk."""
    engine = Engine(store, layout=BIG)
    for first in firsts:
        engine.put(tokens_of(*range(first, first + 3)))
        store.flush(20)


def eventually(is_true):
    deadline = time.monotonic() + 10
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert is_true()


def test_a_promotion_that_nobody_waits_for_any_more_leaves_the_queue_and_the_arena_at_once(open_store):
    put_apart(open_store(), 0, 10, 20)
    store = open_store(io_threads=1)
    engine = Engine(store, layout=BIG)
    gate, order = hold_reads(store)
    first = engine.match(tokens_of(0, 1, 2))
    eventually(lambda: len(order) == 3)
    aborted, last = engine.match(tokens_of(10, 11, 12)), engine.match(tokens_of(20, 21, 22))
    used = store.stats().bytes.host.used
    engine.release(aborted)
    assert store.stats().promotions_skipped == 3
    assert store.stats().bytes.host.used == used * 2 // 3
    gate.set()
    assert engine.check(first) == engine.check(last) == [True] * 3
    assert order == [*keys_of(first), *keys_of(last)]
    assert store.stats().promoted == 6


def test_a_promotion_that_another_request_waits_for_stays(open_store):
    Engine(open_store(), layout=BIG).put(tokens_of(0, 1, 2))
    store = open_store(io_threads=1)
    engine = Engine(store, layout=BIG)
    gate, order = hold_reads(store)
    blocking = engine.match(tokens_of(0))
    eventually(lambda: len(order) == 1)
    aborted, other = engine.match(tokens_of(0, 1, 2)), engine.match(tokens_of(0, 1, 2))
    engine.release(aborted)
    engine.release(blocking)
    gate.set()
    assert engine.check(other) == [True] * 3
    assert store.stats().promotions_skipped == 0


def test_a_session_that_dies_takes_its_promotions_out_of_the_queue(open_store):
    Engine(open_store(), layout=BIG).put(tokens_of(*range(6)))
    store = open_store(io_threads=1)
    dying, living = Engine(store, "dying", layout=BIG), Engine(store, "living", layout=BIG)
    gate, order = hold_reads(store)
    reply = living.match(tokens_of(0))
    eventually(lambda: len(order) == 1)
    dying.match(tokens_of(*range(6)))
    dying.close()
    assert store.stats().promotions_skipped == 5
    gate.set()
    assert living.check(reply) == [True]


def test_chunks_are_read_in_the_order_of_requests_and_prompts(open_store):
    put_apart(open_store(), 20, 0, 10)
    store = open_store(io_threads=1)
    engine = Engine(store, layout=BIG)
    gate, order = hold_reads(store)
    replies = [engine.match(tokens_of(*range(first, first + 3))) for first in (0, 10, 20)]
    gate.set()
    assert all(all(engine.check(reply)) for reply in replies)
    assert order == [key for reply in replies for key in keys_of(reply)]


def test_a_long_prompt_is_looked_up_in_steps_and_found_whole(open_store, monkeypatch):
    monkeypatch.setattr(matching, "LOOK_UP_CHUNKS", 4)
    writer = Engine(open_store())
    writer.put(tokens_of(*range(30)))
    store = open_store()
    engine = Engine(store)
    assert engine.load(tokens_of(*range(10))) == 10
    reply = engine.match(tokens_of(*range(40)))
    assert reply.tiers == bytes([TIER_HOST] * 10 + [TIER_DISK] * 20)
    assert engine.check(reply) == [True] * 30


def test_a_promotion_that_fails_marks_its_frames_and_the_chunk_is_forgotten(open_store):
    Engine(open_store()).put(tokens_of(1, 2))
    store = open_store()
    engine = Engine(store)
    store._books.disk.read_many = lambda wanted: [False] * len(wanted)
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


def wait_until_read(store):
    deadline = time.monotonic() + 10
    while store._books.disk_pins.num_pinned and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_reply_says_when_chunks_on_disk_will_be_there_once_the_disk_was_measured(open_store):
    Engine(open_store(), layout=BIG).put(tokens_of(*range(7)))
    store = open_store(io_threads=1)
    engine = Engine(store, layout=BIG)
    read = store._books.disk.read_many
    store._books.disk.read_many = lambda wanted: time.sleep(0.02 * len(wanted)) or read(wanted)
    first = engine.match(tokens_of(0, 1))
    assert first.ready_in_s == []
    engine.check(first)
    wait_until_read(store)
    reply = engine.match(tokens_of(*range(7)))
    assert reply.tiers == bytes([TIER_HOST] * 2 + [TIER_DISK] * 5)
    assert reply.ready_in_s == sorted(reply.ready_in_s)
    assert 0 < reply.ready_in_s[0] < 0.1
    assert 4 < reply.ready_in_s[4] / reply.ready_in_s[0] < 6
    other = engine.match(tokens_of(*range(7)))
    assert 0 < other.ready_in_s[4] < 1.5 * reply.ready_in_s[4], (
        "who waits for the same reads does not wait for them twice"
    )
    engine.check(reply)
    wait_until_read(store)
    assert engine.match(tokens_of(*range(7))).ready_in_s == []


def test_what_is_cut_off_a_lease_is_not_read_and_is_counted(open_store, monkeypatch):
    monkeypatch.setattr(filler, "BATCH_BYTES", MIB)
    Engine(open_store(), layout=BIG).put(tokens_of(*range(7)))
    store = open_store(io_threads=1)
    engine = Engine(store, layout=BIG)
    gate, _ = hold_reads(store)
    reply = engine.match(tokens_of(*range(7)))
    session = engine.sessions[0]
    store.trim(Trim(session=session, lease=reply.lease, num_chunks=3))
    store.trim(Trim(session=session, lease=reply.lease + 1, num_chunks=0))
    gate.set()
    wait_until_read(store)
    arrived = engine.check(reply, wait=False)  # the thread may have taken more than these three before the cut
    stats = store.stats()
    assert arrived[:3] == [True] * 3
    assert stats.promotions_skipped == arrived.count(False) > 0
    assert (stats.hits_cut, stats.tokens_cut) == (1, 4 * CHUNK_TOKENS)
    engine.release(reply)
    assert store.stats().leases == 0


def test_a_lease_to_fill_cannot_be_cut(store):
    engine = Engine(store)
    reply = engine.reserve(tokens_of(1, 2))
    with pytest.raises(ProtocolError, match="only a lease to read"):
        store.trim(Trim(session=engine.sessions[0], lease=reply.lease, num_chunks=1))


def test_when_nothing_was_read_for_long_what_nobody_waits_for_shows_how_fast_the_disk_is(open_store, monkeypatch):
    monkeypatch.setattr(read_speed, "STALE_S", 0.0)
    Engine(open_store(), layout=BIG).put(tokens_of(*range(7)))
    store = open_store(io_threads=1)
    engine = Engine(store, layout=BIG)
    gate, _ = hold_reads(store)
    engine.release(engine.match(tokens_of(*range(7))))
    gate.set()
    wait_until_read(store)
    assert (store.stats().promoted, store.stats().promotions_skipped) == (7, 0)
    assert store.stats().disk_bytes_per_s > 0
