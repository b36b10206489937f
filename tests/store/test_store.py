"""The store as a whole: sessions, refusals, invalidation, limits, many threads."""

import random
import threading

import pytest

from cachetier.core.errors import ProtocolError, StorageError
from cachetier.core.keys import ModelIdentity
from cachetier.core.messages import (
    RESERVE_FILL,
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
from cachetier.store.store import Store
from tests.store.chunks import BIG, LAYOUT
from tests.store.engines import MIB, Engine, keys_of, make_config, tokens_of


def test_without_a_disk_tier_nothing_survives_and_everything_else_works(open_store):
    store = open_store(disk_bytes=0, segment_bytes=0)
    engine = Engine(store)
    engine.put(tokens_of(1, 2))
    assert engine.load(tokens_of(1, 2)) == 2
    assert store.flush()
    assert store.stats().bytes.disk.limit == 0
    store = open_store(disk_bytes=0, segment_bytes=0)
    assert Engine(store).load(tokens_of(1, 2)) == 0


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


def test_reports_add_up(store):
    engine = Engine(store)
    store.report(Report(session=engine.sessions[0], stores_dropped=3, loads_failed=2, matches_late=1))
    store.report(Report(session=engine.sessions[0], stores_dropped=-5))
    assert (store.stats().stores_dropped, store.stats().loads_failed, store.stats().matches_late) == (3, 2, 1)


def test_unknown_sessions_and_namespaces_are_404_everywhere(store):
    engine = Engine(store)
    session, namespace = engine.sessions[0], engine.namespace
    identity = ModelIdentity(
        model="m", weights="w", kv_dtype="b", attention="full", num_layers=1, num_kv_heads=1, k_head_size=1,
        v_head_size=1,
    )  # fmt: skip
    calls = [
        lambda s, n: store.match(Match(session=s, namespace=n, tokens=tokens_of(1))),
        lambda s, n: store.reserve(
            Reserve(session=s, namespace=n, tokens=tokens_of(1), tiling=[LAYOUT.whole()], shard=0)
        ),
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


def test_the_data_directory_has_one_owner(open_store, tmp_path):
    open_store()
    with pytest.raises(StorageError):
        Store(make_config(tmp_path))


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


def test_closing_twice_is_closing_once(tmp_path):
    store = Store(make_config(tmp_path))
    store.close()
    store.close()
