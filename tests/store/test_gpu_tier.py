"""The GPU tier's books: what gets a copy, when it can be read, who makes room, and how it ends with its owner."""

import pytest

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import TIER_DISK, TIER_GPU, TIER_HOST, Invalidate, OpenSession, Trim
from cachetier.core.pool_messages import POOL_FILL, CheckPools, OfferPool
from tests.store.chunks import BIG, CHUNK_TOKENS
from tests.store.engines import Engine, keys_of, tokens_of
from tests.store.pools import FRAMES, Memory, Pooled, fills_of, num_copies

TTL_S = 30.0


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def engine(store, memory):
    made = Pooled(store, "engine", num_ranks=2)
    made.give_pools(memory)
    return made


def reconnect(engine: Pooled, rank: int) -> None:
    """Open a rank's session anew, as after a lost connection."""
    engine.store.close_session(engine.sessions[rank])
    message = OpenSession(client=f"worker {rank}", engine=engine.name, pid=rank)
    engine.sessions[rank] = engine.store.open_session(message).session


def test_a_chunk_that_is_asked_for_again_gets_a_copy_that_the_next_match_names(store, engine, memory):
    engine.put(tokens_of(1, 2))
    first = engine.warm(tokens_of(1, 2))
    assert first.tiers == bytes([TIER_HOST] * 2)
    assert first.pool_of == bytes([POOL_FILL] * 2)
    assert first.pools == []
    second = engine.ask(tokens_of(1, 2, 3))
    assert second.tiers == bytes([TIER_GPU] * 2)
    assert num_copies(second, memory) == 2
    assert [part.device for part in second.pools[0].parts] == ["GPU-0", "GPU-1"]
    assert second.pools[0].engine == "engine"
    assert second.fill == 0
    assert engine.check(second) == [True, True], "the frames in host memory are named as well"
    assert store.look_up(engine.namespace, tokens_of(1, 2, 3), "").tiers == second.tiers, "routers are told as well"
    stats = store.stats()
    assert (stats.gpu_filled, stats.chunks_gpu) == (2, 2)
    assert stats.bytes.gpu.used * FRAMES == stats.bytes.gpu.limit * 2 > 0


def test_tokens_loaded_from_a_copy_count_for_the_gpu_tier_and_for_no_more_than_there_were(store, engine):
    engine.put(tokens_of(1))
    engine.warm(tokens_of(1))
    counted = store.stats().tokens.hit
    engine.put(tokens_of(1, 2))
    reply = engine.ask(tokens_of(1, 2))
    assert reply.tiers == bytes([TIER_GPU, TIER_HOST])
    engine.release(reply, gpu_tokens=1000, host_tokens=1000)
    hit = store.stats().tokens.hit
    assert (hit.gpu - counted.gpu, hit.host - counted.host, hit.disk) == (CHUNK_TOKENS, CHUNK_TOKENS, 0)


def test_an_engine_that_reads_no_pools_is_told_of_none(store, engine):
    engine.put(tokens_of(1))
    engine.warm(tokens_of(1))
    reply = engine.match(tokens_of(1))
    assert (reply.tiers, reply.pools, reply.pool_of, reply.pool_frames) == (bytes([TIER_HOST]), [], b"", [])


def test_an_engine_without_a_pool_reads_those_of_others_and_copies_nothing(store, engine, memory):
    engine.put(tokens_of(1, 2))
    engine.warm(tokens_of(1))
    other = Pooled(store, "other")
    reply = other.ask(tokens_of(1, 2))
    assert reply.tiers == bytes([TIER_GPU, TIER_HOST])
    assert num_copies(reply, memory) == 1
    assert fills_of(reply) == []


def test_a_chunk_that_another_engine_cut_differently_gets_no_copy_in_this_ones_pool(store, engine, memory):
    single = Pooled(store, "single")
    single.give_pools(memory)
    single.put(tokens_of(1))
    engine.put(tokens_of(1, 2))
    assert [key for key, _ in fills_of(engine.warm(tokens_of(1, 2)))] == keys_of(engine.ask(tokens_of(1, 2)))[1:]
    single.warm(tokens_of(1, 2))
    reply = engine.ask(tokens_of(1, 2))
    assert reply.tiers == bytes([TIER_GPU] * 2)
    assert [len(pool.parts) for pool in reply.pools] == [1, 2]
    assert num_copies(reply, memory) == 2


def test_what_is_on_its_way_from_disk_gets_no_copy_before_it_is_asked_for_again(open_store, memory):
    Engine(open_store()).put(tokens_of(1, 2))
    store = open_store()
    engine = Pooled(store)
    engine.give_pools(memory)
    reply = engine.ask(tokens_of(1, 2))
    assert reply.tiers == bytes([TIER_DISK] * 2)
    assert fills_of(reply) == []
    assert all(engine.check(reply))
    assert len(fills_of(engine.ask(tokens_of(1, 2)))) == 2


def test_a_copy_is_read_only_when_all_ranks_have_committed_it(store, engine):
    engine.put(tokens_of(1, 2))
    reply = engine.ask(tokens_of(1, 2))
    engine.write(reply, 0)
    engine.commit_fill(reply, 0)
    other = engine.ask(tokens_of(1, 2))
    assert (other.tiers, other.fill) == (bytes([TIER_HOST] * 2), 0), "not there, and not ordered twice"
    engine.write(reply, 1)
    engine.commit_fill(reply, 1, [reply.pool_frames[1]])
    assert engine.ask(tokens_of(1, 2)).tiers == bytes([TIER_HOST, TIER_GPU])


def test_commits_after_the_release_count_and_after_a_release_without_use_do_not(store, engine):
    engine.put(tokens_of(1))
    for used, tier in ((0, TIER_HOST), (CHUNK_TOKENS, TIER_GPU)):
        reply = engine.ask(tokens_of(1))
        assert len(fills_of(reply)) == 1
        engine.release(reply, host_tokens=used)
        for rank in range(2):
            engine.write(reply, rank)
            engine.commit_fill(reply, rank)
        assert Pooled(store, "other").ask(tokens_of(1)).tiers == bytes([tier])


def test_only_the_pools_own_ranks_commit(store, engine):
    engine.put(tokens_of(1))
    reply = engine.ask(tokens_of(1))
    stranger = Pooled(store, "stranger", num_ranks=2)
    for rank in range(2):
        stranger.commit_fill(reply, rank, reply.pool_frames)
    assert engine.ask(tokens_of(1)).tiers == bytes([TIER_HOST])


def test_a_fill_that_is_not_committed_in_time_gives_its_frames_back(store, engine, clock):
    engine.put(tokens_of(*range(FRAMES)))
    late = engine.ask(tokens_of(*range(FRAMES)))
    assert len(fills_of(late)) == FRAMES
    engine.put(tokens_of(100))
    clock.now += TTL_S
    store.expire()
    assert fills_of(engine.ask(tokens_of(100))) == [], "a rank may still be at it"
    clock.now += TTL_S
    store.expire()
    assert len(fills_of(engine.ask(tokens_of(100)))) == 1
    engine.commit_fill(late, 0)
    engine.commit_fill(late, 1)
    assert store.stats().gpu_filled == 0


def test_a_lease_that_is_renewed_keeps_its_fill_open(store, engine, clock):
    engine.put(tokens_of(1))
    reply = engine.ask(tokens_of(1))
    for _ in range(5):
        clock.now += TTL_S - 1
        store._books.leases.renew(store._books.leases.session(engine.sessions[0], clock.now), [reply.lease], clock.now)
        store.expire()
    for rank in range(2):
        engine.commit_fill(reply, rank)
    assert store.stats().gpu_filled == 1


def test_cold_copies_make_room_and_hot_ones_and_leased_ones_do_not(store, engine, memory):
    prompts = [tokens_of(number) for number in range(FRAMES + 1)]
    for prompt in prompts:
        engine.put(prompt)
    assert store.flush(20), "what is being written to disk is in use too"
    for prompt in prompts[:FRAMES]:
        engine.warm(prompt)
    leased = engine.ask(prompts[0])
    for _ in range(3):
        engine.release(engine.ask(prompts[1]), gpu_tokens=1)
    num_fills = [len(fills_of(engine.warm(prompts[FRAMES]))) for _ in range(4)]
    assert num_fills == [0, 0, 0, 1], "two are looked at each time: those with hits lose one, the leased one stays"
    assert store.stats().gpu_evicted == 1
    assert num_copies(leased, memory) == 1
    other = Pooled(store, "other")
    tiers = [other.ask(prompt).tiers[0] for prompt in prompts]
    assert tiers == [TIER_GPU, TIER_GPU, TIER_HOST, TIER_GPU, TIER_GPU]


def test_a_leased_copy_stays_however_many_others_want_its_frame(store, engine, memory):
    prompts = [tokens_of(number) for number in range(20)]
    for prompt in prompts:
        engine.put(prompt)
    assert store.flush(20)
    engine.warm(prompts[0])
    leased = engine.ask(prompts[0])
    for _ in range(4):
        for prompt in prompts[1:]:
            engine.warm(prompt)
    assert store.stats().gpu_evicted > 10
    assert num_copies(leased, memory) == 1


def test_a_round_over_more_than_fits_keeps_a_part_instead_of_nothing(store, engine):
    prompts = [tokens_of(number) for number in range(FRAMES + 1)]
    for prompt in prompts:
        engine.put(prompt)
    assert store.flush(20)
    num_hits = 0
    for _ in range(20):
        for prompt in prompts:
            num_hits += engine.warm(prompt).tiers.count(TIER_GPU)
    assert num_hits > 20 * len(prompts) // 2


def test_a_copy_goes_with_its_chunk_and_its_frame_when_nobody_reads_it_any_more(open_store, memory):
    store = open_store()
    engine = Pooled(store, layout=BIG)
    engine.give_pools(memory)
    engine.put(tokens_of(1))
    assert store.flush(20)
    engine.warm(tokens_of(1))
    reading = engine.ask(tokens_of(1))
    store.invalidate(Invalidate(session=engine.sessions[0], keys=reading.keys))
    store.check_integrity()
    assert num_copies(reading, memory) == 1
    assert store.stats().chunks_gpu == 1
    engine.release(reading)
    assert store.stats().chunks_gpu == 0
    engine.put(tokens_of(2))
    assert store.flush(20)
    engine.warm(tokens_of(2))
    for number in range(100, 160):
        engine.put(tokens_of(number))
        engine.load(tokens_of(number))
    assert store.stats().chunks_gpu == 0, "evicted from host memory"


def test_a_trimmed_lease_keeps_the_copies_of_what_it_still_wants(store, engine, memory):
    engine.put(tokens_of(1, 2))
    assert store.flush(20)
    engine.warm(tokens_of(1, 2))
    reply = engine.ask(tokens_of(1, 2))
    store.trim(Trim(session=engine.sessions[0], lease=reply.lease, num_chunks=1))
    store.check_integrity()
    store.invalidate(Invalidate(session=engine.sessions[0], keys=reply.keys))
    assert store.stats().chunks_gpu == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pool_and_its_copies_are_gone_at_once_when_a_rank_dies(store, engine, memory, rank):
    engine.put(tokens_of(1, 2))
    engine.warm(tokens_of(1))
    other = Pooled(store, "other")
    reading = other.ask(tokens_of(1, 2))
    pool = reading.pools[0].id
    check = CheckPools(session=other.sessions[0], pools=[pool, 12345])
    assert store.check_pools(check).gone == [12345]
    store.close_session(engine.sessions[rank])
    assert store.check_pools(check).gone == [pool, 12345]
    stats = store.stats()
    assert (stats.chunks_gpu, stats.bytes.gpu.limit, stats.chunks_host) == (0, 0, 2)
    assert other.ask(tokens_of(1, 2)).tiers == bytes([TIER_HOST] * 2)
    assert other.check(reading) == [True, True], "and its readers go on from host memory"


def test_a_session_that_falls_silent_takes_its_pool_along(store, engine, clock):
    engine.put(tokens_of(1))
    clock.now += 20 * TTL_S
    store.expire()
    assert store.stats().bytes.gpu.limit == 0


def test_a_rank_that_comes_back_completes_the_pool_again_once_its_former_frames_are_out_of_use(store, engine, memory):
    engine.put(tokens_of(1, 2))
    engine.warm(tokens_of(1))
    other = Pooled(store, "other")
    reading = other.ask(tokens_of(1))
    reconnect(engine, 1)
    engine.offer(1)
    assert fills_of(engine.ask(tokens_of(1, 2))) == [], "the other engine reads the memory that would be filled"
    other.release(reading)
    assert len(fills_of(engine.ask(tokens_of(1, 2)))) == 2


def test_a_rank_that_comes_back_waits_for_the_fills_of_its_former_pool(store, engine, clock):
    engine.put(tokens_of(1))
    late = engine.ask(tokens_of(1))
    reconnect(engine, 1)
    engine.offer(1)
    engine.release(late, host_tokens=1)
    assert fills_of(engine.ask(tokens_of(1))) == [], "the rank may still be writing"
    clock.now += TTL_S
    store.expire()
    assert len(fills_of(engine.ask(tokens_of(1)))) == 1


def test_offering_the_same_again_changes_nothing_and_offering_more_starts_anew(store, engine):
    engine.put(tokens_of(1))
    engine.warm(tokens_of(1))
    engine.offer(0)
    assert store.stats().chunks_gpu == 1
    engine.num_frames = 2 * FRAMES
    engine.offer(0)
    assert store.stats().chunks_gpu == 0
    limit = store.stats().bytes.gpu.limit
    engine.offer(1)
    assert store.stats().bytes.gpu.limit == 2 * limit, "the smaller part decides"


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard": 2}, {"shard": -1}, {"tiling": []}, {"num_frames": 0}, {"num_frames": 1 << 40}, {"object_bytes": 0},
        {"device": "x" * 1000}, {"handle": bytes(5000)},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_offer_is_refused(store, engine, wrong):
    fields = {"session": engine.sessions[0], "tiling": engine.tiling, "shard": 0, "object_bytes": 64, "num_frames": 1}
    with pytest.raises(ProtocolError) as caught:
        store.offer_pool(OfferPool(**fields | {"device": "gpu", "handle": b"h"} | wrong))
    assert caught.value.status == 400


def test_unknown_sessions_neither_offer_nor_commit_nor_ask(store, engine):
    engine.sessions[0] = 1
    with pytest.raises(ProtocolError):
        engine.offer(0)
    with pytest.raises(ProtocolError):
        store.check_pools(CheckPools(session=1, pools=[]))
