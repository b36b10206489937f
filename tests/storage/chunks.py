"""Chunks to store, made from a number: the same number gives the same chunk."""

import random

from cachetier.core.checksum import checksum_of, page_digests
from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.core.layout import DIGEST_BYTES, Shard, digests_offset, frame_bytes, num_pages
from cachetier.storage.disk import ChunkToWrite, DiskChunk
from cachetier.storage.segments import aligned_buffer


def make_chunk(seed: int, object_bytes: int = 5000, num_shards: int = 1, content_bytes: int = 64) -> ChunkToWrite:
    """Return a chunk of `num_shards` objects whose bytes are random but decided by `seed`."""
    rng = random.Random(seed)
    frames, checksums = [], []
    for _ in range(num_shards):
        frame = aligned_buffer(frame_bytes(object_bytes))
        frame[:object_bytes] = rng.randbytes(object_bytes)
        digests = page_digests(frame[:object_bytes])
        start = digests_offset(object_bytes)
        frame[start : start + len(digests)] = digests
        frames.append(frame)
        checksums.append(checksum_of(digests))
    chunk = DiskChunk(
        key=ChainKey(rng.randbytes(16)),
        parent=ChainKey(rng.randbytes(16)),
        namespace=NamespaceId(bytes(16)),
        position=seed,
        group=0,
        content=rng.randbytes(content_bytes),
        tiling=tuple(Shard(number, number + 1, 0, 4) for number in range(num_shards)),
        object_bytes=(object_bytes,) * num_shards,
        checksums=tuple(checksums),
    )
    return ChunkToWrite(chunk=chunk, frames=frames)


def blank_frames(chunk: DiskChunk) -> list[memoryview]:
    """Return frames to read `chunk` into."""
    return [aligned_buffer(frame_bytes(size)) for size in chunk.object_bytes]


def is_intact(chunk: DiskChunk, frames: list[memoryview]) -> bool:
    """Do what a worker does before it uses the bytes: compare digests with checksum, and pages with digests."""
    for size, checksum, frame in zip(chunk.object_bytes, chunk.checksums, frames, strict=True):
        start = digests_offset(size)
        digests = frame[start : start + num_pages(size) * DIGEST_BYTES]
        if checksum_of(digests) != checksum or page_digests(frame[:size]) != digests:
            return False
    return True


def objects(chunk: DiskChunk, frames: list[memoryview]) -> list[bytes]:
    """Return the objects in `frames`, without padding and digests."""
    return [bytes(frame[:size]) for size, frame in zip(chunk.object_bytes, frames, strict=True)]
