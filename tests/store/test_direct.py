"""Engines that read segment files themselves: what they are given, and that it stays while they hold a lease."""

import pytest

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import TIER_DISK, TIER_HOST, Invalidate, ReadsDirectly, Trim
from tests.store.chunks import BIG
from tests.store.engines import MIB, Engine, keys_of, tokens_of


@pytest.fixture
def stored(open_store):
    """A store, opened anew, with a prompt of six chunks on disk."""
    Engine(open_store(disk_bytes=16 * MIB), layout=BIG).put(tokens_of(*range(6)))
    return open_store(disk_bytes=16 * MIB)


def wrap_around(store, engine, rounds=1):
    """Store so much else that every segment is reclaimed."""
    for number in range(1000, 1000 + 70 * rounds):
        engine.put(tokens_of(number))
        store.flush(20)


def test_an_engine_that_reads_directly_is_given_places_in_segment_files(stored):
    engine = Engine(stored, layout=BIG)
    engine.read_directly()
    reply = engine.match(tokens_of(*range(6)))
    assert reply.tiers == bytes([TIER_DISK] * 6)
    assert (reply.segment_of, [path.rpartition("/")[2] for path in reply.segments]) == (
        [1, 1, 1, 2, 2, 2],
        ["00000001.seg", "00000002.seg"],
    )
    assert engine.check(reply) == [True] * 6
    assert reply.ready_in_s == sorted(reply.ready_in_s)
    assert 0 < reply.ready_in_s[0] < reply.ready_in_s[5] < 0.01
    assert stored.stats().bytes.host.used == 0
    engine.release(reply, disk_tokens=32)
    assert stored.stats().tokens.hit.disk == 32
    assert stored._books.disk.num_held == 0


def test_what_was_read_directly_once_is_promoted_the_next_time(stored):
    engine = Engine(stored, layout=BIG)
    engine.read_directly()
    engine.release(engine.match(tokens_of(*range(3))))
    reply = engine.match(tokens_of(*range(6)))
    assert reply.segment_of == [0, 0, 0, 1, 1, 1]
    assert engine.check(reply) == [True] * 6
    engine.release(reply)
    assert engine.match(tokens_of(*range(3))).tiers == bytes([TIER_HOST] * 3)


def test_only_an_engine_all_of_whose_workers_read_directly_does(stored):
    first, other = Engine(stored, "two", num_ranks=2, layout=BIG), Engine(stored, "other", layout=BIG)

    def says(rank, bytes_per_s=1e9):
        message = ReadsDirectly(session=first.sessions[rank], num_workers=2, bytes_per_s=bytes_per_s)
        stored.reads_directly(message)

    def is_direct(engine, chunk):
        reply = engine.match(tokens_of(*range(chunk + 1)))
        engine.check(reply)
        engine.release(reply)
        return bool(reply.segments)

    says(0)
    assert not is_direct(first, 0)
    says(1)
    assert is_direct(first, 1)
    assert not is_direct(other, 2)
    says(1, 0)
    assert not is_direct(first, 3)
    says(1)
    assert is_direct(first, 4)
    stored.close_session(first.sessions[1])
    assert not is_direct(first, 5)


def test_what_a_direct_lease_names_stays_until_it_ends_though_its_segment_is_reclaimed(stored):
    engine = Engine(stored, layout=BIG)
    engine.read_directly()
    reply = engine.match(tokens_of(*range(6)))
    wrap_around(stored, engine, rounds=2)
    assert stored.stats().disk["reclaimed_segments"] > 32
    assert engine.check(reply) == [True] * 6
    engine.release(reply)
    assert stored._books.disk.num_held == 0
    wrap_around(stored, engine)
    assert engine.match(tokens_of(*range(6)), lease=False).num_chunks == 0


@pytest.mark.parametrize("how", ["close", "expire", "trim"])
def test_a_direct_lease_that_ends_otherwise_lets_go_too(stored, clock, how):
    engine = Engine(stored, layout=BIG)
    engine.read_directly()
    reply = engine.match(tokens_of(*range(6)))
    assert stored._books.disk.num_held == 6
    if how == "close":
        engine.close()
    elif how == "expire":
        clock.now += 1000
        stored.expire()
    else:
        stored.trim(Trim(session=engine.sessions[0], lease=reply.lease, num_chunks=2))
        assert stored._books.disk.num_held == 2
        engine.release(reply)
    assert stored._books.disk.num_held == 0


def test_a_match_that_ends_in_an_error_holds_nothing(stored):
    engine = Engine(stored, layout=BIG)
    engine.read_directly()
    find = stored._books.disk.lookup
    stored._books.disk.lookup = lambda key: stored.close_session(engine.sessions[0]) or find(key)
    with pytest.raises(ProtocolError):
        engine.match(tokens_of(*range(6)))
    assert stored._books.disk.num_held == 0


def test_a_chunk_whose_bytes_an_engine_found_wrong_is_dropped(stored):
    engine = Engine(stored, layout=BIG)
    engine.read_directly()
    reply = engine.match(tokens_of(*range(6)))
    stored.invalidate(Invalidate(session=engine.sessions[0], keys=keys_of(reply)[2]))
    engine.release(reply)
    assert engine.match(tokens_of(*range(6)), lease=False).num_chunks == 2
    assert stored.stats().checksum_failures == 1
