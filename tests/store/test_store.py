"""The store as a whole: tiers, visibility, leases, refusals, bounds."""

import random
import threading
import time

import pytest

from cachetier.core.arena_format import STATE_FILLING, STATE_READY
from cachetier.core.errors import ProtocolError, StorageError
from cachetier.core.keys import ChainHasher, ModelIdentity
from cachetier.core.layout import KVLayout, Shard
from cachetier.core.messages import (
    RESERVE_DROPPED,
    RESERVE_FILL,
    RESERVE_PENDING,
    RESERVE_PRESENT,
    TIER_DISK,
    TIER_HOST,
    Commit,
    Invalidate,
    LeaseUse,
    Match,
    RegisterNamespace,
    Release,
    Renew,
    Report,
    Reserve,
)
from cachetier.store.leases import SESSION_LEASE_TIMES
from cachetier.store.store import Store
from tests.store.chunks import CHUNK_TOKENS, LAYOUT
from tests.store.engines import MIB, Engine, Filled, keys_of, make_config, tokens_of

TTL_S = 30.0
BIG = KVLayout(num_layers=4, num_kv_heads=2, row_bytes=2048)  # 256 KiB a chunk: 14 in the smallest arena


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


def test_a_prompt_is_found_up_to_where_it_was_stored(store):
    engine = Engine(store)
    engine.put(tokens_of(1, 2, 3))
    assert engine.load(tokens_of(1, 2, 3)) == 3
    assert engine.load(tokens_of(1, 2, 9)) == 2
    assert engine.load(tokens_of(1, 2, 3, 4)) == 3
    assert engine.load(tokens_of(2, 3)) == 0
    assert engine.load(tokens_of(1)[:-4]) == 0
    assert engine.load(tokens_of(1) + tokens_of(2)[:20]) == 1


def test_salts_models_and_extras_separate_prompts(store):
    engine, other = Engine(store), Engine(store, "other", model="other")
    engine.put(tokens_of(1, 2))
    engine.put(tokens_of(5, 6), extras=[(1, b"image")])
    engine.put(tokens_of(7), salt="tenant")
    assert other.load(tokens_of(1, 2)) == 0
    assert engine.load(tokens_of(1, 2), salt="tenant") == 0
    assert engine.load(tokens_of(7), salt="tenant") == 1
    assert engine.load(tokens_of(7)) == 0
    assert engine.load(tokens_of(5, 6)) == 1
    assert engine.load(tokens_of(5, 6), extras=[(1, b"other image")]) == 1
    assert engine.load(tokens_of(5, 6), extras=[(1, b"image")]) == 2


def test_a_restart_finds_on_disk_what_was_stored_and_promotes_it(open_store):
    store = open_store()
    Engine(store).put(tokens_of(*range(10)))
    store = open_store()
    engine = Engine(store)
    assert store.stats().chunks == store.stats().chunks_durable == 10
    reply = engine.match(tokens_of(*range(12)))
    assert reply.tiers == bytes([TIER_DISK]) * 10
    assert engine.check(reply) == [True] * 10
    assert engine.match(tokens_of(*range(10))).tiers == bytes([TIER_HOST]) * 10
    stats = store.stats()
    assert (stats.promoted, stats.chunks, stats.chunks_host, stats.chunks_durable) == (10, 10, 10, 10)


def test_without_a_disk_tier_nothing_survives_and_everything_else_works(open_store):
    store = open_store(disk_bytes=0, segment_bytes=0)
    engine = Engine(store)
    engine.put(tokens_of(1, 2))
    assert engine.load(tokens_of(1, 2)) == 2
    assert store.flush()
    assert store.stats().bytes.disk.limit == 0
    store = open_store(disk_bytes=0, segment_bytes=0)
    assert Engine(store).load(tokens_of(1, 2)) == 0


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


def test_one_engine_stores_and_another_with_other_ranks_finds_it(store):
    Engine(store, "two ranks", 2).put(tokens_of(1, 2))
    single = Engine(store, "one rank")
    single.put(tokens_of(1, 2, 3))
    reply = single.match(tokens_of(1, 2, 3))
    assert [len(tiling) for tiling in reply.tilings] == [2, 1]
    assert reply.tiling_of == bytes([0, 0, 1])
    assert len(reply.frames) == len(reply.checksums) == 5
    assert engine_reads(single, reply)


def engine_reads(engine: Engine, reply) -> bool:
    return all(engine.check(reply))


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


def test_leased_chunks_survive_any_pressure_and_keep_their_bytes(open_store):
    store = open_store()
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(1, 2, 3))
    reply = engine.match(tokens_of(1, 2, 3))
    for number in range(100, 200):
        engine.put(tokens_of(number))
    assert engine.check(reply, wait=False) == [True] * 3
    assert store.stats().host_evicted > 50


def test_a_match_that_finds_no_room_for_promotion_ends_there(open_store):
    Engine(open_store(), layout=BIG).put(tokens_of(*range(7)))
    store = open_store()
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(*range(100, 110)))
    store.flush(20)
    held = engine.match(tokens_of(*range(100, 110)))
    reply = engine.match(tokens_of(*range(7)))
    assert 1 <= reply.num_chunks < 7
    assert engine_reads(engine, reply)
    engine.release(held)
    store.flush(20)
    assert engine.load(tokens_of(*range(7))) == 7


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


def test_invalidated_chunks_are_gone_from_every_tier_for_good(open_store):
    store = open_store()
    engine = Engine(store)
    keys = keys_of(engine.put(tokens_of(1, 2, 3)))
    store.flush(20)
    reply = engine.match(tokens_of(1, 2, 3))
    store.invalidate(Invalidate(session=engine.sessions[0], keys=keys[1] + b"?" * 16))
    assert engine.load(tokens_of(1, 2, 3)) == 1
    assert engine.check(reply) == [True] * 3
    assert store.stats().checksum_failures == 1
    store.flush(20)
    assert store.stats().chunks_durable == 2
    engine = Engine(open_store())
    assert engine.load(tokens_of(1, 2, 3)) == 1
    engine.put(tokens_of(1, 2, 3))
    assert engine.load(tokens_of(1, 2, 3)) == 3


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


def test_hits_are_counted_when_they_were_used_and_never_more_than_was_leased(open_store):
    Engine(open_store()).put(tokens_of(1, 2))
    store = open_store()
    engine = Engine(store)
    reply = engine.match(tokens_of(1, 2, 3) + b"\1\0\0\0")
    engine.check(reply)
    engine.release(reply, host_tokens=10**9, disk_tokens=10**9)
    engine.release(reply, host_tokens=16, disk_tokens=16)
    engine.match(tokens_of(1), lease=False)
    reply = engine.match(tokens_of(1))
    engine.release(reply, host_tokens=5, disk_tokens=-3)
    tokens = store.stats().tokens
    assert (tokens.queried, tokens.hit.host, tokens.hit.disk) == (4 * CHUNK_TOKENS, 5, 2 * CHUNK_TOKENS)


def test_asking_without_a_lease_touches_nothing(open_store):
    Engine(open_store()).put(tokens_of(1, 2))
    store = open_store()
    engine = Engine(store)
    reply = engine.match(tokens_of(1, 2), lease=False)
    assert (reply.num_chunks, reply.lease, reply.tiers) == (2, 0, bytes([TIER_DISK] * 2))
    stats = store.stats()
    assert (stats.leases, stats.bytes.host.used, stats.tokens.queried) == (0, 0, 0)


def test_reports_add_up(store):
    engine = Engine(store)
    store.report(Report(session=engine.sessions[0], stores_dropped=3, loads_failed=2))
    store.report(Report(session=engine.sessions[0], stores_dropped=-5))
    assert (store.stats().stores_dropped, store.stats().loads_failed) == (3, 2)


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


def test_unknown_sessions_and_namespaces_are_404_everywhere(store):
    engine = Engine(store)
    session, namespace = engine.sessions[0], engine.namespace
    identity = ModelIdentity(
        model="m", weights="w", kv_dtype="b", attention="full", num_layers=1, num_kv_heads=1, k_head_size=1,
        v_head_size=1,
    )  # fmt: skip
    calls = [
        lambda s, n: store.match(Match(session=s, namespace=n, tokens=tokens_of(1))),
        lambda s, n: store.reserve(Reserve(session=s, namespace=n, **GOOD)),
    ]
    of_session = [
        lambda s: store.register_namespace(RegisterNamespace(session=s, identity=identity, layouts=[LAYOUT])),
        lambda s: store.release(Release(session=s, uses=[LeaseUse(lease=1)])),
        lambda s: store.renew(Renew(session=s, leases=[1])),
        lambda s: store.commit(Commit(session=s, lease=1, checksums=[])),
        lambda s: store.invalidate(Invalidate(session=s, keys=b"")),
        lambda s: store.report(Report(session=s)),
    ]
    wrong = [lambda call=call: call(session, b"?" * 16) for call in calls]
    wrong += [lambda call=call: call(session + 99, namespace) for call in calls]
    wrong += [lambda call=call: call(session + 99) for call in of_session]
    for call in wrong:
        with pytest.raises(ProtocolError) as caught:
            call()
        assert caught.value.status == 404


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


def test_matching_costs_no_lease_when_nothing_is_held(store):
    engine = Engine(store)
    reply = engine.match(tokens_of(1, 2))
    assert (reply.lease, reply.frames, len(reply.keys)) == (0, [], 32)
    assert store.stats().leases == 0


def test_the_data_directory_has_one_owner(open_store, tmp_path):
    open_store()
    with pytest.raises(StorageError):
        Store(make_config(tmp_path))


def test_a_namespace_is_remembered_across_restarts(open_store):
    Engine(open_store())
    store = open_store()
    assert store.stats().namespaces == 1
    with pytest.raises(ProtocolError) as caught:
        Engine(store, layout=BIG)
    assert caught.value.status == 409


def test_no_tenant_takes_more_than_its_quota(open_store):
    store = open_store(tenant_quota=0.25)
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(1, 2), salt="modest")
    for number in range(100, 150):
        assert engine.put(tokens_of(number), salt="greedy").outcomes == bytes([RESERVE_FILL])
        assert store.stats().bytes.host.used <= (0.25 * 4 + 0.6) * MIB
        store.flush(20)  # what waits to be written cannot go
    reply = engine.match(tokens_of(1, 2), salt="modest")
    assert reply.tiers == bytes([TIER_HOST] * 2)


def test_host_and_disk_stay_within_their_limits_under_ten_times_the_load(open_store):
    store = open_store(disk_bytes=16 * MIB)
    engine, seed = Engine(store, layout=BIG), random.Random(5)
    for number in range(700):
        engine.put(tokens_of(number))
        if number % 5 == 0:
            engine.load(tokens_of(seed.randrange(number + 1)))
        if number % 20 == 0:
            stats = store.stats()
            assert stats.bytes.host.used <= stats.bytes.host.limit <= 4 * MIB
            assert stats.bytes.disk.used <= stats.bytes.disk.limit == 16 * MIB
            store.flush(20)
    store.flush(20)
    stats = store.stats()
    assert stats.leases == stats.chunks_pending == stats.flush_backlog_bytes == 0
    assert stats.disk["reclaimed_segments"] > 10
    assert stats.chunks_durable < 64


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
    store = open_store(disk_bytes=16 * MIB)
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(1))
    for number in range(1000, 1031):
        engine.put(tokens_of(number))
        store.flush(20)
    reply = engine.match(tokens_of(1))
    assert reply.tiers == bytes([TIER_DISK])
    engine.check(reply)
    engine.release(reply)
    for number in range(2000, 2040):
        engine.put(tokens_of(number))
        store.flush(20)
    assert store.stats().disk["carried"] > 0
    assert engine.match(tokens_of(1), lease=False).tiers == bytes([TIER_DISK])


class CollidingHasher(ChainHasher):
    """A hasher whose keys depend on the position alone."""

    def chain(self, parent, contents):
        keys, key = [], parent
        for _ in contents:
            key = self.extend(key, b"")
            keys.append(key)
        return keys


@pytest.mark.parametrize("is_restarted", [False, True], ids=["host", "disk"])
def test_a_collision_of_keys_is_a_miss(open_store, is_restarted):
    def collide(store: Store) -> Store:
        object.__setattr__(store._books, "hasher", CollidingHasher(store.data_dir.secret))
        return store

    store = collide(open_store())
    engine = Engine(store)
    engine.put(tokens_of(1, 2))
    if is_restarted:
        store = collide(open_store())
        engine = Engine(store)
    assert engine.match(tokens_of(1, 3), lease=False).num_chunks == 1
    assert engine.load(tokens_of(1, 3)) == 1
    assert engine.load(tokens_of(4)) == 0
    assert engine.reserve(tokens_of(4)).outcomes != bytes([RESERVE_FILL])
    assert engine.load(tokens_of(1, 2)) == 2


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


def test_a_hot_prompt_survives_a_scan_of_ten_times_the_arena(open_store):
    store = open_store(disk_bytes=0, segment_bytes=0)
    engine = Engine(store, layout=BIG)
    engine.put(tokens_of(1, 2, 3, 4))
    engine.load(tokens_of(1, 2, 3, 4))
    for number in range(1000, 1140):
        engine.put(tokens_of(number))
    assert engine.load(tokens_of(1, 2, 3, 4)) == 4


def test_many_threads_store_and_load_at_once(open_store):
    store = open_store(disk_bytes=16 * MIB)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            engine, seed = Engine(store, f"engine {number}", layout=BIG), random.Random(number)
            for _ in range(60):
                prompt = tokens_of(*(seed.randrange(3) for _ in range(seed.randrange(1, 5))))
                engine.put(prompt)
                reply = engine.match(prompt)
                assert all(engine.check(reply))
                engine.release(reply)
            engine.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = store.stats()
    assert stats.leases == stats.sessions == stats.chunks_pending == 0


def test_a_frame_of_a_ready_chunk_says_so(store):
    engine = Engine(store)
    filled = engine.fill(tokens_of(1))
    assert store._arena.state(filled.reply.frames[0]) == STATE_FILLING
    engine.commit(filled)
    assert store._arena.state(filled.reply.frames[0]) == STATE_READY


def test_closing_twice_is_closing_once(tmp_path):
    store = Store(make_config(tmp_path))
    store.close()
    store.close()
