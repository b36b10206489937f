"""The CUDA copy engine on a real device: the cases that run without one, and what only a device can get wrong."""

import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cachetier.core.checksum import object_checksum
from cachetier.core.layout import PAGE_BYTES, frame_bytes
from cachetier_connector.cuda import staged_store, transfers
from cachetier_connector.cuda.copy_cuda import CudaCopyEngine
from cachetier_connector.cuda.device import CudaDevice
from cachetier_connector.plan import ChunkSource
from tests.connector.cuda.copy_cases import (
    CHUNK,
    CHUNK_BYTES,
    LAYOUT,
    STAGING_BYTES,
    TILINGS,
    WHOLE,
    CopyCases,
    Rank,
    Tier,
    blocks_for,
    canonical,
    kv_of,
    load,
    load_op,
)

pytestmark = pytest.mark.gpu

ARENA_BYTES = 600 << 20  # three cells


@pytest.fixture
def make():
    return CudaCopyEngine


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def big_tier() -> Iterator[Tier]:
    """In memory, as the server's is: the driver locks no pages of a file on a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachetier-test-") as folder:
        yield Tier(Path(folder), ARENA_BYTES)


@pytest.fixture
def rank(make, device) -> Rank:
    return Rank(make, device, WHOLE[0], STAGING_BYTES)


class TestOnTheGpu(CopyCases):
    pass


class TestInRegisteredMemoryOfTheGpu(CopyCases):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachetier-test-") as folder:
            yield Tier(Path(folder))

    @pytest.fixture
    def make(self, tier, monkeypatch):
        """Engines for which the arena is registered: the first one of a test; memory is registered once."""
        monkeypatch.setattr(staged_store, "PAGES_MAX", 2 * CHUNK_BYTES // PAGE_BYTES)
        made: list[CudaCopyEngine] = []

        def make(*args, **kwargs):
            engine = CudaCopyEngine(*args, **kwargs)
            engine.use_arena(tier.view)
            assert engine._registrations[0].join() or made
            made.append(engine)
            return engine

        yield make
        for engine in made:
            if not engine._is_broken:  # stopped by the test
                engine.stop()

    def test_stores_go_without_the_copy_engine(self, rank, tier, monkeypatch):
        monkeypatch.setattr(rank.engine._device, "copy_out", None)
        round_trip(rank, tier, 1)


def round_trip(rank: Rank, tier: Tier, seed: int) -> None:
    """Store and load a few chunks, and look at the bytes."""
    kv, blocks = kv_of(seed, 6 * CHUNK), blocks_for(6 * CHUNK, seed)
    rank.write(kv, blocks)
    frames, snapshot = tier.frames(WHOLE[0], 6), rank.engine.snapshot(blocks, 0, 6, CHUNK)
    checksums = rank.engine.fill(snapshot, range(6), tier.view, frames, lambda: True)
    assert checksums == [object_checksum(memoryview(canonical(kv, WHOLE[0], number))) for number in range(6)]
    chunks = [ChunkSource(b"k", 0, [frame], [checksum]) for frame, checksum in zip(frames, checksums, strict=True)]
    written = rank.snapshot_of_blocks()
    rank.memory.zero_()
    assert load(rank, tier, load_op([WHOLE], blocks, 0, 6 * CHUNK), chunks) == (6, None)
    assert torch.equal(rank.snapshot_of_blocks()[:, blocks], written[:, blocks])
    for frame in frames:
        tier.arena.free(frame)


def test_copies_work_before_during_and_after_the_registration(rank, big_tier):
    round_trip(rank, big_tier, 0)
    rank.engine.use_arena(big_tier.view)
    for seed in range(1, 40):
        round_trip(rank, big_tier, seed)
    assert rank.engine._registrations[0].join() == -(-big_tier.view.geometry.data_bytes // transfers.CELL_BYTES)
    round_trip(rank, big_tier, 40)
    rank.engine.stop()


def test_the_driver_takes_copies_up_to_the_border_of_a_registered_cell(rank, big_tier):
    """A frame that lies across the border of two cells, with both, one and none of them registered."""
    size = frame_bytes(LAYOUT.object_bytes(WHOLE[0], CHUNK))
    frame = transfers.CELL_BYTES - 8192
    kv, blocks = kv_of(1, CHUNK), blocks_for(CHUNK)
    assert size > 8192
    for cells in ([], [0], [1], [0, 1]):
        for cell in cells:
            rank.engine._device.register(big_tier.view.address + cell * transfers.CELL_BYTES, transfers.CELL_BYTES)
        rank.write(kv, blocks)
        snapshot = rank.engine.snapshot(blocks, 0, 1, CHUNK)
        [checksum] = rank.engine.fill(snapshot, [0], big_tier.view, [frame], lambda: True)
        rank.memory.zero_()
        chunk = ChunkSource(b"k", 0, [frame], [checksum])
        assert load(rank, big_tier, load_op([WHOLE], blocks, 0, CHUNK), [chunk]) == (1, None)
        for cell in cells:
            rank.engine._device.unregister(big_tier.view.address + cell * transfers.CELL_BYTES)


def test_a_snapshot_and_a_fence_are_ordered_against_the_engines_stream(rank, big_tier):
    """The engine is still busy when both are taken."""
    old, kv, blocks = kv_of(1, 4 * CHUNK), kv_of(2, 4 * CHUNK), blocks_for(4 * CHUNK)
    chunks = [big_tier.put(kv, WHOLE, number) for number in range(4)]
    write_old = rank.writer(old, blocks)
    for _ in range(5):
        rank.write(kv, blocks)
        torch.cuda._sleep(200_000_000)
        write_old()
        snapshot = rank.engine.snapshot(blocks, 0, 4, CHUNK)
        checksums = rank.engine.fill(snapshot, range(4), big_tier.view, big_tier.frames(WHOLE[0], 4), lambda: True)
        assert checksums == [object_checksum(memoryview(canonical(old, WHOLE[0], number))) for number in range(4)]
        torch.cuda._sleep(200_000_000)
        write_old()
        op, fence = load_op([WHOLE], blocks, 0, 4 * CHUNK), rank.engine.fence()
        assert load(rank, big_tier, op, chunks, fence=fence) == (4, None)
        loaded = rank.snapshot_of_blocks()
        rank.write(kv, blocks)
        assert torch.equal(loaded, rank.snapshot_of_blocks())


@pytest.mark.parametrize("is_registered", [False, True])
def test_a_thousand_random_loads_and_stores_from_three_threads(make, device, big_tier, is_registered):
    """Both directions at once; some chunks are corrupt."""
    rank, errors = Rank(make, device, WHOLE[0], STAGING_BYTES), []
    if is_registered:
        rank.engine.use_arena(big_tier.view)
        rank.engine._registrations[0].join()
    kv, tilings = kv_of(3, 5 * CHUNK), list(TILINGS.values())
    tables = [list(range(number * 10, number * 10 + 10)) for number in range(3)]
    rank.write(kv, tables[2])
    torch.cuda.synchronize()
    chunks = [[big_tier.put(kv, tiling, number, index) for number in range(5)] for index, tiling in enumerate(tilings)]
    bad = big_tier.put(kv, WHOLE, 2)
    big_tier.view.frame(bad.frames[0] + 4321, 1)[0] ^= 1
    expected = [object_checksum(memoryview(canonical(kv, WHOLE[0], number))) for number in range(5)]
    wanted = rank.memory[:, tables[2]].clone()

    def loads(number: int) -> None:
        rng = random.Random(number)
        for _ in range(333):
            is_bad, sources = rng.random() < 0.2, [chunks[rng.randrange(4)][n] for n in range(5)]
            sources[2] = bad if is_bad else sources[2]
            op = load_op(tilings, tables[number], 0, 5 * CHUNK)
            found = load(rank, big_tier, op, sources, rng.randrange(1, 6))
            assert found == ((2, bad.key) if is_bad else (5, None))
            if not is_bad:
                assert torch.equal(rank.memory[:, tables[number]], wanted)

    def stores(_: int) -> None:
        for _ in range(333):
            snapshot = rank.engine.snapshot(tables[2], 0, 5, CHUNK)
            frames = big_tier.frames(WHOLE[0], 5)
            assert rank.engine.fill(snapshot, range(5), big_tier.view, frames, lambda: True) == expected
            for number, frame in enumerate(frames):
                payload = canonical(kv, WHOLE[0], number)
                assert bytes(big_tier.view.frame(frame, len(payload))) == payload
                big_tier.arena.free(frame)

    def guarded(work, number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=work) for work in ((loads, 0), (loads, 1), (stores, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    rank.engine.stop()


def test_an_error_of_the_driver_is_raised_where_it_happens_and_does_not_linger(rank, big_tier):
    rank.engine._device.register(big_tier.view.address, 1 << 20)
    with pytest.raises(Exception, match="ALREADY_REGISTERED"):
        rank.engine._device.register(big_tier.view.address, 1 << 20)
    torch.cuda.synchronize()
    round_trip(rank, big_tier, 5)
    rank.engine._device.unregister(big_tier.view.address)


def test_threads_of_ours_do_what_they_have_to_while_a_graph_is_captured(device, big_tier):
    """vLLM captures when the connector is already up, and one call of another thread may be the end of it."""
    driver, stream, errors = CudaDevice(device), torch.cuda.Stream(device), []
    graph, numbers = torch.cuda.CUDAGraph(), torch.ones(1 << 10, device=device)

    def work() -> None:
        try:
            driver.bind_thread()
            driver.register(big_tier.view.address, 1 << 20)
            driver.empty_host(1 << 10)
            driver.free(driver.allocate(1 << 20))
            driver.upload([1, 2, 3], driver.new_stream(is_urgent=True))
            driver.unregister(big_tier.view.address)
        except BaseException as error:
            errors.append(error)

    with torch.cuda.stream(stream):
        numbers + 1  # what is slow once
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            numbers.add_(1)
    assert errors == []
    graph.replay()
    torch.cuda.synchronize()
    assert numbers.eq(2).all()
