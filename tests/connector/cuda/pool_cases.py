"""What holds of loads from pools in device memory, and of filling them, on every device.

Two workers share an arena: one owns a pool and fills it while it loads, the other reads it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cachetier.core.layout import pool_frame_bytes
from cachetier.core.pool_messages import POOL_FILL, Pool, PoolPart
from cachetier_connector.cuda.copy_cuda import StagedCopyEngine
from cachetier_connector.plan import ChunkSource, LoadOp
from tests.connector.cuda.copy_cases import (
    CHUNK,
    HALVES,
    LAYOUT,
    STAGING_BYTES,
    TILINGS,
    Rank,
    Tier,
    blocks_for,
    kv_of,
    load_op,
)

NUM_CHUNKS = 5
POOL_FRAMES = 8


def pool_bytes_of(shard: Any) -> int:
    """Return the size of a pool of POOL_FRAMES frames for a rank."""
    return POOL_FRAMES * pool_frame_bytes(LAYOUT.object_bytes(shard, CHUNK))


def pooled_rank(make: Callable[..., StagedCopyEngine], device: torch.device, shard: Any, *, has_pool: bool) -> Rank:
    """Return a rank whose worker owns a part of a pool, or only reads those of others."""

    def with_pool(*args: Any, **settings: Any) -> StagedCopyEngine:
        return make(*args, **settings, pool_bytes=pool_bytes_of(shard) if has_pool else 0)

    return Rank(with_pool, device, shard, STAGING_BYTES)


def pool_of(owners: Sequence[Rank], id_: int = 1) -> Pool:
    """Return what a match says of the pool of these ranks."""
    parts = []
    for owner in owners:
        offer = owner.engine.pools.offer(LAYOUT.object_bytes(owner.shard, CHUNK))
        assert offer is not None
        assert offer.num_frames == POOL_FRAMES
        parts.append(PoolPart(device=offer.device, handle=offer.handle))
    return Pool(id=id_, engine="owner", parts=parts)


def carry_out(rank: Rank, tier: Tier, op: LoadOp, chunks: Sequence[ChunkSource]) -> tuple[int, bytes | None, list[int]]:
    """Carry a load out; return how many chunks were good, the corrupt key, and the frames that were filled."""
    rank.settle()
    run = rank.engine.open_load(tier.view, op, None)
    run.push(chunks[:3])
    run.push(chunks[3:])
    return run.finish(), run.corrupt_key, run.filled


def in_frames(chunks: Sequence[ChunkSource], pool: int, frames: Sequence[int]) -> list[ChunkSource]:
    """Return the chunks as a match names them that stand in, or are to fill, these frames of a pool."""
    return [chunk._replace(pool=pool, pool_frame=frame) for chunk, frame in zip(chunks, frames, strict=True)]


def spoil(tier: Tier, chunks: Sequence[ChunkSource]) -> None:
    """Flip a bit in every frame in host memory, so that only device memory has the right bytes."""
    for chunk in chunks:
        for frame in chunk.frames:
            tier.view.frame(frame, 1)[0] ^= 1


class PoolCases:
    """The cases. Subclasses have fixtures: `make` (an engine with peers, of the test's device) and `device`."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        return Tier(tmp_path)

    @pytest.mark.parametrize("owned_as", TILINGS)
    @pytest.mark.parametrize("read_as", TILINGS)
    def test_what_a_load_fills_is_read_by_every_rank_without_touching_host_memory(
        self, make, device, tier, owned_as, read_as
    ):
        tiling, kv = TILINGS[owned_as], kv_of(1, NUM_CHUNKS * CHUNK)
        blocks = blocks_for(NUM_CHUNKS * CHUNK)
        chunks = [tier.put(kv, tiling, number) for number in range(NUM_CHUNKS)]
        op = load_op([tiling], blocks, 0, NUM_CHUNKS * CHUNK)
        owners = [pooled_rank(make, device, shard, has_pool=True) for shard in tiling]
        frames = [7, 0, 3, 4, 5]
        to_fill = [
            chunk._replace(pool=POOL_FILL, pool_frame=frame) for chunk, frame in zip(chunks, frames, strict=True)
        ]
        for owner in owners:
            assert carry_out(owner, tier, op, to_fill) == (NUM_CHUNKS, None, frames)
        op = msgspec.structs.replace(op, pools=[pool_of(owners)])
        in_pool = in_frames(chunks, 1, frames)
        spoil(tier, chunks)
        for shard in TILINGS[read_as]:
            reader = pooled_rank(make, device, shard, has_pool=False)
            expected = Rank(make, device, shard, STAGING_BYTES)
            expected.write(kv, blocks)
            assert carry_out(reader, tier, op, in_pool) == (NUM_CHUNKS, None, [])
            assert torch.equal(reader.snapshot_of_blocks(), expected.snapshot_of_blocks())

    def test_the_owner_reads_its_own_pool_and_a_mixed_load_takes_each_chunk_from_where_it_is(self, make, device, tier):
        kv, blocks = kv_of(2, NUM_CHUNKS * CHUNK), blocks_for(NUM_CHUNKS * CHUNK, seed=2)
        chunks = [tier.put(kv, TILINGS["whole"], number) for number in range(NUM_CHUNKS)]
        owner = pooled_rank(make, device, LAYOUT.whole(), has_pool=True)
        op = load_op([TILINGS["whole"]], blocks, 5, NUM_CHUNKS * CHUNK - 1)
        mixed = [chunks[0]._replace(pool=POOL_FILL, pool_frame=1), chunks[1], *chunks[2:]]
        assert carry_out(owner, tier, op, mixed) == (NUM_CHUNKS, None, [1])
        spoil(tier, chunks[:1])
        op = msgspec.structs.replace(op, pools=[pool_of([owner])])
        mixed = [chunks[0]._replace(pool=1, pool_frame=1), chunks[1], chunks[2]._replace(pool=POOL_FILL, pool_frame=0)]
        expected = Rank(make, device, LAYOUT.whole(), STAGING_BYTES)
        expected.memory.copy_(owner.memory)
        owner.memory[:, blocks] = 0
        before = owner.snapshot_of_blocks()
        assert carry_out(owner, tier, op, [*mixed, *chunks[3:]]) == (NUM_CHUNKS, None, [0])
        wanted = expected.snapshot_of_blocks()
        for token in (*range(5), NUM_CHUNKS * CHUNK - 1):
            place = (slice(None), blocks[token // 8], token % 8)
            wanted[place] = before[place]
        assert torch.equal(owner.snapshot_of_blocks(), wanted)
        assert owner.engine.pools.opened() == []

    @pytest.mark.parametrize("read_as", ["whole", "halves"])
    def test_a_wrong_byte_in_a_pool_is_caught_where_it_would_be_used(self, make, device, tier, read_as):
        kv, blocks = kv_of(3, NUM_CHUNKS * CHUNK), blocks_for(NUM_CHUNKS * CHUNK)
        chunks = [tier.put(kv, TILINGS["whole"], number) for number in range(NUM_CHUNKS)]
        owner = pooled_rank(make, device, LAYOUT.whole(), has_pool=True)
        op = load_op([TILINGS["whole"]], blocks, 0, NUM_CHUNKS * CHUNK)
        to_fill = [chunk._replace(pool=POOL_FILL, pool_frame=number) for number, chunk in enumerate(chunks)]
        tier.view.frame(chunks[3].frames[0] + 99, 1)[0] ^= 1
        assert carry_out(owner, tier, op, to_fill) == (3, chunks[3].key, [0, 1, 2])
        op = msgspec.structs.replace(op, pools=[pool_of([owner])])
        in_pool = [chunk._replace(pool=1, pool_frame=number) for number, chunk in enumerate(chunks)]
        reader = pooled_rank(make, device, TILINGS[read_as][0], has_pool=False)
        assert carry_out(reader, tier, op, in_pool) == (3, chunks[3].key, [])
        swapped = [in_pool[0], in_pool[1]._replace(pool_frame=2), *in_pool[2:]]
        assert carry_out(reader, tier, op, swapped) == (1, chunks[1].key, [])

    def test_a_pool_out_of_reach_is_read_from_host_memory(self, make, device, tier):
        kv, blocks = kv_of(4, NUM_CHUNKS * CHUNK), blocks_for(NUM_CHUNKS * CHUNK)
        chunks = [tier.put(kv, HALVES, number) for number in range(NUM_CHUNKS)]
        reader, expected = (pooled_rank(make, device, LAYOUT.whole(), has_pool=False) for _ in range(2))
        expected.write(kv, blocks)
        parts = [PoolPart(device="elsewhere", handle=handle) for handle in (b"1:2", bytes(64))]
        op = msgspec.structs.replace(
            load_op([HALVES], blocks, 0, NUM_CHUNKS * CHUNK), pools=[Pool(id=9, engine="far", parts=parts)]
        )
        in_pool = [chunk._replace(pool=1 + number % 2, pool_frame=number) for number, chunk in enumerate(chunks)]
        assert carry_out(reader, tier, op, in_pool) == (NUM_CHUNKS, None, [])
        assert torch.equal(reader.snapshot_of_blocks(), expected.snapshot_of_blocks())
