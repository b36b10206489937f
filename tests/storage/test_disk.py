"""What the disk tier promises beyond the model: files, sizes, concurrency, restarts with other settings."""

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cachetier.core.config import MIB, ServerConfig
from cachetier.core.keys import ChainKey, ModelIdentity, namespace_of
from cachetier.core.layout import KVLayout
from cachetier.storage import record_reads
from cachetier.storage.data_dir import DataDir
from cachetier.storage.disk import ChunkToWrite, DiskTier, HeldRecord
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import IndexSettings
from cachetier.storage.namespaces import NamespaceTable
from cachetier.storage.segment_log import SegmentLog
from tests.storage.chunks import blank_frames, make_chunk, objects
from tests.storage.fault_files import FaultFiles

WRITES = [make_chunk(seed, object_bytes=30_000) for seed in range(400)]
IDENTITY = ModelIdentity(
    model="m", weights="w", kv_dtype="bfloat16", attention="full", num_layers=4, num_kv_heads=2, k_head_size=8,
    v_head_size=8,
)  # fmt: skip


class BufferedFiles(FileLayer):
    """A file system without O_DIRECT."""

    def open(self, path: str, *, create: bool = False, direct: bool = False) -> int:
        return super().open(path, create=create)


def make_config(folder: Path, disk_mib: int = 16) -> ServerConfig:
    config = ServerConfig(data_dir=str(folder), socket="/tmp/unused", disk_bytes=disk_mib * MIB)
    DataDir.open(config).close()
    return config


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return make_config(tmp_path / "tier")


@pytest.fixture(params=[FileLayer, BufferedFiles])
def tier(config: ServerConfig, request: pytest.FixtureRequest) -> Iterator[DiskTier]:
    made = DiskTier.open(config, request.param())
    yield made
    made.check_integrity()
    made.close()


def held(tier: DiskTier) -> list[int]:
    return [number for number, write in enumerate(WRITES) if tier.lookup(write.chunk.key)]


def is_right(tier: DiskTier, write: ChunkToWrite) -> bool:
    frames = blank_frames(write.chunk)
    return tier.read(write.chunk.key, frames) and objects(write.chunk, frames) == objects(write.chunk, write.frames)


class CountingFiles(FileLayer):
    """Count reads, and fail those that touch one of `bad` (offsets in a file)."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.bad: set[int] = set()

    def preadv(self, descriptor: int, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        self.num_reads += 1
        if any(offset <= bad < offset + sum(map(len, buffers)) for bad in self.bad):
            raise OSError(errno.EIO, "injected")
        super().preadv(descriptor, buffers, offset)


def read_many(tier: DiskTier, numbers: Sequence[int]) -> list[bool]:
    """Read chunks at once; return which were there. Those that were must be right."""
    frames = [blank_frames(WRITES[number].chunk) for number in numbers]
    there = tier.read_many([(WRITES[number].chunk.key, each) for number, each in zip(numbers, frames, strict=True)])
    for number, each, is_there in zip(numbers, frames, there, strict=True):
        assert not is_there or objects(WRITES[number].chunk, each) == objects(
            WRITES[number].chunk, WRITES[number].frames
        )
    return there


def test_neighbours_on_disk_are_read_at_once_and_others_one_by_one(config: ServerConfig) -> None:
    files = CountingFiles()
    tier = DiskTier.open(config, files)
    tier.append(WRITES[:10])
    tier.append(WRITES[10:20])
    files.num_reads = 0
    assert read_many(tier, range(20)) == [True] * 20
    assert files.num_reads == 1
    assert read_many(tier, [19, 3, 4, 399, 5, 6, 3]) == [True, True, True, False, True, True, True]
    assert files.num_reads == 1 + 3
    tier.close()


def test_more_neighbours_than_one_read_takes_are_read_all_the_same(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_reads, "BUFFERS_MAX", 7)
    tier = DiskTier.open(config)
    tier.append(WRITES[:20])
    assert read_many(tier, range(20)) == [True] * 20
    tier.close()


def test_a_record_that_cannot_be_read_does_not_cost_its_neighbours(config: ServerConfig) -> None:
    files = CountingFiles()
    tier = DiskTier.open(config, files)
    tier.append(WRITES[:6])
    location = tier._segment_log.find(WRITES[2].chunk.key)
    assert location is not None
    files.bad = {location.offset + 8192}
    assert read_many(tier, range(6)) == [True, True, False, True, True, True]
    assert [number for number in held(tier) if number < 6] == [0, 1, 3, 4, 5]
    assert tier.counters.read_errors == 1
    tier.close()


def frames_in_file(record: HeldRecord, write: ChunkToWrite) -> bool:
    """Tell whether the chunk's frames stand where `record` says."""
    with open(record.path, "rb") as file:
        file.seek(record.offset)
        return file.read(write.chunk.payload_bytes()) == b"".join(bytes(frame) for frame in write.frames)


def test_what_is_held_stays_where_it_was_whatever_is_written(config: ServerConfig) -> None:
    tier = DiskTier.open(config)
    tier.append(WRITES[:16])
    records = [tier.hold(write.chunk.key) for write in WRITES[:3]]
    for start in range(16, len(WRITES), 16):
        assert all(tier.append(WRITES[start : start + 16]))
    for record, write in zip(records, WRITES[:3], strict=True):
        assert record is not None
        assert frames_in_file(record, write)
        tier.let_go(record)
    for start in range(16, len(WRITES), 16):
        tier.drop([write.chunk.key for write in WRITES[start : start + 16]])
        assert all(tier.append(WRITES[start : start + 16]))
    assert tier.lookup(WRITES[0].chunk.key) is None
    assert tier.hold(WRITES[0].chunk.key) is None
    tier.check_integrity()
    tier.close()


def test_when_every_segment_is_held_new_chunks_are_refused_until_one_is_let_go(config: ServerConfig) -> None:
    tier = DiskTier.open(config)
    held_records: list[tuple[HeldRecord, ChunkToWrite]] = []
    refused_at = None
    for number, write in enumerate(WRITES):
        if not tier.append([write])[0]:
            refused_at = number
            break
        record = tier.hold(write.chunk.key)
        assert record is not None
        held_records.append((record, write))
    assert refused_at is not None
    assert all(frames_in_file(record, write) for record, write in held_records)
    for record, _ in held_records:
        tier.let_go(record)
    assert tier.append([WRITES[refused_at]]) == [True]
    tier.check_integrity()
    tier.close()


def test_ten_times_the_limit_keeps_the_newest_within_the_limit(tier: DiskTier, config: ServerConfig) -> None:
    for start in range(0, len(WRITES), 16):
        assert all(tier.append(WRITES[start : start + 16]))
    found = held(tier)
    assert found == list(range(found[0], len(WRITES)))
    assert len(found) == tier.num_chunks > 200
    assert all(is_right(tier, WRITES[number]) for number in found[::9])
    on_disk = sum(path.stat().st_blocks * 512 for path in Path(config.data_dir).rglob("*"))
    assert on_disk <= config.disk_bytes == tier.limit_bytes
    assert tier.used_bytes <= tier.limit_bytes


def test_hot_and_pinned_chunks_survive_any_number_of_newer_ones(config: ServerConfig) -> None:
    hot, pinned = WRITES[3].chunk.key, WRITES[5].chunk.key
    tier = DiskTier.open(config, is_hot=lambda key: key == hot, is_pinned=lambda key: key == pinned)
    for start in range(0, len(WRITES), 16):
        assert all(tier.append(WRITES[start : start + 16]))
    assert [number for number in held(tier) if number < 50] == [3, 5]
    assert is_right(tier, WRITES[3])
    assert tier.counters.carried >= 2
    tier.check_integrity()
    tier.close()


def test_hot_chunks_take_half_a_segment_at_most(config: ServerConfig) -> None:
    tier = DiskTier.open(config, is_hot=lambda key: True)
    for start in range(0, len(WRITES), 16):
        tier.append(WRITES[start : start + 16])
    assert held(tier)[-1] == len(WRITES) - 1
    assert tier.counters.evicted > 100
    tier.close()


def test_readers_and_a_writer_at_once_never_see_wrong_bytes(config: ServerConfig) -> None:
    tier = DiskTier.open(config)
    wrong, stop = [], threading.Event()

    def read_on() -> None:
        number = 0
        while not stop.is_set():
            number = (number * 7 + 13) % len(WRITES)
            write = WRITES[number]
            row, frames = tier.lookup(write.chunk.key), blank_frames(write.chunk)
            if row and tier.read(row.key, frames) and objects(row, frames) != objects(row, write.frames):
                wrong.append(number)

    threads = [threading.Thread(target=read_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(0, len(WRITES), 8):
        tier.append(WRITES[start : start + 8])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tier.counters.read_errors == 0
    tier.check_integrity()
    tier.close()


@pytest.mark.parametrize("disk_mib", [24, 64])
def test_another_size_limit_keeps_the_chunks(tmp_path: Path, disk_mib: int) -> None:
    tier = DiskTier.open(make_config(tmp_path / "tier", 32))
    tier.append(WRITES[:100])
    tier.close()
    other = make_config(tmp_path / "tier", disk_mib)
    tier = DiskTier.open(other)
    assert held(tier) == list(range(100))
    assert all(is_right(tier, write) for write in WRITES[:100:10])
    tier.check_integrity()
    assert tier.append(WRITES[100:110]) == [True] * 10
    tier.close()


def test_a_smaller_limit_than_the_contents_drops_what_does_not_fit(tmp_path: Path) -> None:
    tier = DiskTier.open(make_config(tmp_path / "tier", 32))
    for start in range(0, len(WRITES), 50):
        tier.append(WRITES[start : start + 50])
    tier.close()
    small = make_config(tmp_path / "tier", 16)
    tier = DiskTier.open(small)
    assert 0 < tier.num_chunks == len(held(tier))
    assert sum(path.stat().st_blocks * 512 for path in Path(small.data_dir).rglob("*")) <= small.disk_bytes
    tier.check_integrity()
    tier.close()


def test_a_lost_index_is_rebuilt_from_the_records(config: ServerConfig) -> None:
    tier = DiskTier.open(config)
    tier.append(WRITES[:60])
    tier.close()
    os.unlink(os.path.join(config.data_dir, "index", "chunks.idx"))
    tier = DiskTier.open(config)
    assert held(tier) == list(range(60)) and tier.num_chunks == 60  # noqa: PT018
    assert is_right(tier, WRITES[30])
    tier.check_integrity()
    tier.close()


def test_a_lost_segment_is_a_miss(config: ServerConfig) -> None:
    tier = DiskTier.open(config)
    tier.append(WRITES[:60])
    tier.close()
    os.unlink(os.path.join(config.data_dir, "segments", "00000001.seg"))
    tier = DiskTier.open(config)
    assert 0 < len(held(tier)) < 60
    tier.check_integrity()
    assert all(tier.append(WRITES[:60]))
    tier.close()


def test_a_chunk_larger_than_a_segment_is_refused(tier: DiskTier) -> None:
    large = make_chunk(1000, object_bytes=2 * MIB)
    assert tier.append([large, WRITES[0]]) == [False, True]
    assert tier.counters.refused == 1


def test_a_chunk_twice_in_a_group_and_again_is_written_once(tier: DiskTier) -> None:
    assert tier.append([WRITES[0], WRITES[1], WRITES[0]]) == [True] * 3
    assert tier.append([WRITES[1]]) == [True]
    assert tier.num_chunks == 2


def test_namespaces_are_remembered(config: ServerConfig) -> None:
    tier = DiskTier.open(config)
    layouts = [KVLayout(num_layers=4, num_kv_heads=2, row_bytes=32)]
    tier.remember_namespace(namespace_of(IDENTITY), IDENTITY, layouts)
    tier.close()
    tier = DiskTier.open(config)
    known = tier.namespaces()[namespace_of(IDENTITY)]
    assert (known.identity, known.layouts) == (IDENTITY, layouts)
    tier.close()


def test_looking_up_what_is_not_there_is_a_miss(tier: DiskTier) -> None:
    assert tier.lookup(ChainKey(bytes(16))) is None
    assert not tier.read(ChainKey(bytes(16)), [])
    assert tier.drop([ChainKey(bytes(16))]) == 0


@pytest.mark.parametrize("fail_in", range(12))
def test_a_segment_that_could_not_be_begun_costs_no_chunk_at_the_next_start(fail_in: int) -> None:
    """Its entry in a segment table that is written later would make all segments taken, and the oldest would go."""
    files = FaultFiles(fail_in)
    shape = IndexSettings(limit_bytes=128 << 10, segment_bytes=128 << 10, num_segments=3, chunk_tokens=64)

    def open_tier() -> DiskTier:
        log = SegmentLog("/data", shape, files, lambda key: False, lambda key: False)
        return DiskTier(log, NamespaceTable("/data", files), 1 << 20)

    tier = open_tier()
    number = 0
    while tier.used_bytes < shape.limit_bytes + 2 * shape.segment_bytes or tier._segment_log._free_bytes() > 40_000:
        assert tier.append([WRITES[number]]) == [True]
        number += 1
    tier.drop([WRITES[0].chunk.key])  # commits the segment table: nothing else is left to be written there
    files.fail_in = fail_in
    tier.append([WRITES[number]])
    files.fail_in = -1
    kept = held(tier)
    tier.close()
    tier = open_tier()
    assert held(tier) == kept
    tier.check_integrity()
