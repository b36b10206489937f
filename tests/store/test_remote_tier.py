"""The remote tier: several nodes with one store, and everything that can be wrong with it."""

import itertools
import threading
import time

import pytest

from cachetier.core.errors import ConfigError
from cachetier.core.messages import TIER_HOST, TIER_REMOTE, Invalidate, Match, Trim
from cachetier.storage.records import unpack_header
from cachetier.store import remote_gets, remote_puts, remote_tier
from cachetier.store.store import Store
from tests.remote.dict_store import DictStore, Shared
from tests.store.chunks import BIG, CHUNK_TOKENS
from tests.store.engines import MIB, Engine, keys_of, make_config, tokens_of

PROMPT = tokens_of(1, 2, 3, 4)


@pytest.fixture
def shared():
    return Shared()


@pytest.fixture
def open_node(tmp_path, shared, clock):
    """Open a server's store on a node of its own; check all of them when the test ends."""
    (tmp_path / "secret").write_text("ab" * 32)
    opened, numbers = [], itertools.count()

    def open_one(**settings):
        secret = str(tmp_path / "secret")
        settings = {"host_bytes": 16 * MIB, "remote_deadline_ms": 2000.0, "secret_file": secret} | settings
        config = make_config(tmp_path / f"node{next(numbers)}", **settings)
        opened.append(Store(config, clock=clock, remote=lambda memory: DictStore(shared, memory)))
        eventually(lambda: opened[-1].stats().remote_available or shared.is_dead)
        return opened[-1]

    yield open_one
    shared.gate.set()
    for store in opened:
        store.check_integrity()
        store.close()


@pytest.fixture
def producer(open_node):
    return open_node()


@pytest.fixture
def consumer(open_node):
    return open_node()


def eventually(is_true):
    deadline = time.monotonic() + 10
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert is_true()


def put(store, shared, tokens=PROMPT, **settings):
    """Store a prompt and wait until all of it is in the remote store; return the engine and the keys."""
    engine = Engine(store, "producer", **settings)
    reply = engine.put(tokens)
    names = [key.hex() for key in keys_of(reply)]
    eventually(lambda: all(any(value.endswith(name) for value in shared.values) for name in names))
    return engine, keys_of(reply)


def invalidate(engine, *keys):
    engine.store.invalidate(Invalidate(session=engine.sessions[0], keys=b"".join(keys)))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_one_node_stores_another_one_loads(shared, producer, consumer, num_ranks):
    _, keys = put(producer, shared, num_ranks=num_ranks)
    engine = Engine(consumer)
    reply = engine.match(PROMPT)
    assert reply.tiers == bytes([TIER_REMOTE] * 4)
    assert keys_of(reply) == keys
    assert engine.check(reply) == [True] * 4
    engine.release(reply, remote_tokens=4 * CHUNK_TOKENS)
    stats = consumer.stats()
    assert stats.tokens.hit.remote == 4 * CHUNK_TOKENS
    assert stats.bytes.remote.got == producer.stats().bytes.remote.put > 0
    assert stats.remote_failures == producer.stats().remote_failures == 0


def test_what_was_got_is_an_ordinary_chunk_from_then_on_and_is_not_put_again(shared, producer, consumer):
    put(producer, shared)
    engine = Engine(consumer)
    reply = engine.match(PROMPT)
    assert engine.check(reply) == [True] * 4
    assert engine.match(PROMPT).tiers == bytes([TIER_HOST] * 4)
    eventually(lambda: consumer.flush(10) and consumer.stats().chunks_durable == 4)
    engine.release(reply)
    assert consumer.stats().bytes.remote.put == 0


def test_no_more_tokens_are_counted_than_came_from_there(shared, producer, consumer):
    put(producer, shared)
    engine = Engine(consumer)
    reply = engine.match(PROMPT)
    engine.check(reply)
    engine.release(reply, remote_tokens=1000, host_tokens=1000)
    assert consumer.stats().tokens.hit.remote == 4 * CHUNK_TOKENS
    assert consumer.stats().tokens.hit.host == 0


def test_tiers_are_asked_in_their_order_and_the_remote_store_only_for_the_rest(shared, producer, consumer):
    put(producer, shared, tokens_of(1, 2, 3, 4, 5, 6))
    engine = Engine(consumer)
    engine.put(tokens_of(1, 2))
    shared.calls.clear()
    reply = engine.match(tokens_of(1, 2, 3, 4, 5, 6))
    assert reply.tiers == bytes([TIER_HOST] * 2 + [TIER_REMOTE] * 4)
    assert engine.check(reply) == [True] * 6
    engine.release(reply)
    shared.calls.clear()
    assert engine.load(tokens_of(1, 2, 3, 4, 5, 6)) == 6
    assert shared.calls == []


def test_a_long_prompt_is_looked_up_in_steps_and_found_up_to_the_first_miss(shared, producer, consumer, monkeypatch):
    monkeypatch.setattr(remote_tier, "LOOK_UP_CHUNKS", 4)
    _, keys = put(producer, shared, tokens_of(*range(40)))
    [name] = [name for name in shared.values if name.endswith(keys[30].hex())]
    del shared.values[name]
    engine = Engine(consumer)
    assert engine.load(tokens_of(*range(40))) == 30
    assert shared.calls.count("read_heads") - shared.calls.count("exists") <= 8


def test_another_salt_or_model_finds_nothing(shared, producer, consumer):
    put(producer, shared)
    assert Engine(consumer).load(PROMPT, salt="other") == 0
    assert Engine(consumer, model="other").load(PROMPT) == 0


@pytest.mark.parametrize("flipped_at", [45, 60, 100, 4000])
def test_a_damaged_header_is_a_miss(shared, producer, consumer, flipped_at):
    put(producer, shared)
    for name, value in shared.values.items():
        shared.values[name] = value[:flipped_at] + bytes([value[flipped_at] ^ 1]) + value[flipped_at + 1 :]
    assert Engine(consumer).load(PROMPT) == 0


def test_another_chunk_under_the_key_is_a_miss(shared, producer, consumer):
    put(producer, shared)
    put(producer, shared, tokens_of(7))
    [alien] = [v for v in shared.values.values() if unpack_header(v[:4096]).chunk.content == tokens_of(7)]
    for name in shared.values:
        shared.values[name] = alien
    assert Engine(consumer).load(PROMPT) == 0
    assert consumer.stats().bytes.host.used == 0, "it was fetched"


def test_damaged_bytes_are_found_deleted_not_looked_at_again_and_stored_anew(shared, producer, consumer):
    _, keys = put(producer, shared)
    [name] = [name for name in shared.values if name.endswith(keys[1].hex())]
    value = shared.values[name]
    shared.values[name] = value[:5000] + bytes([value[5000] ^ 1]) + value[5001:]
    engine = Engine(consumer)
    reply = engine.match(PROMPT)
    with pytest.raises(AssertionError, match="not those that were stored"):
        engine.check(reply)
    shared.gate.clear()
    invalidate(engine, keys[1])
    engine.release(reply)
    assert consumer.stats().checksum_failures == 1
    eventually(lambda: name not in shared.values)
    assert engine.match(PROMPT).num_chunks == 1
    shared.gate.set()
    engine.put(PROMPT)
    eventually(lambda: shared.values.get(name) == value)


def test_a_store_that_cannot_delete_a_damaged_value_is_not_believed_about_it(shared, producer, consumer):
    _, keys = put(producer, shared)
    engine = Engine(consumer)
    assert engine.load(PROMPT) == 4
    shared.keeps_all = True
    invalidate(engine, keys[0])
    eventually(lambda: "delete" in shared.calls)
    eventually(lambda: consumer.stats().remote_failures == 1 and consumer.stats().remote_available)
    assert engine.load(PROMPT) == 0


def test_what_vanishes_between_look_up_and_get_marks_its_frames(shared, producer, consumer):
    put(producer, shared)
    shared.gate.clear()
    engine = Engine(consumer)
    reply = engine.match(PROMPT)
    shared.values.clear()
    shared.gate.set()
    assert engine.check(reply) == [False] * 4
    engine.release(reply)
    assert consumer.stats().promotions_failed == 4
    assert consumer.stats().remote_available
    assert engine.load(PROMPT) == 0


def test_a_dead_store_costs_one_failure_and_then_nothing_until_it_is_back(shared, producer, consumer):
    put(producer, shared)
    shared.is_dead = True
    engine = Engine(consumer)
    assert engine.load(PROMPT) == 0
    shared.calls.clear()
    assert [engine.load(PROMPT) for _ in range(20)] == [0] * 20
    assert "read_heads" not in shared.calls
    assert (consumer.stats().remote_failures, consumer.stats().remote_available) == (1, 0)
    shared.is_dead = False
    eventually(lambda: consumer.stats().remote_available)
    assert engine.load(PROMPT) == 4


def test_a_slow_store_keeps_a_match_for_its_deadline_and_the_next_one_not_at_all(shared, producer, open_node):
    put(producer, shared)
    engine = Engine(open_node(remote_deadline_ms=50.0))
    shared.delay_s = 1.0
    start = time.monotonic()
    assert engine.match(PROMPT).num_chunks == 0
    assert 0.05 <= time.monotonic() - start < 0.5
    start = time.monotonic()
    assert engine.match(PROMPT).num_chunks == 0
    assert time.monotonic() - start < 0.04
    assert engine.store.stats().remote_failures == 1


def test_a_match_that_needs_no_remote_store_is_answered_at_once_and_others_say_that_they_wait(shared, consumer):
    engine = Engine(consumer)
    engine.put(PROMPT)
    message = {"session": engine.sessions[0], "namespace": engine.namespace}
    assert not callable(consumer.begin_match(Match(tokens=PROMPT, **message)))
    go_on = consumer.begin_match(Match(tokens=tokens_of(1, 2, 9), **message))
    assert callable(go_on)
    assert go_on().num_chunks == 2
    assert not callable(consumer.begin_match(Match(tokens=tokens_of(1, 2, 9), lease=False, **message)))


def test_a_get_that_hangs_is_given_up_and_its_frames_stay_until_it_ends(shared, producer, consumer, monkeypatch):
    monkeypatch.setattr(remote_gets, "GET_LIMIT_S", 0.05)
    put(producer, shared)
    shared.gate.clear()
    engine = Engine(consumer)
    reply = engine.match(PROMPT)
    time.sleep(0.1)
    consumer.expire()
    assert engine.check(reply) == [False] * 4
    engine.release(reply)
    assert consumer.stats().bytes.host.used > 0, "the store may still write there"
    assert consumer.stats().remote_available == 0
    consumer.check_integrity()
    shared.gate.set()
    eventually(lambda: consumer.stats().bytes.host.used == 0)


def test_what_waits_behind_a_get_that_hangs_is_given_up_too(shared, producer, open_node, monkeypatch):
    monkeypatch.setattr(remote_gets, "GET_LIMIT_S", 0.05)
    put(producer, shared, layout=BIG)
    put(producer, shared, tokens_of(11, 12), layout=BIG)
    engine = Engine(open_node(io_threads=1), layout=BIG)
    shared.gate.clear()
    first, second = engine.match(PROMPT), engine.match(tokens_of(11, 12))
    assert (first.num_chunks, second.num_chunks) == (4, 2)
    time.sleep(0.1)
    engine.store.expire()
    assert engine.check(second) == [False] * 2
    assert engine.check(first) == [False] * 4


def test_chunks_that_nobody_wants_any_more_are_not_fetched(shared, producer, open_node):
    put(producer, shared, tokens_of(*range(12)), layout=BIG)
    engine = Engine(open_node(io_threads=1), layout=BIG)
    assert engine.load(tokens_of(0)) == 1
    shared.gate.clear()
    blocking = engine.match(tokens_of(0, 1))
    eventually(lambda: engine.store._remote.fetcher._flying)
    reply = engine.match(tokens_of(*range(12)))
    trim = Trim(session=engine.sessions[0], lease=reply.lease, num_chunks=4)
    engine.store.trim(trim)
    assert engine.store.stats().promotions_skipped == 8
    shared.gate.set()
    engine.release(blocking)
    engine.release(reply)


def test_a_full_queue_drops_offers_counts_them_and_keeps_nobody_waiting(shared, open_node):
    store = open_node(remote_queue_bytes=70_000)
    engine = Engine(store)
    shared.delay_s = 0.2
    start = time.monotonic()
    engine.put(tokens_of(*range(20)))
    assert time.monotonic() - start < 0.15
    assert store.stats().remote_puts_dropped == 17
    eventually(lambda: len(shared.values) == 3)
    shared.delay_s = 0.0
    eventually(lambda: store._remote.putter._queued_bytes == 0)
    engine.put(tokens_of(*range(30, 33)))
    eventually(lambda: len(shared.values) == 6)


def test_what_is_stored_while_the_store_is_gone_is_put_when_it_is_back(shared, producer):
    shared.is_dead = True
    engine = Engine(producer)
    engine.match(tokens_of(9))
    assert not producer.stats().remote_available
    engine.put(PROMPT)
    producer.expire()
    shared.is_dead = False
    eventually(lambda: len(shared.values) == 4)
    assert producer.stats().remote_puts_dropped == 0


def test_what_waits_for_too_long_is_dropped_and_its_frames_can_be_evicted(shared, producer, monkeypatch):
    shared.is_dead = True
    engine = Engine(producer)
    engine.match(tokens_of(9))
    engine.put(PROMPT)
    monkeypatch.setattr(remote_puts, "OPEN_LIMIT_S", 0.0)
    producer.expire()
    assert producer.stats().remote_puts_dropped == 4
    producer.flush(10)
    assert all(chunk.pins == 0 for chunk in producer._books.table.chunks.values())
    engine.put(tokens_of(5, 6))
    assert producer.stats().remote_puts_dropped == 6


def test_a_full_store_is_tried_again_once_and_is_no_failure(shared, producer):
    shared.is_full = True
    Engine(producer).put(PROMPT)
    eventually(lambda: shared.calls.count("put") >= 2)
    eventually(lambda: producer.stats().remote_puts_dropped == 4)
    assert producer.stats().remote_available
    assert producer.stats().remote_failures == 0


def test_a_chunk_that_another_node_has_put_is_not_put_again(shared, producer, consumer):
    put(producer, shared)
    shared.calls.clear()
    Engine(consumer).put(PROMPT)
    eventually(lambda: "exists" in shared.calls)
    consumer.flush(10)
    eventually(lambda: consumer._remote.putter._queued_bytes == 0)
    assert consumer.stats().bytes.remote.put == 0
    assert consumer.stats().remote_puts_dropped == 0


def test_a_store_that_is_dead_from_the_start_keeps_nobody_from_opening_and_closing(shared, open_node, monkeypatch):
    monkeypatch.setattr(remote_puts, "OPEN_LIMIT_S", 0.0)
    shared.is_dead = True
    store = open_node()
    engine = Engine(store)
    engine.put(PROMPT)
    assert engine.load(PROMPT) == 4
    assert store.stats().remote_puts_dropped == 4


def test_a_close_waits_for_no_call_that_hangs(shared, producer, consumer):
    put(producer, shared)
    shared.delay_s = 5.0
    engine = Engine(consumer)
    thread = threading.Thread(target=engine.match, args=(PROMPT,), daemon=True)
    thread.start()
    time.sleep(0.1)
    start = time.monotonic()
    consumer.close(0.1)
    assert time.monotonic() - start < 3
    shared.delay_s = 0.0
    thread.join(10)


def test_speeds_are_known_once_something_was_fetched(shared, producer, consumer):
    put(producer, shared, tokens_of(*range(8)))
    engine = Engine(consumer)
    first = engine.match(tokens_of(0, 1))
    assert first.ready_in_s == []
    engine.check(first)
    eventually(lambda: consumer.stats().remote_bytes_per_s > 0)
    shared.gate.clear()
    second = engine.match(tokens_of(*range(8)))
    assert len(second.ready_in_s) == 6
    assert second.ready_in_s == sorted(second.ready_in_s)
    shared.gate.set()
    assert engine.check(second) == [True] * 8


def test_a_remote_store_without_a_shared_secret_is_warned_of(shared, open_node, caplog, tmp_path):
    config = make_config(tmp_path / "alone", remote="s3://bucket")
    Store(config, remote=None).close()
    assert "secret_file" in caplog.text


def test_an_unknown_store_is_refused_and_leaves_no_arena(tmp_path):
    config = make_config(tmp_path, remote="ftp://somewhere")
    with pytest.raises(ConfigError, match="mooncake://"):
        Store(config)
    store = Store(make_config(tmp_path))  # the data directory is free again
    store.close()


def test_the_value_of_a_chunk_is_its_record(shared, producer):
    put(producer, shared, tokens_of(1))
    [value] = shared.values.values()
    header = unpack_header(value[:4096])
    assert header.chunk.content == tokens_of(1)
    assert header.record_bytes == len(value)
