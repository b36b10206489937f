"""Reserve and commit: who fills what, when a chunk becomes visible, what is dropped."""

import pytest

from cachetier.core.arena_format import STATE_FILLING, STATE_READY
from cachetier.core.errors import ProtocolError
from cachetier.core.layout import Shard
from cachetier.core.messages import (
    RESERVE_DROPPED,
    RESERVE_FILL,
    RESERVE_PENDING,
    RESERVE_PRESENT,
    Commit,
    Renew,
    Reserve,
)
from cachetier.store.leases import SESSION_LEASE_TIMES
from tests.store.chunks import BIG, CHUNK_TOKENS, LAYOUT
from tests.store.engines import Engine, Filled, keys_of, tokens_of

TTL_S = 30.0


def test_a_chunk_is_visible_only_when_every_rank_has_committed(store):
    engine = Engine(store, num_ranks=2)
    first, second = engine.fill(tokens_of(1, 2), 0), engine.fill(tokens_of(1, 2), 1)
    assert engine.commit(first) == 2
    reply = engine.match(tokens_of(1, 2))
    assert (reply.num_chunks, reply.num_pending, reply.lease) == (0, 2, 0)
    assert store.stats().tokens.stored == 0
    assert engine.commit(second) == 2
    assert engine.load(tokens_of(1, 2)) == 2
    assert store.stats().tokens.stored == 2 * CHUNK_TOKENS


def test_ranks_that_commit_one_after_the_other_join_as_well(store):
    engine = Engine(store, num_ranks=2)
    engine.commit(engine.fill(tokens_of(1), 0))
    engine.commit(engine.fill(tokens_of(1), 1))
    assert engine.load(tokens_of(1)) == 1


def test_while_one_engine_stores_another_is_told_to_wait_or_that_it_is_there(store):
    one, other = Engine(store, "one"), Engine(store, "other")
    filling = one.fill(tokens_of(1, 2))
    assert other.reserve(tokens_of(1, 2, 3)).outcomes == bytes([RESERVE_PENDING, RESERVE_PENDING, RESERVE_FILL])
    assert one.reserve(tokens_of(1, 2)).outcomes == bytes([RESERVE_PENDING] * 2)
    one.commit(filling)
    assert other.reserve(tokens_of(1, 2)).outcomes == bytes([RESERVE_PRESENT] * 2)


def test_what_is_on_disk_alone_is_not_stored_again(open_store):
    Engine(open_store()).put(tokens_of(1, 2))
    engine = Engine(open_store())
    assert engine.reserve(tokens_of(1, 2, 3)).outcomes == bytes([RESERVE_PRESENT] * 2 + [RESERVE_FILL])


def test_a_chain_goes_on_where_an_earlier_message_ended(store):
    engine = Engine(store)
    keys = keys_of(engine.put(tokens_of(1, 2)))
    more = engine.put(tokens_of(3, 4), parent=keys[1], position=2)
    assert more.outcomes == bytes([RESERVE_FILL] * 2)
    led = engine.put(tokens_of(1, 2, 3, 4, 5), fill_from=4)
    assert led.outcomes == bytes([RESERVE_FILL])
    assert keys_of(led)[3] == keys_of(more)[1]
    assert engine.load(tokens_of(1, 2, 3, 4, 5)) == 5


def test_what_could_never_be_found_is_not_stored(store):
    engine = Engine(store)
    assert engine.reserve(tokens_of(2), parent=b"p" * 16, position=1).outcomes == bytes([RESERVE_DROPPED])
    assert engine.reserve(tokens_of(1, 2), fill_from=1).outcomes == bytes([RESERVE_DROPPED])
    key = keys_of(engine.put(tokens_of(1)))[0]
    assert engine.reserve(tokens_of(2), parent=key, position=7).outcomes == bytes([RESERVE_DROPPED])
    assert engine.reserve(tokens_of(2), parent=key, position=1, salt="x").outcomes == bytes([RESERVE_DROPPED])
    assert store.stats().stores_dropped == 4


def test_a_dropped_chunk_takes_the_rest_of_its_message_along(open_store):
    store = open_store()
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(*range(10)))
    engine.match(tokens_of(*range(10)))
    outcomes = engine.put(tokens_of(*range(100, 120))).outcomes
    filled = outcomes.count(RESERVE_FILL)
    assert 1 <= filled < 10
    assert outcomes == bytes([RESERVE_FILL] * filled + [RESERVE_DROPPED] * (20 - filled))
    assert engine.load(tokens_of(*range(10))) == 10


def test_a_chain_longer_than_the_arena_keeps_its_beginning(open_store):
    store = open_store(disk_bytes=0, segment_bytes=0)
    engine = Engine(store, layout=BIG)
    parent: dict[str, object] = {}
    for number in range(40):
        reply = engine.put(tokens_of(number), **parent)
        parent = {"parent": reply.keys, "position": number + 1}
    assert engine.load(tokens_of(*range(40))) >= 12


def test_chunks_that_the_engine_gives_up_are_dropped(store):
    engine = Engine(store)
    filled = engine.fill(tokens_of(1, 2, 3))
    filled.checksums[1] = None
    assert engine.commit(filled) == 2
    assert engine.load(tokens_of(1, 2, 3)) == 1
    assert store.stats().chunks_pending == 0
    assert engine.reserve(tokens_of(1, 2, 3)).outcomes == bytes([RESERVE_PRESENT, RESERVE_FILL, RESERVE_PRESENT])


def test_a_rank_that_gives_up_drops_the_chunk_but_nobodys_frame_is_reused_under_its_lease(store):
    engine = Engine(store, num_ranks=2)
    first, second = engine.fill(tokens_of(1), 0), engine.fill(tokens_of(1), 1)
    first.checksums[0] = None
    assert engine.commit(first) == 0
    used = store.stats().bytes.host.used
    assert used > 0
    assert store._arena.state(second.reply.frames[0]) == STATE_FILLING
    assert engine.commit(second) == 0
    assert store.stats().bytes.host.used == 0


def test_a_chunk_that_one_rank_never_stores_is_given_up(store, clock):
    engine = Engine(store, num_ranks=2)
    engine.commit(engine.fill(tokens_of(1), 0))
    clock.now = TTL_S - 1
    store.expire()
    assert store.stats().chunks_pending == 1
    clock.now = TTL_S
    store.expire()
    stats = store.stats()
    assert (stats.chunks_pending, stats.bytes.host.used, stats.stores_dropped) == (0, 0, 1)


def test_a_dead_session_gives_back_what_it_leased_and_drops_what_it_was_storing(store):
    engine, other = Engine(store, "dies"), Engine(store, "lives")
    engine.put(tokens_of(1))
    engine.match(tokens_of(1))
    engine.fill(tokens_of(1, 2))
    assert store.stats().leases == 2
    engine.close()
    stats = store.stats()
    assert (stats.leases, stats.chunks_pending, stats.chunks, stats.leases_expired) == (0, 0, 1, 2)
    assert other.reserve(tokens_of(1, 2)).outcomes == bytes([RESERVE_PRESENT, RESERVE_FILL])


def test_an_expired_lease_commits_nothing_and_renewing_keeps_it(store, clock):
    engine = Engine(store)
    kept, lost = engine.fill(tokens_of(1)), engine.fill(tokens_of(2))
    clock.now = TTL_S - 1
    assert store.renew(Renew(session=engine.sessions[0], leases=[kept.reply.lease, 7])).expired == [7]
    clock.now = TTL_S
    store.expire()
    assert engine.commit(lost) == 0
    assert engine.commit(kept) == 1
    assert store.stats().leases == 0


def test_a_session_that_gives_no_sign_of_life_ends(store, clock):
    engine = Engine(store)
    clock.now = SESSION_LEASE_TIMES * TTL_S
    store.expire()
    with pytest.raises(ProtocolError) as caught:
        engine.match(tokens_of(1))
    assert caught.value.status == 404


GOOD = {"tokens": tokens_of(1, 2), "tiling": [LAYOUT.whole()], "shard": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": b"\0"},
        {"tokens": tokens_of(1)[:-4]},
        {"shard": 1},
        {"shard": -1},
        {"tiling": []},
        {"tiling": [Shard(0, 1, 0, 4)]},
        {"fill_from": 3},
        {"fill_from": -1},
        {"position": -1},
        {"position": 1},
        {"parent": b"p" * 16},
        {"parent": b"p", "position": 1},
        {"parent": b"p" * 16, "position": 1 << 40},
        {"group": 1},
        {"salt": "s" * 5000},
        {"extras": [(0, b"a"), (0, b"b")]},
        {"extras": [(-1, b"a")]},
        {"extras": [(0, b"a" * 5000)]},
    ],
)
def test_impossible_reserves_are_refused_and_change_nothing(store, wrong):
    engine = Engine(store)
    message = GOOD | {"session": engine.sessions[0], "namespace": engine.namespace}
    with pytest.raises(ProtocolError) as caught:
        store.reserve(Reserve(**(message | wrong)))
    assert caught.value.status == 400
    assert store.stats().leases == store.stats().chunks_pending == 0


def test_impossible_commits_are_refused_and_leave_the_lease_alone(store):
    engine = Engine(store)
    filled = engine.fill(tokens_of(1, 2))
    for checksums in ([1], [1, 2, 3], [-1, 2], [1 << 64, 2]):
        with pytest.raises(ProtocolError) as caught:
            engine.commit(Filled(filled.session, filled.reply, checksums))
        assert caught.value.status == 400
    assert engine.commit(filled) == 2
    reply = engine.match(tokens_of(1))
    with pytest.raises(ProtocolError) as caught:
        store.commit(Commit(session=engine.sessions[0], lease=reply.lease, checksums=[1]))
    assert caught.value.status == 409


def test_no_session_ends_or_commits_the_lease_of_another(store):
    engine, other = Engine(store), Engine(store, "other")
    filled = engine.fill(tokens_of(1))
    other.release(filled.reply)
    assert other.commit(Filled(other.sessions[0], filled.reply, filled.checksums)) == 0
    assert engine.commit(filled) == 1


def test_a_frame_of_a_ready_chunk_says_so(store):
    engine = Engine(store)
    filled = engine.fill(tokens_of(1))
    assert store._arena.state(filled.reply.frames[0]) == STATE_FILLING
    engine.commit(filled)
    assert store._arena.state(filled.reply.frames[0]) == STATE_READY
