"""What a copy engine with staging memory must do, for any device: see `CopyCases`.

KV is made as logical values `[heads, layers, tokens, row]` of the whole model; objects, checksums and paged blocks are
compared with what their definitions say of it, byte for byte.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from cachetier.client import ArenaView
from cachetier.core.checksum import object_checksum, page_digests
from cachetier.core.layout import KVLayout, Shard, digests_offset, frame_bytes
from cachetier.storage.arena import Arena
from cachetier_blend.rotation import read_rotary, rotate
from cachetier_connector.cuda.copy_cuda import StagedCopyEngine
from cachetier_connector.plan import ChunkSource, HeldChunks, LoadOp

HEADS, LAYERS, ROW, CHUNK, BLOCK = 4, 2, 32, 16, 8
LAYOUT = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, row_bytes=2 * ROW)
NUM_BLOCKS = 40
WHOLE = [LAYOUT.whole()]
HALVES = [Shard(0, 2, 0, 2), Shard(2, 4, 0, 2)]
STAGES = [Shard(0, 4, 0, 1), Shard(0, 4, 1, 2)]
QUARTERS = [Shard(head, head + 2, layer, layer + 1) for layer in (0, 1) for head in (0, 2)]
TILINGS = {"whole": WHOLE, "halves": HALVES, "stages": STAGES, "quarters": QUARTERS}
CHUNK_BYTES = LAYOUT.object_bytes(LAYOUT.whole(), CHUNK)
STAGING_BYTES = 6 * 2 * CHUNK_BYTES  # two chunks a slot


def kv_of(seed: int, num_tokens: int) -> torch.Tensor:
    """Return logical KV with every bit pattern."""
    generator = torch.Generator().manual_seed(seed)
    shape = (HEADS, LAYERS, num_tokens, ROW)
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)


def canonical(kv: torch.Tensor, shard: Shard, number: int) -> bytes:
    """Return the object of `shard` of chunk `number`, from the definition."""
    part = kv[shard.head_start : shard.head_end, shard.layer_start : shard.layer_end]
    return bytes(part[:, :, number * CHUNK : (number + 1) * CHUNK].contiguous().numpy().tobytes())


def blocks_for(num_tokens: int, seed: int = 0) -> list[int]:
    """Return a shuffled block table."""
    return random.Random(seed).sample(range(NUM_BLOCKS), -(-num_tokens // BLOCK))


class Rank:
    """One rank's paged blocks, filled with noise, and the engine that serves them."""

    def __init__(self, make: Callable[..., Any], device: torch.device, shard: Shard, staging_bytes: int) -> None:
        self.shard = shard
        heads, layers = shard.head_end - shard.head_start, shard.layer_end - shard.layer_start
        generator = torch.Generator().manual_seed(1000)
        shape = (layers, NUM_BLOCKS, BLOCK, heads, ROW)
        noise = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
        self.memory = noise.to(device)
        self.caches = [layer.transpose(1, 2).view(torch.bfloat16) for layer in self.memory]
        self.engine: StagedCopyEngine = make(self.caches, LAYOUT, shard, staging_bytes=staging_bytes)

    def writer(self, kv: torch.Tensor, blocks: Sequence[int]) -> Callable[[], None]:
        """Return what writes `kv` of the whole model as the engine would, without waiting for the device."""
        part = kv[self.shard.head_start : self.shard.head_end, self.shard.layer_start : self.shard.layer_end]
        tokens, device = torch.arange(kv.shape[2]), self.memory.device
        table, slots = torch.tensor(blocks)[tokens // BLOCK].to(device), (tokens % BLOCK).to(device)
        values = part.permute(1, 2, 0, 3).to(device)  # [layers, tokens, heads, row]

        def write() -> None:
            self.memory[:, table, slots] = values

        return write

    def write(self, kv: torch.Tensor, blocks: Sequence[int]) -> None:
        """Write `kv` of the whole model to `blocks`."""
        self.writer(kv, blocks)()

    def settle(self) -> None:
        """Wait for what a test wrote, as vLLM waits for its steps before it gives their blocks to a load."""
        if self.memory.is_cuda:
            torch.cuda.synchronize()

    def snapshot_of_blocks(self) -> torch.Tensor:
        """Return all paged memory."""
        self.settle()
        return self.memory.cpu().clone()


class Tier:
    """An arena and what is in it."""

    def __init__(self, folder: Path, file_bytes: int = 1 << 22) -> None:
        self.arena = Arena.create(str(folder / "arena"), file_bytes, b"i" * 16)
        self.view = ArenaView.attach(str(folder / "arena"))

    def frames(self, shard: Shard, count: int) -> list[int]:
        """Return new frames for objects of `shard`."""
        size = frame_bytes(LAYOUT.object_bytes(shard, CHUNK))
        found = [self.arena.allocate(size) for _ in range(count)]
        assert None not in found
        return [offset for offset in found if offset is not None]

    def put(self, kv: torch.Tensor, tiling: Sequence[Shard], number: int, tiling_number: int = 0) -> ChunkSource:
        """Write the objects of one chunk as their definition says; return where they lie."""
        frames, checksums = [], []
        for shard in tiling:
            payload = canonical(kv, shard, number)
            [offset] = self.frames(shard, 1)
            digests = page_digests(memoryview(payload))
            self.view.frame(offset, len(payload))[:] = payload
            self.view.frame(offset + digests_offset(len(payload)), len(digests))[:] = digests
            frames.append(offset)
            checksums.append(object_checksum(memoryview(payload)))
        return ChunkSource(bytes([number]) * 16, tiling_number, frames, checksums)


def load_op(tilings: Sequence[Sequence[Shard]], blocks: list[int], start: int, end: int) -> LoadOp:
    """Return the op for tokens `[start, end)`; chunks are pushed by hand."""
    return LoadOp(
        request_id="r", start=start, end=end, chunk_tokens=CHUNK, first_chunk=start // CHUNK,
        chunks=HeldChunks(b"", b"", [], []), tilings=[list(tiling) for tiling in tilings], block_ids=blocks,
        arena_path="", instance="",
    )  # fmt: skip


def load(
    rank: Rank, tier: Tier, op: LoadOp, chunks: Sequence[ChunkSource], group: int = 3, fence: Any = None
) -> tuple[int, bytes | None]:
    """Carry a load out; return how many chunks were good, and the corrupt key."""
    if fence is None:
        rank.settle()
    run = rank.engine.open_load(tier.view, op, fence)
    for first in range(0, len(chunks), group):
        run.push(chunks[first : first + group])
    return run.finish(), run.corrupt_key


ROTARY = read_rotary(
    {"rope_type": "default", "rope_theta": 100.0},
    head_size=ROW // 2,
    rotary_dim=ROW // 2,
    is_interleaved=False,
    max_positions=1000,
)


def finite_kv_of(seed: int, num_tokens: int) -> torch.Tensor:
    """Return logical KV of ordinary bf16 numbers, as int16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, LAYERS, num_tokens, ROW, generator=generator).bfloat16().view(torch.int16)


class CopyCases:
    """The cases. Subclasses have fixtures: `make` (an engine of the test's device) and `device`."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        return Tier(tmp_path)

    @pytest.mark.parametrize("tiling", TILINGS)
    @pytest.mark.parametrize("slot_bytes", [2 * CHUNK_BYTES, CHUNK_BYTES // 2])
    def test_shifted_chunks_go_to_later_tokens_with_their_keys_turned(self, make, device, tier, tiling, slot_bytes):
        rank = Rank(make, device, WHOLE[0], 6 * slot_bytes)
        rank.engine.use_rotary(ROTARY)
        kv, shift, num_tokens = finite_kv_of(3, 3 * CHUNK), 21, 3 * CHUNK
        start, end = shift + 5, shift + num_tokens - 3
        blocks = blocks_for(shift + num_tokens)
        before = rank.snapshot_of_blocks()
        sources = [tier.put(kv, TILINGS[tiling], number) for number in range(3)]
        op = replace(load_op([TILINGS[tiling]], blocks, start, end), first_chunk=0, shift=shift)
        assert load(rank, tier, op, sources) == (3, None)
        after = rank.snapshot_of_blocks()
        tokens = torch.arange(start, end)
        table, slots = torch.tensor(blocks)[tokens // BLOCK], tokens % BLOCK
        found = after[:, table, slots].view(torch.bfloat16)
        stored = kv[:, :, 5 : num_tokens - 3].permute(1, 2, 0, 3).view(torch.bfloat16)  # [layers, tokens, heads, row]
        assert torch.equal(found[..., ROW // 2 :], stored[..., ROW // 2 :])
        expected = rotate(stored[..., : ROW // 2], shift, ROTARY)
        torch.testing.assert_close(found[..., : ROW // 2], expected, rtol=1 / 128, atol=1e-3)
        assert not torch.equal(found[..., : ROW // 2], stored[..., : ROW // 2])
        after[:, table, slots] = before[:, table, slots]
        assert torch.equal(after, before), "nothing else was touched"
        keys = rank.engine.read_keys(1, blocks, end)[:, start:]
        assert torch.equal(keys.cpu(), found[1, ..., : ROW // 2].transpose(0, 1))

    @pytest.mark.parametrize("slot_bytes", [2 * CHUNK_BYTES, CHUNK_BYTES // 2])
    @pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
    def test_stores_are_the_objects_and_digests_that_the_layout_defines(self, make, device, tier, tiling, slot_bytes):
        num_chunks, kv = 5, kv_of(1, 7 * CHUNK)
        blocks = blocks_for(7 * CHUNK)
        for shard in tiling:
            rank = Rank(make, device, shard, 6 * slot_bytes)
            before = rank.snapshot_of_blocks()
            rank.write(kv, blocks)
            written, first = rank.snapshot_of_blocks(), CHUNK + 3  # chunks that start within a block
            snapshot = rank.engine.snapshot(blocks[first // BLOCK :], first % BLOCK, num_chunks, CHUNK)
            numbers, frames = [0, 1, 2, 4], tier.frames(shard, 4)
            checksums = rank.engine.fill(snapshot, numbers, tier.view, frames, lambda: True)
            for number, frame, checksum in zip(numbers, frames, checksums, strict=True):
                payload = canonical(kv[:, :, first:], shard, number)
                assert bytes(tier.view.frame(frame, len(payload))) == payload
                digests = page_digests(memoryview(payload))
                assert bytes(tier.view.frame(frame + digests_offset(len(payload)), len(digests))) == digests
                assert checksum == object_checksum(memoryview(payload))
            assert torch.equal(rank.snapshot_of_blocks(), written)
            assert not torch.equal(before, written)
            rank.engine.stop()

    @pytest.mark.parametrize("slot_bytes", [2 * CHUNK_BYTES, CHUNK_BYTES // 2])
    @pytest.mark.parametrize("loaded_as", TILINGS)
    @pytest.mark.parametrize("stored_as", TILINGS)
    def test_every_rank_loads_what_any_tiling_stored(self, make, device, tier, stored_as, loaded_as, slot_bytes):
        num_chunks, kv = 4, kv_of(2, 4 * CHUNK)
        blocks = blocks_for(4 * CHUNK, seed=3)
        chunks = [tier.put(kv, TILINGS[stored_as], number) for number in range(num_chunks)]
        for shard in TILINGS[loaded_as][-2:]:
            rank, expected = (Rank(make, device, shard, 6 * slot_bytes) for _ in range(2))
            expected.write(kv, blocks)
            op = load_op([TILINGS[stored_as]], blocks, 0, num_chunks * CHUNK)
            assert load(rank, tier, op, chunks) == (num_chunks, None)
            assert torch.equal(rank.snapshot_of_blocks(), expected.snapshot_of_blocks())

    @pytest.mark.parametrize("seed", range(4))
    def test_only_the_tokens_of_the_load_are_written_whatever_their_tilings(self, make, device, tier, seed):
        rng, kv = random.Random(seed), kv_of(seed, 8 * CHUNK)
        start = rng.randrange(3 * CHUNK)
        end = rng.randrange(start + 1, 8 * CHUNK)
        blocks, tilings = blocks_for(8 * CHUNK, seed), list(TILINGS.values())
        choices = [rng.randrange(4) for _ in range(8)]
        chunks = [
            tier.put(kv, tilings[choices[number]], number, choices[number])
            for number in range(start // CHUNK, -(-end // CHUNK))
        ]
        rank, expected = (Rank(make, device, WHOLE[0], STAGING_BYTES) for _ in range(2))
        noise = expected.snapshot_of_blocks()
        expected.write(kv, blocks)
        wanted = expected.snapshot_of_blocks()
        for token in (*range(start), *range(end, 8 * CHUNK)):
            place = (slice(None), blocks[token // BLOCK], token % BLOCK)
            wanted[place] = noise[place]
        assert load(rank, tier, load_op(tilings, blocks, start, end), chunks, rng.randrange(1, 6)) == (
            len(chunks),
            None,
        )
        assert torch.equal(rank.snapshot_of_blocks(), wanted)

    @pytest.mark.parametrize("stored_as", ["whole", "stages"])
    @pytest.mark.parametrize("bad", [0, 2, 6])
    def test_chunks_from_the_first_corrupt_one_on_do_not_count(self, make, device, tier, stored_as, bad):
        kv, tiling = kv_of(4, 7 * CHUNK), TILINGS[stored_as]
        blocks = blocks_for(7 * CHUNK, seed=4)
        chunks = [tier.put(kv, tiling, number) for number in range(7)]
        rank, expected = (Rank(make, device, WHOLE[0], STAGING_BYTES) for _ in range(2))
        tier.view.frame(chunks[bad].frames[-1] + 1234, 1)[0] ^= 8
        tier.view.frame(chunks[6].frames[0] + 77, 1)[0] ^= 1
        assert load(rank, tier, load_op([tiling], blocks, 0, 7 * CHUNK), chunks) == (bad, chunks[bad].key)
        expected.write(kv[:, :, : bad * CHUNK], blocks)
        good = blocks[: bad * CHUNK // BLOCK]
        assert torch.equal(rank.snapshot_of_blocks()[:, good], expected.snapshot_of_blocks()[:, good])
        tier.view.frame(chunks[bad].frames[-1] + 1234, 1)[0] ^= 8
        if bad != 6:
            assert load(rank, tier, load_op([tiling], blocks, 0, 6 * CHUNK), chunks[:6]) == (6, None)

    def test_listed_digests_are_not_trusted_unless_the_checksum_vouches_for_them(self, make, device, tier):
        """A whole object needs no list, so a spoilt list is not its business."""
        kv, blocks = kv_of(5, CHUNK), blocks_for(CHUNK)
        for tiling, shard, is_needed in ((WHOLE, HALVES[1], True), (HALVES, HALVES[1], False)):
            chunk = tier.put(kv, tiling, 0)
            size = LAYOUT.object_bytes(tiling[-1], CHUNK)
            tier.view.frame(chunk.frames[-1] + digests_offset(size) + 3, 1)[0] ^= 1
            rank = Rank(make, device, shard, STAGING_BYTES)
            found = load(rank, tier, load_op([tiling], blocks, 0, CHUNK), [chunk])
            assert found == ((0, chunk.key) if is_needed else (1, None))

    def test_a_flipped_bit_outside_of_the_wanted_pages_is_somebody_elses_business(self, make, device, tier):
        kv, blocks, rng = kv_of(6, CHUNK), blocks_for(CHUNK), random.Random(6)
        chunk, half = tier.put(kv, WHOLE, 0), CHUNK_BYTES // 2
        rank = Rank(make, device, HALVES[1], STAGING_BYTES)
        for offset in (0, half - 1, half, CHUNK_BYTES - 1, *rng.sample(range(CHUNK_BYTES), 6)):
            tier.view.frame(chunk.frames[0] + offset, 1)[0] ^= 1 << rng.randrange(8)
            found = load(rank, tier, load_op([WHOLE], blocks, 0, CHUNK), [chunk])
            assert found == ((0, chunk.key) if offset >= half else (1, None)), offset
            tier.view.frame(chunk.frames[0], CHUNK_BYTES)[:] = canonical(kv, WHOLE[0], 0)

    def test_a_fill_that_is_not_wanted_any_more_stops_between_batches_and_says_what_it_filled(self, make, device, tier):
        kv, blocks = kv_of(7, 6 * CHUNK), blocks_for(6 * CHUNK)
        rank = Rank(make, device, WHOLE[0], STAGING_BYTES)
        rank.write(kv, blocks)
        frames, answers = tier.frames(WHOLE[0], 6), iter([True, True, False])
        snapshot = rank.engine.snapshot(blocks, 0, 6, CHUNK)
        checksums = rank.engine.fill(snapshot, range(6), tier.view, frames, lambda: next(answers))
        expected = [object_checksum(memoryview(canonical(kv, WHOLE[0], number))) for number in range(4)]
        assert checksums == [*expected, None, None]
        assert rank.engine.fill(snapshot, [5], tier.view, frames[:1], lambda: False) == [None]

    def test_frames_outside_of_the_arena_fail_the_load_and_not_the_process(self, make, device, tier):
        kv, blocks = kv_of(8, 2 * CHUNK), blocks_for(2 * CHUNK)
        good = tier.put(kv, WHOLE, 0)
        rank = Rank(make, device, WHOLE[0], STAGING_BYTES)
        for frame in (-4096, tier.view.geometry.data_bytes - 4096, 1 << 60):
            run = rank.engine.open_load(tier.view, load_op([WHOLE], blocks, 0, 2 * CHUNK), rank.engine.fence())
            run.push([good])
            with pytest.raises(ValueError, match="outside of the arena"):
                run.push([good._replace(frames=[frame])])
            assert run.finish() == 0
            snapshot = rank.engine.snapshot(blocks, 0, 2, CHUNK)
            with pytest.raises(ValueError, match="outside of the arena"):
                rank.engine.fill(snapshot, [0], tier.view, [frame], lambda: True)
        assert load(rank, tier, load_op([WHOLE], blocks, 0, CHUNK), [good]) == (1, None)
