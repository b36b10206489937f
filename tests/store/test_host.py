"""The host table: who goes when room is needed, and that every frame is accounted for."""

import random

import pytest

from cachetier.core.arena_format import STATE_BAD, STATE_FREE, STATE_READY
from cachetier.core.keys import ChainKey
from cachetier.core.layout import KVLayout
from cachetier.store.change_log import ChangeLog
from cachetier.store.chunk import ChunkState, HostChunk
from cachetier.store.gpu_tier import GpuTier
from cachetier.store.host import HostTable
from tests.store.chunks import CHUNK_TOKENS, LAYOUT, TENANT, key_of, make_arena, make_chunk, make_tiling

CHANGES = ChangeLog(lambda namespace: TENANT, CHUNK_TOKENS)  # nobody follows


@pytest.fixture
def arena(tmp_path):
    arena = make_arena(tmp_path)
    yield arena
    arena.close()


@pytest.fixture
def table(arena):
    table = HostTable(arena, GpuTier(10.0), CHANGES)
    yield table
    table.check_integrity()


def put(table: HostTable, chunk: HostChunk) -> bool:
    """Fill a chunk as a store would; False: there was no room."""
    table.add(chunk)
    for shard in range(len(chunk.frames)):
        if not table.allocate(chunk, shard):
            table.remove(chunk)
            return False
        chunk.checksums[shard] = 1
    table.seal(chunk, is_durable=False)
    return True


def capacity_of(arena, tiling) -> int:
    """Return how many chunks of `tiling` fit."""
    probe = HostTable(arena, GpuTier(10.0), CHANGES)
    number = 0
    while not probe.num_evicted:
        put(probe, make_chunk(tiling, number))
        number += 1
    for chunk in list(probe.chunks.values()):
        probe.remove(chunk)
    return number - 1


def test_frames_are_ready_when_sealed_and_free_when_removed(table, arena):
    chunk = make_chunk(make_tiling(arena, shards=2), 1)
    assert put(table, chunk)
    frames = list(chunk.frames)
    assert len(set(frames)) == 2
    assert [arena.state(offset) for offset in frames] == [STATE_READY] * 2
    assert table.tenant_bytes(TENANT) == arena.used_bytes > 0
    table.remove(chunk)
    assert [arena.state(offset) for offset in frames] == [STATE_FREE] * 2
    assert table.tenant_bytes(TENANT) == arena.used_bytes == 0


def test_a_pinned_chunk_keeps_its_frames_after_it_left_the_table(table, arena):
    chunk = make_chunk(make_tiling(arena), 1)
    put(table, chunk)
    chunk.pins = 2
    table.remove(chunk)
    table.check_integrity()
    assert chunk.key not in table.chunks
    table.unpin(chunk)
    assert arena.used_bytes > 0
    table.mark_bad(chunk)
    assert arena.state(chunk.frames[0]) == STATE_BAD
    table.unpin(chunk)
    assert arena.used_bytes == 0


def test_a_chain_leaves_from_its_end(table, arena):
    tiling = make_tiling(arena)
    capacity = capacity_of(arena, tiling)
    for number in range(capacity):
        put(table, make_chunk(tiling, number, number - 1 if number else None))
    for number in range(10):
        put(table, make_chunk(tiling, 1000 + number))
        table.check_integrity()
    gone = [number for number in range(capacity) if key_of(number) not in table.chunks]
    assert gone == list(range(capacity - 10, capacity))


def test_a_chunk_whose_descendant_is_in_use_stays(table, arena):
    tiling = make_tiling(arena)
    capacity = capacity_of(arena, tiling)
    chain = [make_chunk(tiling, number, number - 1 if number else None) for number in range(3)]
    for chunk in chain:
        put(table, chunk)
    chain[2].pins = 1
    for number in range(3 * capacity):
        assert put(table, make_chunk(tiling, 1000 + number))
    assert all(chunk.state is ChunkState.READY for chunk in chain)
    table.unpin(chain[2])


def test_pinned_chunks_are_never_evicted_and_no_room_is_no_room(table, arena):
    tiling = make_tiling(arena)
    capacity = capacity_of(arena, tiling)
    chunks = [make_chunk(tiling, number) for number in range(capacity)]
    for chunk in chunks:
        put(table, chunk)
        chunk.pins = 1
    assert not put(table, make_chunk(tiling, 9999))
    assert all(chunk.state is ChunkState.READY for chunk in chunks)
    for chunk in chunks:
        table.unpin(chunk)
    assert put(table, make_chunk(tiling, 9999))


def test_children_that_came_back_before_their_parent_protect_it_again(table, arena):
    tiling = make_tiling(arena)
    parent, child = make_chunk(tiling, 1), make_chunk(tiling, 2, parent=1)
    put(table, parent)
    put(table, child)
    table.remove(parent)
    table.check_integrity()
    put(table, make_chunk(tiling, 1))
    for number in range(10 * capacity_of_arena(arena, tiling)):
        put(table, make_chunk(tiling, 1000 + number))
        if key_of(1) not in table.chunks:
            assert key_of(2) not in table.chunks


def capacity_of_arena(arena, tiling) -> int:
    return arena.data_bytes // sum(tiling.frame_bytes)


def test_a_hot_prefix_survives_a_scan_of_ten_times_the_arena(table, arena):
    tiling = make_tiling(arena)
    capacity = capacity_of(arena, tiling)
    hot = [make_chunk(tiling, number, number - 1 if number else None) for number in range(capacity // 3)]
    for chunk in hot:
        put(table, chunk)
        chunk.hits = 2
    for number in range(10 * capacity):
        assert put(table, make_chunk(tiling, 1000 + number))
    assert [chunk.state for chunk in hot] == [ChunkState.READY] * len(hot)


def test_a_new_size_of_frames_gets_its_share_of_a_full_arena(table, arena):
    old = make_tiling(arena)
    new = make_tiling(arena, layout=KVLayout(num_layers=4, num_kv_heads=2, row_bytes=192))
    for number in range(2 * capacity_of(arena, old)):
        put(table, make_chunk(old, number))
    for number in range(2000):
        assert put(table, make_chunk(new, 100_000 + number))
    held = sum(chunk.tiling is new for chunk in table.chunks.values())
    assert held > 0.8 * capacity_of_arena(arena, new)


def test_two_sizes_in_equal_use_share_the_arena(table, arena):
    tilings = [make_tiling(arena), make_tiling(arena, layout=KVLayout(num_layers=4, num_kv_heads=2, row_bytes=192))]
    seed = random.Random(3)
    for number in range(4000):
        assert put(table, make_chunk(tilings[seed.randrange(2)], number))
    shares = [sum(c.tiling is tiling for c in table.chunks.values()) * sum(tiling.frame_bytes) for tiling in tilings]
    assert min(shares) > 0.2 * sum(shares)


def test_uneven_shards_find_room_in_both_classes(table, arena):
    layout = KVLayout(num_layers=5, num_kv_heads=2, row_bytes=512)
    tiling = make_tiling(arena, layout=layout)
    tiling = type(tiling)(
        layout,
        (LAYOUT.whole().__class__(0, 2, 0, 4), LAYOUT.whole().__class__(0, 2, 4, 5)),
        16,
        arena.size_class,
    )
    assert len(tiling.classes) == 2
    for number in range(500):
        assert put(table, make_chunk(tiling, number))
    table.check_integrity()


def test_a_tenant_stays_within_its_quota_and_gives_its_own_chunks_up(arena):
    table, tiling = (
        HostTable(arena, GpuTier(10.0), CHANGES, tenant_quota=0.25),
        make_tiling(arena),
    )
    greedy, modest = ChainKey(b"greedy".ljust(16)), ChainKey(b"modest".ljust(16))
    for number in range(20):
        put(table, make_chunk(tiling, number, tenant=modest))
    for number in range(1000, 2000):
        assert put(table, make_chunk(tiling, number, tenant=greedy))
        assert table.tenant_bytes(greedy) <= arena.data_bytes // 4
    assert table.tenant_bytes(greedy) > arena.data_bytes // 5
    assert all(key_of(number) in table.chunks for number in range(20))
    assert key_of(1999) in table.chunks
    table.check_integrity()
    for chunk in table.chunks.values():
        chunk.pins += chunk.tenant == greedy
    assert not put(table, make_chunk(tiling, 5000, tenant=greedy))
    assert put(table, make_chunk(tiling, 5001, tenant=modest))
    table.check_integrity()


def test_a_tenant_at_its_quota_keeps_what_is_hit(arena):
    table, tiling = (
        HostTable(arena, GpuTier(10.0), CHANGES, tenant_quota=0.25),
        make_tiling(arena),
    )
    hot = make_chunk(tiling, 0)
    put(table, hot)
    for number in range(1, 500):
        if number % 10 == 0:
            hot.hits = 2
        assert put(table, make_chunk(tiling, number))
    assert hot.state is ChunkState.READY
    table.check_integrity()
