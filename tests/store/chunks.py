"""Chunks and arenas for the tests of the store's pure parts."""

from pathlib import Path

from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.core.layout import KVLayout, Shard
from cachetier.storage.arena import Arena
from cachetier.store.chunk import ChunkState, HostChunk, Tiling

MIB = 1 << 20
CHUNK_TOKENS = 16
LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, row_bytes=128)  # 16 KiB a chunk
BIG = KVLayout(num_layers=4, num_kv_heads=2, row_bytes=2048)  # 256 KiB a chunk: 14 in the smallest arena
TENANT = ChainKey(b"tenant".ljust(16))


def make_arena(folder: Path, size_bytes: int = 4 * MIB) -> Arena:
    """Return an arena in a test's folder."""
    return Arena.create(str(folder / "arena"), size_bytes, b"i" * 16)


def make_tiling(arena: Arena, shards: int = 1, layout: KVLayout = LAYOUT) -> Tiling:
    """Return a tiling by layers."""
    step = layout.num_layers // shards
    parts = tuple(Shard(0, layout.num_kv_heads, n * step, (n + 1) * step) for n in range(shards))
    return Tiling(layout, parts, CHUNK_TOKENS, arena.size_class)


def key_of(number: int) -> ChainKey:
    """Return the chain key of chunk `number` of a test."""
    return ChainKey(number.to_bytes(16, "little"))


def make_chunk(
    tiling: Tiling, number: int, parent: int | None = None, tenant: ChainKey = TENANT, position: int = 0
) -> HostChunk:
    """Return a PENDING chunk that follows `parent`, or begins a chain."""
    return HostChunk(
        key_of(number),
        tenant if parent is None else key_of(parent),
        tenant=tenant,
        namespace=NamespaceId(b"n" * 16),
        position=position,
        content=b"content %d" % number,
        tiling=tiling,
        state=ChunkState.PENDING,
    )
