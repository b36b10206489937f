"""Match and release: what is found, what a lease keeps, what counts as a hit."""

import pytest

from cachetier.core.keys import ChainHasher
from cachetier.core.messages import (
    RESERVE_FILL,
    TIER_DISK,
    TIER_HOST,
)
from cachetier.store.store import Store
from tests.store.chunks import BIG, CHUNK_TOKENS
from tests.store.engines import Engine, tokens_of


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


def test_one_engine_stores_and_another_with_other_ranks_finds_it(store):
    Engine(store, "two ranks", 2).put(tokens_of(1, 2))
    single = Engine(store, "one rank")
    single.put(tokens_of(1, 2, 3))
    reply = single.match(tokens_of(1, 2, 3))
    assert [len(tiling) for tiling in reply.tilings] == [2, 1]
    assert reply.tiling_of == bytes([0, 0, 1])
    assert len(reply.frames) == len(reply.checksums) == 5
    assert all(single.check(reply))


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
    assert all(engine.check(reply))
    engine.release(held)
    store.flush(20)
    assert engine.load(tokens_of(*range(7))) == 7


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


def test_matching_costs_no_lease_when_nothing_is_held(store):
    engine = Engine(store)
    reply = engine.match(tokens_of(1, 2))
    assert (reply.lease, reply.frames, len(reply.keys)) == (0, [], 32)
    assert store.stats().leases == 0


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
