"""Loads of chunks that lie in segment files, without a GPU: as from the arena, whoever stored them, and never wrong."""

from functools import partial

import pytest
import torch

from cachetier.core.layout import digests_offset, frame_bytes
from cachetier_connector.cuda import copy_cuda, staged_load, staged_store
from cachetier_connector.cuda.copy_cuda import StagedCopyEngine
from cachetier_connector.cuda.direct_reads import DirectReader
from tests.connector.cuda import plain_kernels
from tests.connector.cuda.copy_cases import (
    CHUNK,
    CHUNK_BYTES,
    LAYOUT,
    STAGING_BYTES,
    TILINGS,
    WHOLE,
    Rank,
    Tier,
    blocks_for,
    kv_of,
    load,
    load_op,
)
from tests.connector.cuda.host_device import HostDevice
from tests.connector.cuda.host_file import HostFile


@pytest.fixture(autouse=True)
def _kernels(monkeypatch) -> None:
    for module in (copy_cuda, staged_load, staged_store):
        for name, kernel in plain_kernels.of(module).items():
            monkeypatch.setattr(module, name, kernel)


class Segments:
    """Chunks in an arena and, moved there, in two segment files."""

    def __init__(self, folder) -> None:
        self.tier = Tier(folder)
        self.paths = [str(folder / f"0000000{number}.seg") for number in (1, 2)]
        self.sizes = [4096, 8192]
        for path in self.paths:
            open(path, "wb").close()

    def move(self, chunk, tiling, segment):
        """Return the source of a chunk after its frames were copied to a segment file."""
        offsets = []
        with open(self.paths[segment - 1], "r+b") as file:
            for shard, frame in zip(tiling, chunk.frames, strict=True):
                size = frame_bytes(LAYOUT.object_bytes(shard, CHUNK))
                offsets.append(self.sizes[segment - 1])
                file.seek(offsets[-1])
                file.write(self.tier.view.frame(frame, size))
                self.sizes[segment - 1] += size
                self.tier.view.frame(frame, size)[:] = bytes(size)
        return chunk._replace(frames=offsets, segment=segment)

    def flip(self, chunk, index, offset):
        """Flip a bit of a chunk in its segment."""
        with open(self.paths[chunk.segment - 1], "r+b") as file:
            file.seek(chunk.frames[index] + offset)
            byte = file.read(1)[0]
            file.seek(chunk.frames[index] + offset)
            file.write(bytes([byte ^ 16]))

    def op(self, tilings, blocks, start, end):
        """Return the op of a load."""
        op = load_op(tilings, blocks, start, end)
        fields = {name: getattr(op, name) for name in op.__struct_fields__}
        return type(op)(**(fields | {"segments": self.paths, "instance": "i"}))


@pytest.fixture
def segments(tmp_path) -> Segments:
    return Segments(tmp_path)


def make_rank(shard, staging_bytes=STAGING_BYTES) -> Rank:
    rank = Rank(partial(StagedCopyEngine, HostDevice()), "cpu", shard, staging_bytes)
    assert rank.engine.read_with(DirectReader(HostFile))
    return rank


@pytest.mark.parametrize("slot_bytes", [2 * CHUNK_BYTES, CHUNK_BYTES // 2])
@pytest.mark.parametrize("loaded_as", TILINGS)
@pytest.mark.parametrize("stored_as", TILINGS)
def test_every_rank_loads_what_any_tiling_stored_from_arena_and_segments(segments, stored_as, loaded_as, slot_bytes):
    kv, tiling, blocks = kv_of(2, 6 * CHUNK), TILINGS[stored_as], blocks_for(6 * CHUNK, seed=3)
    chunks = [segments.tier.put(kv, tiling, number) for number in range(6)]
    for number, segment in ((1, 1), (2, 2), (3, 1), (5, 2)):
        chunks[number] = segments.move(chunks[number], tiling, segment)
    for shard in TILINGS[loaded_as][-2:]:
        rank, expected = make_rank(shard, 6 * slot_bytes), make_rank(shard, 6 * slot_bytes)
        expected.write(kv, blocks)
        assert load(rank, segments.tier, segments.op([tiling], blocks, 0, 6 * CHUNK), chunks) == (6, None)
        assert torch.equal(rank.snapshot_of_blocks(), expected.snapshot_of_blocks())


@pytest.mark.parametrize("bad", [0, 3, 6])
@pytest.mark.parametrize("stored_as", ["whole", "stages"])
def test_a_bit_flipped_in_a_segment_is_found_before_its_chunk_counts(segments, stored_as, bad):
    kv, tiling, blocks = kv_of(4, 7 * CHUNK), TILINGS[stored_as], blocks_for(7 * CHUNK)
    chunks = [segments.move(segments.tier.put(kv, tiling, number), tiling, 1) for number in range(7)]
    segments.flip(chunks[bad], -1, 1234)
    found = load(make_rank(WHOLE[0]), segments.tier, segments.op([tiling], blocks, 0, 7 * CHUNK), chunks)
    assert found == (bad, chunks[bad].key)


def test_a_bit_flipped_in_the_list_of_digests_matters_to_who_needs_the_list(segments):
    kv, blocks = kv_of(5, CHUNK), blocks_for(CHUNK)
    chunk = segments.move(segments.tier.put(kv, WHOLE, 0), WHOLE, 1)
    segments.flip(chunk, 0, digests_offset(CHUNK_BYTES) + 3)
    op = segments.op([WHOLE], blocks, 0, CHUNK)
    assert load(make_rank(WHOLE[0]), segments.tier, op, [chunk]) == (1, None)
    assert load(make_rank(TILINGS["halves"][1]), segments.tier, op, [chunk]) == (0, chunk.key)


def test_what_cannot_be_read_ends_the_load_and_what_came_before_counts(segments):
    kv, blocks = kv_of(6, 6 * CHUNK), blocks_for(6 * CHUNK)
    chunks = [segments.tier.put(kv, WHOLE, number) for number in range(6)]
    chunks = [*chunks[:3], *(segments.move(chunk, WHOLE, 1) for chunk in chunks[3:])]
    op = segments.op([WHOLE], blocks, 0, 6 * CHUNK)
    gone = [*chunks[:5], chunks[5]._replace(segment=2)]
    assert load(make_rank(WHOLE[0]), segments.tier, op, gone, group=1) == (5, None)
    plain = Rank(partial(StagedCopyEngine, HostDevice()), "cpu", WHOLE[0], STAGING_BYTES)
    assert load(plain, segments.tier, op, chunks) == (3, None)
    assert load(make_rank(WHOLE[0]), segments.tier, op, chunks) == (6, None)


def test_lanes_change_only_while_no_load_is_open(segments, monkeypatch):
    monkeypatch.setattr(copy_cuda, "LANES_WAIT_S", 0.05)
    kv, blocks = kv_of(7, CHUNK), blocks_for(CHUNK)
    chunk = segments.tier.put(kv, WHOLE, 0)
    rank = Rank(partial(StagedCopyEngine, HostDevice()), "cpu", WHOLE[0], STAGING_BYTES)
    op = segments.op([WHOLE], blocks, 0, CHUNK)
    run = rank.engine.open_load(segments.tier.view, op, None)
    assert not rank.engine.read_with(DirectReader(HostFile))
    run.push([chunk])
    assert run.finish() == 1
    assert rank.engine.read_with(DirectReader(HostFile))
    assert load(rank, segments.tier, op, [segments.move(chunk, WHOLE, 2)]) == (1, None)
