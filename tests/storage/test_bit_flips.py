"""A thousand flipped bits in payloads, record headers and the index: each one is noticed, and ends as a miss."""

import os
import random
import shutil
from pathlib import Path

import pytest

from cachetier.core.config import MIB, ServerConfig
from cachetier.storage.data_dir import DataDir
from cachetier.storage.disk import ChunkToWrite, DiskTier
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import IndexSettings
from cachetier.storage.namespaces import NamespaceTable
from cachetier.storage.segment_log import SegmentLog
from cachetier.storage.verify import verify
from tests.storage.chunks import blank_frames, is_intact, make_chunk, objects

SHAPE = IndexSettings(limit_bytes=256 << 10, segment_bytes=1 << 20, num_segments=4, chunk_tokens=64)
WRITES = [make_chunk(seed, object_bytes=6000, num_shards=2) for seed in range(20)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder = tmp_path_factory.mktemp("data")
    config = ServerConfig(data_dir=str(folder / "tier"), socket=str(folder / "s"), disk_bytes=16 * MIB)
    data_dir, tier = DataDir.open(config), open_tier(config)
    for start in range(0, len(WRITES), 8):
        assert all(tier.append(WRITES[start : start + 8]))
    tier.close()
    data_dir.close()
    return config


def open_tier(config: ServerConfig) -> DiskTier:
    """Open a tier with a small index: reading all of it a thousand times takes a while."""
    log = SegmentLog(config.data_dir, SHAPE, FileLayer(), lambda key: False, lambda key: False)
    return DiskTier(log, NamespaceTable(config.data_dir, FileLayer()), config.disk_bytes)


def flip(path: str, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def usable(tier: DiskTier, write: ChunkToWrite) -> bool:
    """Do what store and worker do with a chunk; bytes that pass all their checks must be the right ones."""
    row = tier.lookup(write.chunk.key)
    if row is None:
        return False
    assert row == write.chunk
    frames = blank_frames(row)
    if not tier.read(row.key, frames) or not is_intact(row, frames):
        return False
    assert objects(row, frames) == objects(row, write.frames)
    return True


def num_usable(config: ServerConfig) -> int:
    tier = open_tier(config)
    try:
        return sum(usable(tier, write) for write in WRITES)
    finally:
        tier.close()


def segment_path(config: ServerConfig) -> str:
    return os.path.join(config.data_dir, "segments", "00000001.seg")


def index_path(config: ServerConfig) -> str:
    return os.path.join(config.data_dir, "index", "chunks.idx")


def test_flips_in_records_cost_exactly_the_chunk_they_hit(pristine: ServerConfig, tmp_path: Path) -> None:
    """Every bit of header and objects is covered; padding behind objects and digests is not used by anybody."""
    rng = random.Random(1)
    shutil.copy(index_path(pristine), tmp_path / "index")
    record_bytes = 4096 + WRITES[0].chunk.payload_bytes()
    covered = [*range(4096)]
    for start in (4096, 4096 + WRITES[0].chunk.payload_bytes() // 2):
        covered += [*range(start, start + 6000), *range(start + 8192, start + 8192 + 16)]
    for _ in range(500):
        number = rng.randrange(len(WRITES))
        bit = (number * record_bytes + rng.choice(covered)) * 8 + rng.randrange(8)
        flip(segment_path(pristine), bit)
        tier = open_tier(pristine)
        assert not usable(tier, WRITES[number])
        assert all(usable(tier, WRITES[other]) for other in rng.sample(range(len(WRITES)), 3) if other != number)
        tier.close()
        flip(segment_path(pristine), bit)
        restore(index_path(pristine), tmp_path / "index")


@pytest.mark.slow
def test_flips_in_the_index_are_noticed_and_never_mislead(pristine: ServerConfig, tmp_path: Path) -> None:
    path = index_path(pristine)
    shutil.copy(path, tmp_path / "index")
    rng = random.Random(2)
    image = Path(path).read_bytes()
    written = [start for start in range(0, len(image), 4096) if any(image[start : start + 4096])]
    for number in range(500):
        start = rng.choice(written) if number % 5 else rng.randrange(len(image) // 4096) * 4096
        flip(path, start * 8 + rng.randrange(4096 * 8))
        assert verify(pristine.data_dir).bad == 1, "the flip went unnoticed"
        if number % 5 == 0:
            assert num_usable(pristine) >= len(WRITES) - 10, "more than one page of rows is gone"
        restore(path, tmp_path / "index")


def restore(path: str, copy: Path) -> None:
    """Put the index back as it was, without making it sparse or another file."""
    with open(path, "r+b") as file:
        file.write(copy.read_bytes())


def test_repair_leaves_what_is_good_and_nothing_else(pristine: ServerConfig, tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    shutil.copytree(pristine.data_dir, folder)
    config = ServerConfig(data_dir=str(folder), socket=str(tmp_path / "s"), disk_bytes=16 * MIB)
    record_bytes = 4096 + WRITES[0].chunk.payload_bytes()
    for number in (3, 17):
        flip(segment_path(config), (number * record_bytes + 4096 + 100) * 8)
    found = verify(str(folder))
    assert (found.records, found.bad) == (len(WRITES), 2)
    assert verify(str(folder), repair=True).bad == 2
    after = verify(str(folder))
    assert (after.records, after.bad) == (len(WRITES) - 2, 0)
    tier = open_tier(config)
    assert tier.num_chunks == len(WRITES) - 2
    assert [number for number, write in enumerate(WRITES) if not usable(tier, write)] == [3, 17]
    tier.check_integrity()
    tier.close()


@pytest.mark.parametrize("name", ["meta.json", "secret", "namespaces.txt"])
def test_flips_in_small_files_do_not_keep_the_directory_from_opening(pristine: ServerConfig, name: str) -> None:
    path = Path(pristine.data_dir, name)
    if not path.exists():
        path.write_bytes(b"")
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 23):
        flip(str(path), bit)
        data_dir, tier = DataDir.open(pristine), open_tier(pristine)
        tier.close()
        data_dir.close()
        path.write_bytes(whole)
